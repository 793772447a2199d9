"""Faults of megatron-core 0.16.1 itself, on any machine, and their mending. Paths are relative to `megatron/core`.

| fault | where | here |
|---|---|---|
| Optimizer states saved as `fully_reshardable` are shifted past the first bucket whose end is padded: buckets are joined without their padding, then cut at positions that count it. A tied embedding on two pipeline stages (always a bucket of its own) comes back as zeros. | optimizer/distrib_optimizer.py:1112 against :1500 | the padding is put back before the cut |
| A model under DistributedDataParallel is never freed, nor are its buffers, process groups and their threads: it keeps the gradient accumulators, whose hooks keep it, and Python's collector does not see through those nodes. | distributed/distributed_data_parallel.py:344 | the hooks hold it weakly |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


def apply() -> None:
    """Mend megatron-core in this process. Idempotent."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if DistributedOptimizer.get_parameter_state_dp_zero is not _parameter_state_at_buffer_positions:
        global _joined_state
        _joined_state = DistributedOptimizer.get_parameter_state_dp_zero
        DistributedOptimizer.get_parameter_state_dp_zero = _parameter_state_at_buffer_positions
    if DistributedDataParallel._make_backward_post_hook is not _weak_backward_post_hook:
        global _backward_post_hook
        _backward_post_hook = DistributedDataParallel._make_backward_post_hook
        DistributedDataParallel._make_backward_post_hook = _weak_backward_post_hook


_joined_state: Any = None
_backward_post_hook: Any = None


def _weak_backward_post_hook(ddp: Any, parameter: torch.nn.Parameter) -> Callable[..., None]:
    """`_make_backward_post_hook`, whose hook does not keep the model alive."""
    hook: Callable[..., None] = _backward_post_hook(weakref.proxy(ddp), parameter)
    return hook


def _parameter_state_at_buffer_positions(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """`get_parameter_state_dp_zero` with every element where `param_index_map` says it is in the buffer."""
    state = _joined_state(optimizer, *args, **kwargs)
    if state is None:
        return None
    for number, buffer in enumerate(optimizer.buffers):
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                tensors[name] = _spread(tensors[name], buffer)
    return state


def _spread(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    spread = joined.new_zeros(buffer.numel)
    taken = 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        spread[start : start + bucket.numel_unpadded] = joined[taken : taken + bucket.numel_unpadded]
        taken += bucket.numel_unpadded
    return spread
