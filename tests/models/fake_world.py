"""Megatron's own parameters of chosen ranks at published sizes, built on the meta device in one process.

    fake_world.py CASES    with CASES a JSON list of [model name, TP, PP, virtual PP, rank, sequence parallel]

A fake process group answers for the other ranks. Prints one JSON list: of each case, [parameter name with the global
layer number, shape, split over TP or not] in the model's order. `placements` has held shapes against the rules.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusemega.models.build import build_model, placements
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import ParallelConfig, initialize, shutdown
from tests.models.published import PUBLISHED


def parameters(name: str, tp: int, pp: int, vpp: int | None, rank: int, sequence_parallel: bool) -> list[Any]:
    """What Megatron builds on this rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tp * pp)}  # as a launcher would have set them
    sizes: dict[str, Any] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    sizes |= {"virtual_pipeline_model_parallel_size": vpp, "overlap_p2p_comm": vpp is not None}
    try:
        world = initialize(ParallelConfig(**sizes, sequence_parallel=sequence_parallel))
        with torch.device("meta"):
            model = build_model(
                architecture_of(PUBLISHED[name]), replace(world, device=torch.device("meta")), torch.bfloat16
            )
        assert all(parameter.is_meta for parameter in model.parameters())
        return [
            [p.rule.megatron, list(p.parameter.shape), getattr(p.parameter, "tensor_model_parallel", False)]
            for p in placements(model, world)
        ]
    finally:
        shutdown()


if __name__ == "__main__":
    # Megatron adds gloo twins of some groups, which only a real group can have.
    parallel_state.initialize_model_parallel = partial(
        parallel_state.initialize_model_parallel, create_gloo_process_groups=False
    )
    print(json.dumps([parameters(*case) for case in json.loads(sys.argv[1])]))
