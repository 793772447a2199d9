"""Megatron-core 0.16.1 on a machine without CUDA: CPU tensors and gloo process groups.

`enable()` is the only entry point. It is a no-op where CUDA works, edits no file of megatron-core, and
holds every workaround the project needs; the paths and lines below are those of the pinned version,
relative to `megatron/core`. `tests/runtime/test_cpu_backend.py` fails when the pin moves, so that the
list is read again against the new source.

What stops a CPU run, and what is done about it:

| in megatron-core | where | here |
|---|---|---|
| `torch.cuda.current_device()` | models/common/embeddings/rotary_pos_embedding.py:162; tensor_parallel/layers.py:552, mappings.py:141,181; utils.py:631; pipeline_parallel/p2p_communication.py:313,321; distributed/param_and_grad_buffer.py:800,806; optimizer/distrib_optimizer.py:791,1077; dist_checkpointing/strategies/state_dict_saver.py:252 | answers "cpu" |
| `torch.cuda.synchronize()`, streams | p2p_communication.py:398; strategies/filesystem_async.py:230; strategies/fully_parallel.py:272,281 | does nothing |
| the literal `device="cuda"` | pipeline_parallel/schedules.py:596,983,2138; optimizer/clip_grads.py:103,174; optimizer/optimizer.py:481,485,907; utils.py:1207; transformer/utils.py:35; dist_checkpointing/exchange_utils.py:110 | function mode |
| `.cuda()`, `pin_memory` | models/common/language_module/language_module.py:244; distrib_optimizer.py:1089; exchange_utils.py:499 | function mode |
| `t.type() == "torch.cuda.FloatTensor"` | distrib_optimizer.py:361,420,582; optimizer.py:671,690; clip_grads.py:167 | function mode, for callers in `megatron.core.optimizer` |
| CUDA random state | tensor_parallel/random.py:235,237,238,240,422,447,457 | the CPU generator |
| gradients reduced and weights gathered over one rank: gloo copies the whole buffer three times a step | distributed/param_and_grad_buffer.py:285,443 | left out |
| events on streams | transformer/moe/token_dispatcher.py:895 | done when they are recorded |
| how many tokens go to which rank, read from the device as an array | transformer/moe/moe_utils.py:1093 | an array also of tensors that are on the CPU |
| tokens of several ranks gathered, and their gradients scattered, in parts of unequal size, which gloo does not know | tensor_parallel/mappings.py:150,193 | parts are padded |
| weight gradients: made whole, then added to the main gradients; the fused form is apex's | tensor_parallel/layers.py:569 | `fuse_gradient_accumulation` |

Shape suffixes: T tokens, H input size of a linear layer, F its output size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fusemega.errors import UserError
from fusemega.runtime.memory import keep_freed_memory

MEGATRON_CORE_PIN = "0.16.1"


def enable() -> None:
    """Make megatron-core run on CPU tensors in this process. Idempotent; a no-op where CUDA is available.

    Raises:
        UserError: megatron-core is not the version these workarounds were written against.
    """
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    import megatron.core

    if megatron.core.__version__ != MEGATRON_CORE_PIN:
        raise UserError(
            f"megatron-core {megatron.core.__version__}: without CUDA, fusemega needs exactly {MEGATRON_CORE_PIN}; "
            f"pip install megatron-core=={MEGATRON_CORE_PIN}"
        )
    _patch_torch_cuda()
    _mode = _CudaLiteralsToCpu()
    _mode.__enter__()
    _keep_mode_in_backward()
    _patch_random()
    _patch_lone_collectives()
    _patch_token_counts()
    _patch_unequal_parts()
    keep_freed_memory()


_mode: _CudaLiteralsToCpu | None = None


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaLiteralsToCpu(TorchFunctionMode):
    """`device="cuda"` becomes "cpu", `t.cuda()` is `t`, and the optimizers see CUDA type names.

    Costs about 1.4 microseconds a torch call. It is per thread: worker threads are not covered.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
                return name.replace("torch.", "torch.cuda.", 1)
            return name
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


class _Stream(torch.cpu.Stream):
    """A stream on which everything is already done."""

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self) -> Any:
        return self  # which is as done as any event


def _patch_torch_cuda() -> None:
    # Lambdas rather than aliases of torch.cpu's functions: dynamo refuses one function under two names.
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda s: torch.cpu.stream(s)
    cuda.Stream = _Stream
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _keep_mode_in_backward() -> None:
    # torch.autograd.backward is itself overridable, so a function mode is popped while it runs; enter it again for
    # what runs inside: recomputed forwards, backwards of custom functions, DDP's hooks.
    engine: Callable[..., Any] = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _CudaLiteralsToCpu():
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward


def _patch_random() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Megatron's named random states, forked on the CPU generator."""

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise RuntimeError(f"random state {name!r} has not been added to the tracker")
            outer, outer_name = torch.get_rng_state(), self._current_state_name  # type: ignore[has-type]
            if outer_name != "default-rng":
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_[outer_name] if outer_name != "default-rng" else outer)
                self._current_state_name = outer_name

    patched: Any = megatron_random
    patched._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    patched._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    patched._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _without_lone_rank(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `collective` (all-gather or reduce-scatter) to do nothing over one rank, from a buffer to itself."""

    def run(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is not None and group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return run


def _patch_lone_collectives() -> None:
    from megatron.core.distributed import param_and_grad_buffer

    patched: Any = param_and_grad_buffer
    patched.dist_all_gather_func = _without_lone_rank(patched.dist_all_gather_func)
    patched.dist_reduce_scatter_func = _without_lone_rank(patched.dist_reduce_scatter_func)


def _patch_token_counts() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def counts_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and tensor.is_cpu:
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    patched: Any = token_dispatcher
    patched.maybe_move_tensor_to_cpu = counts_on_host


def _patch_unequal_parts() -> None:
    from megatron.core.tensor_parallel import mappings

    patched: Any = mappings
    gather, reduce_scatter = patched._gather_along_first_dim, patched._reduce_scatter_along_first_dim

    def padded(part: torch.Tensor, size: int) -> torch.Tensor:
        out = part.new_zeros(size, *part.shape[1:])
        out[: len(part)] = part
        return out

    def gather_parts(part: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return gather(part, group, sizes, use_global_buffer)
        found = gather(padded(part, max(sizes)), group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    def scatter_parts(whole: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return reduce_scatter(whole, group, sizes, use_global_buffer)
        parts = torch.cat([padded(part, max(sizes)) for part in whole.split(list(sizes))])
        return reduce_scatter(parts, group)[: sizes[group.rank()]]

    patched._gather_along_first_dim, patched._reduce_scatter_along_first_dim = gather_parts, scatter_parts


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """From now on `model`'s linear layers add to their weights' main gradients as they multiply. A no-op with CUDA.

    For a model that DistributedDataParallel wraps, which gives the weights their main gradients.
    """
    if _mode is None:
        return
    from megatron.core.tensor_parallel import layers

    patched: Any = layers
    patched.fused_weight_gradient_mlp_cuda = _WeightGradients
    for module in model.modules():
        if isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            module.gradient_accumulation_fusion = True


class _WeightGradients:
    """Stands in for apex's module `fused_weight_gradient_mlp_cuda`, of which megatron-core calls this function."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TH: torch.Tensor, d_output_TF: torch.Tensor, main_grad_FH: torch.Tensor) -> None:
        if input_TH.dtype == main_grad_FH.dtype:
            main_grad_FH.addmm_(d_output_TF.t(), input_TH)
        else:
            main_grad_FH.add_(d_output_TF.t() @ input_TH)
