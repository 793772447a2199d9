"""Faster start-up without a GPU: Megatron-core's fused functions are not compiled.

Megatron-core decorates some thirty functions with `torch.compile` while it is imported. That alone imports torch's
compiler, 2 of the 6 CPU seconds that every process of a run spends before it does anything, and no model that is built
here calls one of these functions on the CPU. Megatron has a switch for it, `megatron.core.jit.disable_jit_fuser()`,
which must be called before the decorated functions are read, that is during the first `import megatron.core`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_MODULE = "megatron.core.jit"
_GPU_FILE = Path("/dev/nvidiactl")  # asking torch would import it, and start CUDA before a process may fork


def turn_off_where_no_gpu_is() -> None:
    """Have Megatron's switch turned on import. Call it before the first import of Megatron-core; idempotent."""
    if not _GPU_FILE.exists() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module, as the other finders do, and gives it a loader that turns the switch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)  # so that the search in the next line asks the other finders only
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.disable_jit_fuser()
