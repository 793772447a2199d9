"""Which stage holds which layers, and the layouts that do not divide a model."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from fusemega.errors import UserError
from fusemega.models.registry import architecture_of
from fusemega.models.stages import balanced, check_layout, layers_of_stages, stage_layers, stage_rules
from fusemega.runtime.layout import ParallelConfig
from tests.models.test_build import CONFIG


def layout(
    tp: int = 1, pp: int = 1, vpp: int | None = None, first: int | None = None, last: int | None = None
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        overlap_p2p_comm=vpp is not None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 8}, ["tensor_model_parallel_size: 8", "4 attention heads", "2 key/value heads", "allowed: 1, 2, 4"]),
        ({"tp": 3}, ["tensor_model_parallel_size: 3", "4 attention heads", "allowed: 1, 2, 4"]),
        ({"pp": 4}, ["pipeline_model_parallel_size: 4", "2 layers", "allowed: 1, 2"]),
        ({"pp": 2, "vpp": 2}, ["virtual_pipeline_model_parallel_size: 2", "1 layers of stage 0", "allowed: none"]),
        ({"pp": 2, "first": 2}, ["first_pipeline_stage 2 leave 0", "1 other", "a positive multiple of 1"]),
        ({"pp": 2, "first": 1, "last": 2}, ["in_last_pipeline_stage 2 leave -1", "0 other stage", "what leaves 0"]),
        ({"pp": 2, "last": 3}, ["num_layers_in_last_pipeline_stage: ", "leave -1 of this model's 2 layers"]),
    ],
)
def test_layouts_that_do_not_divide_are_refused(sizes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_layout(architecture_of(CONFIG), layout(**sizes))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_middle_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="leave 5 of this model's 8 layers to the 2 other"):
        stage_layers(8, layout(pp=3, first=3))
    with pytest.raises(UserError, match="2 does not divide the 3 layers of stage 1; allowed: 3"):
        stage_layers(5, layout(pp=2, vpp=2, first=2))


def test_ranks_that_share_a_key_value_head_are_as_many_for_each() -> None:
    sizes = {"head_dim": 12, "num_attention_heads": 12, "intermediate_size": 48}
    for groups, allowed in ((1, [1, 2, 3, 4, 6, 12]), (2, [1, 2, 4, 6, 12]), (3, [1, 3, 6, 12]), (6, [1, 2, 3, 6, 12])):
        architecture = architecture_of(CONFIG | sizes | {"num_key_value_heads": groups})
        with pytest.raises(UserError, match=f"allowed: {', '.join(map(str, allowed))}$"):
            check_layout(architecture, layout(5))
    odd = CONFIG | {"num_key_value_heads": 1, "head_dim": 2, "num_attention_heads": 8}  # 20 rows
    with pytest.raises(UserError, match="allowed: 1, 2, 4$"):
        check_layout(architecture_of(odd), layout(8))


def test_real_smollm2_takes_the_quickstart_layout() -> None:
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    check_layout(architecture_of(CONFIG | sizes), layout(3, 2))


def test_pieces_of_stages_take_turns() -> None:
    assert stage_layers(8, layout(pp=2, vpp=2)) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert stage_layers(6, layout(pp=2, vpp=2, first=2)) == [[range(0, 1), range(3, 4)], [range(1, 3), range(4, 6)]]
    assert stage_layers(7, layout(pp=3, first=1, last=2)) == [[range(0, 1)], [range(1, 5)], [range(5, 7)]]


LAYOUTS = [
    (12, {"pp": 1}),
    (12, {"pp": 4}),
    (12, {"pp": 2, "vpp": 3}),
    (12, {"pp": 3, "vpp": 2}),
    (12, {"pp": 3, "first": 2}),
    (12, {"pp": 3, "last": 6}),
    (12, {"pp": 4, "first": 1, "last": 3}),
    (12, {"pp": 4, "vpp": 2, "first": 2, "last": 2}),
    (12, {"pp": 2, "first": 5}),
    (12, {"pp": 2, "vpp": 2, "last": 8}),
]


@pytest.mark.parametrize(("layers", "sizes"), LAYOUTS)
def test_megatron_numbers_the_layers_so(layers: int, sizes: dict[str, int]) -> None:
    chosen = layout(**sizes)
    virtual = chosen.virtual_pipeline_model_parallel_size
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        pipeline_model_parallel_size=chosen.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=chosen.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=chosen.num_layers_in_last_pipeline_stage,
        pipeline_dtype=torch.float32,
    )
    for rank, pieces in enumerate(stage_layers(layers, chosen)):
        for number, piece in enumerate(pieces):
            stage = None if virtual is None else number
            start = get_transformer_layer_offset(config, stage, rank)
            assert piece == range(start, start + get_num_layers_to_build(config, stage, rank))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_largest_of_balanced_stages_is_as_small_as_can_be(parts: int) -> None:
    for seed in range(20):
        sizes = torch.randint(1, 9, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        cuts = [(0, *inner, 6) for inner in combinations(range(1, 6), parts - 1)]
        wanted = min(max(sum(sizes[a:b]) for a, b in pairwise(cut)) for cut in cuts)
        runs = balanced(sizes, parts)
        assert [n for run in runs for n in run] == list(range(6)) and all(runs)
        assert max(sum(sizes[n] for n in run) for run in runs) == wanted


def test_stages_of_unlike_layers_have_about_as_many_parameters() -> None:
    no_mlp = {"ffn": {"no_op": True}}
    pruned = architecture_of(CONFIG | {"num_hidden_layers": 5, "block_configs": [no_mlp, no_mlp, no_mlp, {}, {}]})
    assert layers_of_stages(pruned, layout(pp=2)) == [[range(3)], [range(3, 5)]]
    assert layers_of_stages(pruned, layout(pp=2, first=2)) == [[range(2)], [range(2, 5)]]
    assert layers_of_stages(architecture_of(CONFIG), layout(pp=2)) == [[range(1)], [range(1, 2)]]
    with pytest.raises(UserError, match="6 stages of 1 piece.s. need 6 layers, and this model has 5"):
        check_layout(pruned, layout(pp=6))


def test_every_parameter_is_on_the_stage_of_its_layer() -> None:
    config: dict[str, Any] = CONFIG | {"num_hidden_layers": 6}
    chosen = layout(pp=2, vpp=2, first=2)
    held = [{rule.megatron for rule in stage_rules(architecture_of(config), chosen, rank)} for rank in (0, 1)]
    layers = [{int(name.split(".")[2]) for name in names if ".layers." in name} for names in held]
    assert layers == [{0, 3}, {1, 2, 4, 5}]
    assert "embedding.word_embeddings.weight" in held[0] - held[1]
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= held[1] - held[0]


@pytest.mark.parametrize(
    ("change", "parallel", "words"),
    [
        ({}, {"expert_model_parallel_size": 3}, "3 does not divide this model's 8 experts; allowed: 1, 2, 4, 8"),
        ({}, {"expert_tensor_parallel_size": 5}, "5 does not divide this model's 48 as the feed-forward size"),
        ({}, {"tensor_model_parallel_size": 2}, "parallel.sequence_parallel: a model with experts needs it"),
        ({"model_type": "mistral"}, {"expert_model_parallel_size": 2}, "this model has no experts; allowed: 1"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1], "moe_intermediate_size": 8, "num_experts": 8},
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2},
            "stage 0 of 2 would have no layer with experts",
        ),
    ],
)
def test_layouts_that_do_not_fit_experts(change: dict[str, Any], parallel: dict[str, Any], words: str) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = {"model_type": "mixtral", "num_attention_heads": 4, **sizes, **change}
    if config["model_type"] == "mistral":
        config["num_key_value_heads"] = 4
    with pytest.raises(UserError, match=re.escape(words)):
        check_layout(architecture_of(config | {"num_key_value_heads": 4}), ParallelConfig(**parallel))


def test_worlds_that_experts_do_not_divide() -> None:
    layout = ParallelConfig(expert_model_parallel_size=4, pipeline_model_parallel_size=2)
    assert layout.model_parallel_size == 8 and layout.data_parallel_size(8) == 4
    with pytest.raises(UserError, match="expert_model_parallel_size 4 x .* = 8 does not divide the 4 process"):
        layout.data_parallel_size(4)
    split = ParallelConfig(tensor_model_parallel_size=4, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    assert split.model_parallel_size == 4 and str(split) == "TP 4 x EP 2 x ETP 2 x PP 1"
