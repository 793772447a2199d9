"""Faults of megatron-core 0.16.1 itself, on any machine, and their fixes. Paths are relative to `megatron/core`.

| fault | where | here |
|---|---|---|
| Optimizer states saved as `fully_reshardable` are shifted past the first bucket whose end is padded: buckets are joined without their padding, then cut at positions that count it. A tied embedding on two pipeline stages (always a bucket of its own) comes back as zeros. | optimizer/distrib_optimizer.py:1112 against :1500 | gathered here, each bucket to its place in the buffer |
| That gathering holds several copies of the state, and its slices are copied once more to be written: 36 to 52 bytes a parameter. | optimizer/distrib_optimizer.py:1055, dist_checkpointing/strategies/filesystem_async.py:165 | one kind of state is gathered after the other, and each parameter's is a tensor of its own |
| A resumed run has the whole optimizer state in host memory on *every* data-parallel rank, 12 bytes a parameter, and reads all of it. | optimizer/distrib_optimizer.py:1452, :2097 | each rank asks for the parameters of which it holds a part |
| A model under DistributedDataParallel is never freed, nor are its buffers, process groups and their threads: it keeps the gradient accumulators, whose hooks keep it, and Python's collector does not see through those nodes. | distributed/distributed_data_parallel.py:344 | the hooks hold it weakly |
| A router without Transformer Engine fails: it looks for a function of it that is not there. | transformer/moe/moe_utils.py:1192 | the name is there, and is None |

Shape suffixes: N elements of a whole buffer, n of one rank's share of a bucket.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist


def apply() -> None:
    """Mend megatron-core in this process. Idempotent."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.moe import moe_utils

    if DistributedOptimizer.get_parameter_state_dp_zero is not _parameter_state_at_buffer_positions:
        DistributedOptimizer.get_parameter_state_dp_zero = _parameter_state_at_buffer_positions
        global _reshardable_state
        _reshardable_state = DistributedOptimizer.sharded_param_state_fully_reshardable
        DistributedOptimizer.sharded_param_state_fully_reshardable = _state_of_own_parameters
    if DistributedDataParallel._make_backward_post_hook is not _weak_backward_post_hook:
        global _backward_post_hook
        _backward_post_hook = DistributedDataParallel._make_backward_post_hook
        DistributedDataParallel._make_backward_post_hook = _weak_backward_post_hook
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


_STATES = ("param", "exp_avg", "exp_avg_sq")
_reshardable_state: Any = None
_backward_post_hook: Any = None


def _weak_backward_post_hook(ddp: Any, parameter: torch.nn.Parameter) -> Callable[..., None]:
    """`_make_backward_post_hook`, whose hook does not keep the model alive."""
    hook: Callable[..., None] = _backward_post_hook(weakref.proxy(ddp), parameter)
    return hook


def _parameter_state_at_buffer_positions(
    optimizer: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> Any:
    """`get_parameter_state_dp_zero` with every element where `param_index_map` says it is in the buffer.

    With `empty_data` it gives shapes alone, and `_state_of_own_parameters` allocates what is needed. Otherwise the
    first rank of the data-parallel group gets the state, and the others None.
    """
    if empty_data:
        return {number: _empty_state(buffer, optimizer.gbuf_ranges[number]) for number, buffer in _buffers(optimizer)}
    if return_on_all_ranks or not use_gloo_comm:
        raise RuntimeError("states are gathered on one rank, over gloo: distrib_optim_fully_reshardable_mem_efficient")
    return _gathered_state(optimizer)


class _Cut:
    """A buffer's parameters, each a tensor of its own, found by its place in the buffer.

    Slices of the buffer would keep it in memory, and would be copied again to be written.
    """

    def __init__(self, buffer_N: torch.Tensor, places: Iterable[tuple[int, int, int]]) -> None:
        self._parts = {(start, stop): buffer_N[start:stop].clone() for start, stop, _ in places}

    def __getitem__(self, place: slice) -> torch.Tensor:
        return self._parts[place.start, place.stop]


def _gathered_state(optimizer: Any) -> dict[int, dict[Any, dict[str, Any]]] | None:
    """The state in fp32 in host memory: 12 bytes a parameter, and while it is gathered 4 more and this rank's share of
    another 4."""
    group = optimizer.data_parallel_group_gloo
    size, first = dist.get_world_size(group), dist.get_process_group_ranks(group)[0]
    gathers = dist.get_rank(group) == 0
    state: dict[int, dict[Any, dict[str, Any]]] = {}
    for number, buffer in _buffers(optimizer):
        ((dtype, buckets),) = optimizer.gbuf_ranges[number].items()
        whole_N = torch.zeros(buffer.numel if gathers else 0, dtype=torch.float32)
        spare_n = torch.empty(max(stop - start for start, stop in buffer.bucket_indices) // size, dtype=torch.float32)
        tensors: dict[str, Any] = {"numel_unpadded": buffer.numel_unpadded}
        for key in _STATES:
            for (start, stop), ranges in zip(buffer.bucket_indices, buckets, strict=True):
                # Zeros, because padding of the bucket belongs to no parameter.
                share_n = spare_n[: (stop - start) // size].zero_()
                for param, maps in ranges["param_map"].items():
                    place = maps["gbuf_local"]
                    held = optimizer._get_main_param_and_optimizer_states(param)[key]
                    share_n[place.start : place.end].copy_(held.detach())
                parts = list(whole_N[start:stop].split(len(share_n))) if gathers else None
                dist.gather(share_n, parts, first, group)
            if gathers:
                tensors[key] = _Cut(whole_N, buffer.param_index_map.values())
        state[number] = {dtype: tensors}
    return state if gathers else None


def _buffers(optimizer: Any) -> Iterator[tuple[int, Any]]:
    yield from enumerate(optimizer.buffers)


def _empty_state(buffer: Any, ranges: Any) -> dict[Any, dict[str, Any]]:
    tensors = {key: torch.empty(buffer.numel, dtype=torch.float32, device="meta") for key in _STATES}
    return {dtype: {**tensors, "numel_unpadded": buffer.numel_unpadded} for dtype in ranges}


def _state_of_own_parameters(
    optimizer: Any, model_state: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]] | None:
    """`sharded_param_state_fully_reshardable`; for loading, only of the parameters of which this rank holds a part."""
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
                # The first rank that holds a part of it is replica 0, which alone counts when megatron-core checks
                # that shards are asked for once.
                first = (start - begin) // ((end - begin) // group.size())
                own[number] = {key: _to_be_filled(part, group.rank() - first) for key, part in state[number].items()}
            number += 1
    return own


def _to_be_filled(part: Any, replica: int) -> Any:
    """Gives memory to a ShardedTensor (or a factory of some) of shapes alone, as that of its `replica`-th holder."""
    data = torch.empty(part.data.shape, dtype=part.data.dtype, device="cpu")
    return replace(part, data=data, replica_id=(*part.replica_id[:-1], replica))
