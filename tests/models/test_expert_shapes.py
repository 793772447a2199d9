"""Mixtral-8x7B and Qwen3-235B-A22B by shape alone: every element is on one rank of a layout, and none is missing."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest

from fusemega.files.boxes import Box, volume
from fusemega.models.registry import architecture_of
from fusemega.models.rules import WeightRanks
from fusemega.models.stages import check_layout, stage_rules
from fusemega.runtime.layout import ParallelConfig
from tests.models.test_real_shapes import assert_tiles

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_window_layers": 94,
    "use_sliding_window": False,
    "sliding_window": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
PUBLISHED = {"Mixtral-8x7B": (MIXTRAL, 46_702_792_704), "Qwen3-235B-A22B": (QWEN3, 235_093_634_560)}
# TP, EP, expert TP, PP
LAYOUTS = [(1, 8, 1, 2), (2, 4, 1, 1), (4, 2, 2, 1), (2, 8, 2, 2), (4, 1, 4, 2)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert sum(map(math.prod, architecture_of(config).hf_shapes().values())) == parameters


@pytest.mark.parametrize(("tp", "ep", "expert_tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_element_is_on_exactly_one_rank(name: str, tp: int, ep: int, expert_tp: int, pp: int) -> None:
    config = PUBLISHED[name][0] | {"num_hidden_layers": 2}  # all layers are alike
    layout = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
    )
    architecture = architecture_of(config)
    check_layout(architecture, layout)
    places = WeightRanks.all_of(layout)
    assert len(set(places)) == len(places) == math.lcm(tp, ep * expert_tp)
    held: dict[str, set[Box]] = defaultdict(set)
    for pp_rank in range(pp):
        for rule in stage_rules(architecture, layout, pp_rank):
            holders = [place for place in places if rule.held_by(place)]
            parts = {rule.split(place) for place in holders}
            assert {part for part, _ in parts} == set(range(max(size for _, size in parts)))
            copies = len(places) // tp if rule.expert is None else 1
            assert len(holders) == copies * (tp if rule.expert is None else expert_tp)
            for place in holders:
                held_here = {(piece.hf, piece.hf_box) for piece in rule.pieces(place)}
                assert sum(volume(box) for _, box in held_here) == math.prod(rule.local_shape(place))
                for key, box in held_here:
                    held[key].add(box)
    shapes = architecture.hf_shapes()
    assert held.keys() == shapes.keys()
    for key, shape in shapes.items():
        assert_tiles(sorted(held[key]), shape, math.prod(shape))
