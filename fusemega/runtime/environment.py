"""The facts of `fusemega env`: what this machine has, what is missing, what that costs, and what would break."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusemega.files.cache import cache_folder
from fusemega.runtime.kernel_packages import (
    FP8_RECIPES,
    foreign_apex,
    installed_version,
    recipe_problem,
    transformer_engine_fault,
    transformer_engine_problem,
)

OK, MISSING, BROKEN = "ok", "missing", "broken"
GIB = 1 << 30
MIN_SHM_BYTES = GIB

# Distribution -> what its absence breaks. All are in setup.py's install_requires.
_REQUIRED = {
    "transformers": "models and tokenizers cannot be opened",
    "tokenizers": "tokenizers cannot be opened",
    "safetensors": "weights cannot be read",
    "datasets": "data other than JSONL cannot be read",
    "pydantic": "run files cannot be checked",
    "pyyaml": "run files cannot be read",
    "psutil": "saving a distributed checkpoint hangs for ever (megatron-core needs it and does not say so)",
}
_OPTIONAL = {
    "nvidia-ml-py": "no figures on GPU memory, power and errors",
    "tensorboard": "no TensorBoard files",
    "gguf": "the quickstart's model cannot be unpacked: pip install 'fusemega[gguf]'",
    "accelerate": "the quickstart's model cannot be unpacked: pip install 'fusemega[gguf]'",
    "triton": "no custom GPU kernels; unused on the CPU",
}


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        name: what was looked for.
        found: what is there, or "-".
        status: "ok", "missing" (optional and absent) or "broken" (required and absent, or present and harmful).
        note: what its absence costs, or what would break; "" where nothing follows.
    """

    name: str
    found: str
    status: str = OK
    note: str = ""


def examine() -> list[Fact]:
    """Looks at this process's machine and packages; imports torch, starts no process group, allocates nothing."""
    return [*_software(), *_accelerators(), *_machine()]


def _software() -> Iterator[Fact]:
    python_ok = sys.version_info >= (3, 10)
    yield Fact("python", platform.python_version(), OK if python_ok else BROKEN, "" if python_ok else "needs 3.10")
    yield _torch()
    yield _megatron_core()
    for name, breaks in _REQUIRED.items():
        version = installed_version(name)
        yield Fact(name, version or "-", OK if version else BROKEN, "" if version else breaks)
    yield from _transformer_engine()
    yield _apex()
    for name, costs in _OPTIONAL.items():
        version = installed_version(name)
        yield Fact(name, version or "-", OK if version else MISSING, "" if version else costs)


def _torch() -> Fact:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        return Fact("torch", installed_version("torch") or "-", BROKEN, f"cannot be imported: {error}")
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    if not torch.cuda.is_available() and not dist.is_gloo_available():
        return Fact("torch", f"{torch.__version__}, {build}", BROKEN, "neither CUDA nor gloo: no process group at all")
    return Fact("torch", f"{torch.__version__}, {build}")


def _megatron_core() -> Fact:
    from fusemega.runtime.cpu_backend import MEGATRON_CORE_PIN

    version = installed_version("megatron-core")
    if version == MEGATRON_CORE_PIN:
        return Fact("megatron-core", version)
    mend = f"pip install megatron-core=={MEGATRON_CORE_PIN}"
    return Fact("megatron-core", version or "-", BROKEN, f"no other release is tested, or runs without CUDA: {mend}")


def _transformer_engine() -> Iterator[Fact]:
    """The package, and which FP8 recipes it can run here."""
    installed, problem = installed_version("transformer-engine"), transformer_engine_problem()
    if installed is None:
        cost = "norms, attention and Adam run on torch's kernels: pip install 'fusemega[gpu]'"
        yield Fact("transformer-engine", "-", MISSING, cost)
    elif fault := transformer_engine_fault():
        yield Fact("transformer-engine", installed, BROKEN, fault)
    else:
        yield Fact("transformer-engine", installed, OK, "" if problem is None else "unused: it needs a GPU")
    if problem is not None:
        yield Fact("FP8", "-", MISSING, "needs Transformer Engine, and a GPU")
        return
    reasons = {recipe: recipe_problem(recipe) for recipe in FP8_RECIPES}
    usable = [recipe for recipe, reason in reasons.items() if reason is None]
    note = "; ".join(f"no {recipe}: {reason}" for recipe, reason in reasons.items() if reason)
    yield Fact("FP8", ", ".join(usable) or "-", OK if usable else MISSING, note)


def _apex() -> Fact:
    """NVIDIA's apex is not on the Python registry; a web toolkit of that name is, and flips Megatron's switches."""
    if foreign_apex():
        note = "not NVIDIA's apex: megatron-core would mistake it for NVIDIA's and lose its norms: pip uninstall apex"
        return Fact("apex", installed_version("apex") or "found", BROKEN, note)
    if importlib.util.find_spec("apex") is None:
        return Fact("apex", "-", MISSING, "nothing beside Transformer Engine; without either, torch's norms and Adam")
    return Fact("apex", installed_version("apex") or "found")


def _accelerators() -> Iterator[Fact]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError):
        return
    cuda = torch.cuda.is_available()
    gpus = list(_gpus())
    if cuda:
        yield Fact("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)")
    elif gpus:
        note = "GPUs are there, but this torch cannot use them: runs are refused unless FUSEMEGA_DEVICE=cpu"
        yield Fact("CUDA", "-", BROKEN, note)
    else:
        yield Fact("CUDA", "-", MISSING, "models run on the CPU, over gloo")
    yield from gpus
    if cuda and dist.is_nccl_available():
        yield Fact("NCCL", ".".join(str(part) for part in torch.cuda.nccl.version()))
    elif cuda:
        yield Fact("NCCL", "-", BROKEN, "GPUs cannot talk to one another")
    else:
        yield Fact("NCCL", "-", MISSING, "needed with GPUs only")


def _gpus() -> Iterator[Fact]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the package or the driver is absent: either way there is nothing to list
        return
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        yield Fact("driver", str(driver))
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
                size = f"{memory.total / GIB:.0f} GiB, {memory.free / GIB:.0f} free"
                note = "" if (major, minor) >= (8, 9) else "no FP8" if major >= 8 else "no bf16, no FP8"
                found = f"{pynvml.nvmlDeviceGetName(handle)}, {size}, sm_{major}{minor}"
                yield Fact(f"GPU {index}", found, OK, note)
            except pynvml.NVMLError as error:
                yield Fact(f"GPU {index}", "-", BROKEN, str(error))
    finally:
        pynvml.nvmlShutdown()


def _machine() -> Iterator[Fact]:
    yield Fact("cores", str(len(os.sched_getaffinity(0))))
    if installed_version("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        yield Fact("memory", f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} available")
    yield Fact("disk here", _free(Path.cwd()))
    cache = cache_folder()
    yield Fact("disk of the cache", f"{_free(_existing(cache))} ({cache})")
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Fact("shared memory", "-", MISSING, "NCCL and data workers need /dev/shm")
    else:
        low = shutil.disk_usage(shm).total < MIN_SHM_BYTES
        note = "less than 1 GiB: NCCL between GPUs of one machine may fail; give the container --shm-size"
        yield Fact("shared memory", _free(shm), MISSING if low else OK, note if low else "")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _free(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.total / GIB:.0f} GiB, {usage.free / GIB:.0f} free"
