"""What a resuming rank asks of the optimizer's state. That it is filled rightly: tests/distributed/test_training.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from fusemega.runtime import megatron_fixes
from fusemega.runtime.parallel import ParallelConfig, initialize

DP = 4
SIZES = {"embedding": 60, "q": 10, "norm": 2, "mlp": 40}
BUCKETS = {"embedding": 0, "q": 1, "norm": 1, "mlp": 1}
INDICES = [(0, 60), (60, 116)]  # the second is padded by 4


class Rank:
    """The DistributedOptimizer of one of DP ranks, as far as it is looked at: buckets are cut into DP equal shards."""

    def __init__(self, rank: int, params: dict[str, torch.nn.Parameter]) -> None:
        at, index_map, starts = 0, {}, {}
        for name, param in params.items():
            at = max(at, INDICES[BUCKETS[name]][0])
            index_map[param] = (at, at + SIZES[name], BUCKETS[name])
            starts[name] = at
            at += SIZES[name]
        shards = [(b + (e - b) // DP * rank, b + (e - b) // DP * (rank + 1)) for b, e in INDICES]
        held: list[dict[str, dict[Any, None]]] = [{"param_map": {}} for _ in INDICES]
        for name, param in params.items():
            low, high = shards[BUCKETS[name]]
            if starts[name] < high and starts[name] + SIZES[name] > low:
                held[BUCKETS[name]]["param_map"][param] = None
        self.gbuf_ranges = [{(torch.float32, torch.float32): held}]
        self.buffers = [
            SimpleNamespace(numel=116, numel_unpadded=112, param_index_map=index_map, bucket_indices=INDICES)
        ]
        self.data_parallel_group = SimpleNamespace(rank=lambda: rank, size=lambda: DP)


def test_a_resuming_rank_asks_for_what_it_holds_a_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    initialize(ParallelConfig())
    params = {name: torch.nn.Parameter(torch.empty(size)) for name, size in SIZES.items()}
    asked: dict[int, dict[int, int]] = {}
    for rank in range(DP):
        optimizer = Rank(rank, params)

        def everything(optimizer: Any, *_: Any, rank: int = rank) -> dict[int, dict[str, Any]]:
            empty = megatron_fixes._parameter_state_at_buffer_positions(optimizer, empty_data=True)
            (world,) = (tensors["exp_avg"] for tensors in empty[0].values())
            assert world.is_meta and world.numel() == 116
            return {
                i: {
                    "exp_avg": ShardedTensor.from_rank_offsets(
                        f"exp_avg.{name}", world[: SIZES[name]], replica_id=(0, 0, rank)
                    )
                }
                for i, name in enumerate(SIZES)
            }

        monkeypatch.setattr(megatron_fixes, "_reshardable_state", everything)
        state = megatron_fixes._state_of_own_parameters(optimizer, {}, is_loading=True)
        assert state is not None
        assert all(not part["exp_avg"].data.is_meta for part in state.values())
        asked[rank] = {number: part["exp_avg"].replica_id[-1] for number, part in state.items()}
    # Shards of 15 of the embedding; then of 14: q ends at 10, norm at 12, mlp at 52 of 56.
    assert asked == {0: {0: 0, 1: 0, 2: 0, 3: 0}, 1: {0: 1, 3: 1}, 2: {0: 2, 3: 2}, 3: {0: 3, 3: 3}}
