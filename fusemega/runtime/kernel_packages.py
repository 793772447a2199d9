"""The packages of GPU kernels that megatron-core looks for: Transformer Engine, and NVIDIA's apex.

Both are optional, and megatron-core chooses its code by whether they can be imported. So a wrong package does harm:
with a broken Transformer Engine megatron-core cannot be imported, and with the unrelated web toolkit that is called
`apex` on the Python registry it loses its norms.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

from packaging.specifiers import SpecifierSet

from fusemega.errors import UserError

TRANSFORMER_ENGINE_RANGE = SpecifierSet(">=2.9,<2.12")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def installed_version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def foreign_apex() -> bool:
    """Whether `import apex` would find something other than NVIDIA's. Does not import it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    return not any((folder / "multi_tensor_apply").is_dir() for folder in folders)


def transformer_engine_fault() -> str | None:
    """What is wrong with the installed Transformer Engine; None if nothing is wrong, or it is not installed."""
    installed = installed_version("transformer-engine")
    if installed is not None and not TRANSFORMER_ENGINE_RANGE.contains(installed, prereleases=True):
        return f"megatron-core wants transformer-engine {TRANSFORMER_ENGINE_RANGE}, and {installed} is installed"
    return _import_failure()


def _import_failure() -> str | None:
    if installed_version("transformer-engine") is None and importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # its loader raises RuntimeError, OSError or ImportError, by what is wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"transformer-engine cannot be imported, so megatron-core cannot: {reason}"
    return None


def transformer_engine_problem() -> str | None:
    """Why a model cannot be built of Transformer Engine's modules on this machine; None where it can."""
    import torch

    if installed_version("transformer-engine") is None:
        return "Transformer Engine is not installed: pip install 'fusemega[gpu]'"
    if fault := transformer_engine_fault():
        return fault
    if not torch.cuda.is_available():
        return "Transformer Engine needs a GPU, and torch finds none here"
    return None


def refuse_harmful() -> None:
    """Refuses harmful packages. To be called before megatron-core is imported, which chooses its code by them.

    Raises:
        UserError: a package is installed with which megatron-core would compute wrongly, or could not be imported.
    """
    if foreign_apex():
        raise UserError(
            "the installed package apex is not NVIDIA's: megatron-core would mistake it for NVIDIA's and lose its "
            "norms; pip uninstall apex"
        )
    if failure := _import_failure():
        raise UserError(f"{failure}; repair it, or pip uninstall transformer-engine")


def recipe_problem(recipe: str) -> str | None:
    """Transformer Engine's own answer why it cannot run an FP8 recipe on this GPU; None where it can."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    check = {
        "delayed": FP8GlobalStateManager.is_fp8_available,
        "tensorwise": FP8GlobalStateManager.is_fp8_available,
        "blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
        "mxfp8": FP8GlobalStateManager.is_mxfp8_available,
    }[recipe]
    available, reason = check()
    return None if available else str(reason).rstrip(".")
