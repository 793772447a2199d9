"""Faults of megatron-core 0.16.1 itself, on any machine, and their mending. Paths are relative to `megatron/core`.

| fault | where | here |
|---|---|---|
| Optimizer states saved as `fully_reshardable` are shifted past the first bucket whose end is padded: buckets are joined without their padding, then cut at positions that count it. A tied embedding on two pipeline stages (always a bucket of its own) comes back as zeros. | optimizer/distrib_optimizer.py:1112 against :1500 | the padding is put back before the cut |
| A resumed run has the whole optimizer state in host memory on *every* data-parallel rank, 12 bytes a parameter, and reads all of it. | optimizer/distrib_optimizer.py:1452, :2097 | each rank asks for the parameters of which it holds a part |
| A model under DistributedDataParallel is never freed, nor are its buffers, process groups and their threads: it keeps the gradient accumulators, whose hooks keep it, and Python's collector does not see through those nodes. | distributed/distributed_data_parallel.py:344 | the hooks hold it weakly |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
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
        global _reshardable_state
        _reshardable_state = DistributedOptimizer.sharded_param_state_fully_reshardable
        DistributedOptimizer.sharded_param_state_fully_reshardable = _state_of_own_parameters
    if DistributedDataParallel._make_backward_post_hook is not _weak_backward_post_hook:
        global _backward_post_hook
        _backward_post_hook = DistributedDataParallel._make_backward_post_hook
        DistributedDataParallel._make_backward_post_hook = _weak_backward_post_hook


_joined_state: Any = None
_reshardable_state: Any = None
_backward_post_hook: Any = None


def _weak_backward_post_hook(ddp: Any, parameter: torch.nn.Parameter) -> Callable[..., None]:
    """`_make_backward_post_hook`, whose hook does not keep the model alive."""
    hook: Callable[..., None] = _backward_post_hook(weakref.proxy(ddp), parameter)
    return hook


def _parameter_state_at_buffer_positions(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """`get_parameter_state_dp_zero` with every element where `param_index_map` says it is in the buffer.

    With `empty_data`, shapes alone: `_state_of_own_parameters` makes what is needed.
    """
    if kwargs.get("empty_data"):
        return {number: _empty_state(buffer, optimizer.gbuf_ranges[number]) for number, buffer in _buffers(optimizer)}
    state = _joined_state(optimizer, *args, **kwargs)
    if state is None:
        return None
    for number, buffer in _buffers(optimizer):
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                tensors[name] = _spread(tensors[name], buffer)
    return state


def _buffers(optimizer: Any) -> Iterator[tuple[int, Any]]:
    yield from enumerate(optimizer.buffers)


def _empty_state(buffer: Any, ranges: Any) -> dict[Any, dict[str, Any]]:
    keys = ("param", "exp_avg", "exp_avg_sq")
    tensors = {key: torch.empty(buffer.numel, dtype=torch.float32, device="meta") for key in keys}
    return {dtype: {**tensors, "numel_unpadded": buffer.numel_unpadded} for dtype in ranges}


def _state_of_own_parameters(
    optimizer: Any, model_state: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]] | None:
    """`sharded_param_state_fully_reshardable`; to load, of the parameters of which this rank holds a part."""
    state = _reshardable_state(optimizer, model_state, is_loading, metadata)
    if not is_loading:
        return state
    group = optimizer.data_parallel_group
    own: dict[int, dict[str, Any]] = {}
    number = 0  # as megatron-core counts parameters
    for index, buffer in _buffers(optimizer):
        held = {p for maps in optimizer.gbuf_ranges[index].values() for bucket in maps for p in bucket["param_map"]}
        for param, (start, _, bucket) in buffer.param_index_map.items():
            if param in held:
                begin, end = buffer.bucket_indices[bucket]
                # Of its holders the first stands for all when megatron-core checks that shards are asked for once.
                first = (start - begin) // ((end - begin) // group.size())
                own[number] = {key: _to_be_filled(part, group.rank() - first) for key, part in state[number].items()}
            number += 1
    return own


def _to_be_filled(part: Any, replica: int) -> Any:
    """A ShardedTensor (or a factory of some) of shapes alone, with memory, as the `replica`-th of its holders."""
    data = torch.empty(part.data.shape, dtype=part.data.dtype, device="cpu")
    return replace(part, data=data, replica_id=(*part.replica_id[:-1], replica))


def _spread(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    spread = joined.new_zeros(buffer.numel)
    taken = 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        spread[start : start + bucket.numel_unpadded] = joined[taken : taken + bucket.numel_unpadded]
        taken += bucket.numel_unpadded
    return spread
