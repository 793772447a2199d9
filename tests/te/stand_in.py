"""Transformer Engine's own Python on a machine without CUDA, for tests.

What is real: every module's constructor, parameter names and shapes, state dicts, recipes, the FP8 bookkeeping, and
the pure-PyTorch reference quantizers that ship in the wheel. What is not: the compiled extension
`transformer_engine_torch`. Here it is a module whose enumerations are real and whose functions raise, but for the few
in `cpu_ops`. Nothing that runs on it says anything about speed, or about the kernels' own rounding.

`install` comes before megatron-core is imported. The answers that Transformer Engine needs to hear ("CUDA is there",
"this tensor is on it") are given to its own callers only, so that everything else still sees a machine without CUDA.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import types
import warnings
from typing import Any

import torch

# TransformerConfig's settings for the pure-PyTorch current scaling that ships in the wheel: hybrid, a scale a tensor.
REFERENCE_FP8 = {
    "fp8": "hybrid",
    "fp8_recipe": "custom",
    "fp8_quantizer_factory": "transformer_engine.pytorch.custom_recipes.quantization_current_scaling."
    "current_scaling_ref_quantizer_factory",
}

# Whose questions are answered as on a Hopper GPU.
_ANSWERED = ("transformer_engine.", "megatron.core.extensions.transformer_engine")


class _DType(enum.IntEnum):
    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


class _FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class _FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


# Parts of its Python that import Triton or ONNX.
_LEFT_OUT = ("onnx_extensions", "triton", "triton.cross_entropy", "triton.pad", "triton.permutation")


class _NeedsGPU:
    """A symbol of the extension that is not here: it can be named, and calling it is an error."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name} is compiled for GPUs, and this is the stand-in")

    def __getattr__(self, name: str) -> _NeedsGPU:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NeedsGPU(f"{self.name}.{name}")

    def __or__(self, other: object) -> _NeedsGPU:  # type annotations of the form `X | None`
        return self


class _Absent(types.ModuleType):
    """A module that cannot be had here: whatever is asked of it is there, and cannot be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NeedsGPU(f"{self.__name__}.{name}")


class _Extension(_Absent):
    DType = _DType
    FP8FwdTensors = _FP8FwdTensors
    FP8BwdTensors = _FP8BwdTensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CommOverlap"):  # base classes of Transformer Engine's own
            return type(name, (), {})
        return super().__getattr__(name)


class _Hopper:
    name, major, minor = "stand-in for an H100", 9, 0
    multi_processor_count, total_memory = 132, 80 << 30


def install() -> None:
    """Make `transformer_engine.pytorch` importable in this process, and its modules constructible on CPU tensors."""
    if "transformer_engine_torch" in sys.modules:
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no search for cuDNN, NVRTC and the core library
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"  # a kernel of the extension
    extension = _Extension("transformer_engine_torch")
    sys.modules["transformer_engine_torch"] = extension
    for name in _LEFT_OUT:
        sys.modules[f"transformer_engine.pytorch.{name}"] = _Absent(name)

    from tests.te import cpu_ops

    for name in cpu_ops.__all__:
        setattr(extension, name, getattr(cpu_ops, name))
    _answer_for_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the extension's file is not found: it is not looked for again
        import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    # It takes over the extension's names by `import *`, which finds only those that are listed.
    from transformer_engine.pytorch import cpp_extensions

    cpp_extensions.__getattr__ = lambda name: getattr(extension, name)


def _answer_for_cuda() -> None:
    cuda: Any = torch.cuda

    def answered() -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_ANSWERED)

    real_available, real_properties = cuda.is_available, cuda.get_device_properties
    tensor: Any = torch.Tensor
    real_capability, real_is_cuda = cuda.get_device_capability, tensor.is_cuda
    cuda.is_available = lambda: answered() or real_available()
    cuda.get_device_properties = lambda device=None: _Hopper if answered() else real_properties(device)
    cuda.get_device_capability = lambda device=None: (9, 0) if answered() else real_capability(device)
    tensor.is_cuda = property(lambda self: answered() or real_is_cuda.__get__(self))
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    cuda.device = lambda device: contextlib.nullcontext()
