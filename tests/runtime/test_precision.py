"""FP8 and whose layers: what a run file may ask for, and what this machine refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.runtime import precision
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.runtime.precision import LOCAL, Kernels, Precision
from fusemega.runtime.specs import block_spec

WIDTHS = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
}
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": "hybird"}, r"fp8: found 'hybird' \(did you mean 'hybrid'\?\); allowed: hybrid, e4m3"),
        ({"fp8": "hybrid", "fp8_recipe": "blokwise"}, r"found 'blokwise' \(did you mean 'blockwise'\?\)"),
        ({"fp8": "hybrid", "fp8_recipe": "custom"}, "fp8_recipe: found 'custom'.*allowed: delayed, tensorwise"),
        ({"transformer_impl": "te"}, "allowed: auto, local, transformer_engine"),
        ({"fp8_recipe": "tensorwise"}, "fp8_recipe has no effect without fp8"),
        ({"fp8_margin": 0}, "fp8_margin has no effect without fp8"),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_amax_history_len": 4}, "effect with fp8_recipe blockwise"),
        ({"fp8": "hybrid", "fp8_amax_history_len": 0}, "greater than or equal to 1"),
        ({"fp8": "hybrid", "transformer_impl": "local"}, "local layers would ignore it"),
        ({"fp8": "hybrid", "dtype": "fp32"}, "fp8 needs dtype bf16"),
        ({"transformer_impl": "transformer_engine", "dtype": "fp32"}, "multiplies fp32 in TF32"),
    ],
)
def test_run_files_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate(Precision, settings, "run.yaml")
    assert "\n" not in str(error.value)


def test_a_dumped_section_is_valid_again() -> None:
    for settings in ({}, {"fp8": "hybrid", "fp8_recipe": "blockwise"}, {"fp8": "e4m3", "fp8_margin": 1}):
        section = validate(Precision, settings, "test")
        assert validate(Precision, section.model_dump(mode="json"), "test") == section


def test_without_transformer_engine_fp8_is_refused_and_auto_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "transformer_engine_problem", lambda: "it is not there")
    assert validate(Precision, {}, "test").kernels() == LOCAL
    with pytest.raises(UserError, match="model.fp8: hybrid is not available: it is not there"):
        validate(Precision, {"fp8": "hybrid"}, "test").kernels()
    with pytest.raises(UserError, match="model.transformer_impl: it is not there; allowed here: auto, local"):
        validate(Precision, {"transformer_impl": "transformer_engine"}, "test").kernels()


def test_a_recipe_the_gpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "transformer_engine_problem", lambda: None)
    monkeypatch.setattr(precision, "recipe_problem", lambda recipe: "too old" if recipe == "mxfp8" else None)
    with pytest.raises(
        UserError, match="mxfp8 cannot run on this GPU: too old; allowed here: delayed, tensorwise, blockwise"
    ):
        validate(Precision, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, "test").kernels()
    kernels = validate(Precision, {"fp8": "e4m3"}, "test").kernels()
    assert kernels == Kernels(transformer_engine=True, fp8={"fp8": "e4m3", "fp8_recipe": "delayed"})
    assert str(kernels) == "Transformer Engine's layers, FP8 e4m3 (delayed)" and str(LOCAL) == "local layers"


@pytest.mark.parametrize(
    ("recipe", "change", "parallel", "words"),
    [
        ("delayed", {"hidden_size": 136}, ParallelConfig(), "multiples of 16 here, and the hidden size is 136"),
        ("mxfp8", {"hidden_size": 144}, ParallelConfig(), "multiples of 32 here, and the hidden size is 144"),
        ("tensorwise", {"ffn_hidden_size": 272}, TP2_SP, "the feed-forward size of a tensor-parallel rank is 136"),
        ("delayed", {"kv_channels": 2}, TP2_SP, "the width of a tensor-parallel rank's heads is 8"),
        ("delayed", {"num_query_groups": 1, "kv_channels": 12}, ParallelConfig(), "queries, keys and values is 120"),
        ("blockwise", {"hidden_size": 192}, TP2_SP, "multiples of 128 here, and the hidden size is 192"),
    ],
)
def test_widths_fp8_cannot_multiply(recipe: str, change: dict[str, int], parallel: ParallelConfig, words: str) -> None:
    section = validate(Precision, {"fp8": "hybrid", "fp8_recipe": recipe}, "test")
    section.check_layers(WIDTHS, parallel)
    with pytest.raises(UserError, match=words):
        section.check_layers(WIDTHS | change, parallel)
    validate(Precision, {}, "test").check_layers(WIDTHS | change, parallel)


@pytest.mark.parametrize(
    ("recipe", "parallel", "unit"),
    [
        ("delayed", ParallelConfig(), 16),
        ("mxfp8", ParallelConfig(), 32),
        ("blockwise", ParallelConfig(), 16),
        ("tensorwise", TP2_SP, 32),
        ("blockwise", TP2_SP, 256),
    ],
)
def test_rows_fp8_cannot_multiply(recipe: str, parallel: ParallelConfig, unit: int) -> None:
    section = validate(Precision, {"fp8": "hybrid", "fp8_recipe": recipe}, "test")
    section.check_row(3 * unit, "tokens", parallel)
    with pytest.raises(ValueError, match=f"tokens = {unit + unit // 2} is not a multiple of {unit}, which .*{recipe}"):
        section.check_row(unit + unit // 2, "tokens", parallel)
    validate(Precision, {}, "test").check_row(unit + 1, "tokens", parallel)


def test_why_it_is_refused_megatron_core_ignores_fp8_without_transformer_engine() -> None:
    initialize(ParallelConfig())
    outputs = []
    for settings in ({}, {"fp8": "nonsense", "fp8_recipe": "nonsense"}):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            use_cpu_initialization=True,
            normalization="RMSNorm",
            add_bias_linear=False,
            **LOCAL.transformer_config(),
            **settings,
        )
        torch.manual_seed(0)
        model = GPTModel(config, block_spec(config), 64, 32, position_embedding_type="rope")
        ids = torch.arange(16)[None]
        outputs.append(model(ids, ids, None))
    assert torch.equal(*outputs)
