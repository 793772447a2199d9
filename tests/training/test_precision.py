"""A run that asks for FP8 where it cannot be had: one line, exit code 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fusemega import cli
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.models.registry import architecture_of
from fusemega.runtime import precision
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.precision import Precision
from fusemega.training.dry_run import describe
from fusemega.training.run_file import TrainRun

BF16 = {"dtype": "bf16"}


@pytest.fixture(autouse=True)
def without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "transformer_engine_problem", lambda: "Transformer Engine is not installed")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_the_command_ends_before_it_writes(
    options: list[str], make_run: Callable[..., TrainRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(make_run(model=BF16 | {"fp8": "hybrid"}).model_dump(mode="json")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(run_file), *options])
    assert stop.value.code == 2
    line = (
        "error: model.fp8: hybrid is not available: Transformer Engine is not installed; without fp8 the run is bf16\n"
    )
    assert capsys.readouterr().err == line
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_sizes_are_checked_with_the_files(make_run: Callable[..., TrainRun]) -> None:
    with pytest.raises(UserError, match=r"data.seq_length x training.micro_batch_size = 120 is not a multiple of 16"):
        make_run(model=BF16 | {"fp8": "hybrid"}, data={"seq_length": 120})
    blockwise = {"model": BF16 | {"fp8": "hybrid", "fp8_recipe": "blockwise"}, "data": {"seq_length": 256}}
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    with pytest.raises(UserError, match="blockwise needs multiples of 128 here, and the hidden size is 64"):
        describe(make_run(**blockwise, parallel=parallel), 2)


def test_experts_are_refused() -> None:
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = architecture_of({"model_type": "mixtral", **heads, **sizes}).transformer_config
    validate(Precision, {}, "model").check_layers(config, ParallelConfig())
    with pytest.raises(UserError, match=r"model\.fp8: hybrid, and this model has experts.*allowed: leave it out"):
        validate(Precision, {"fp8": "hybrid"}, "model").check_layers(config, ParallelConfig())


def test_dry_run_says_whose_layers(make_run: Callable[..., TrainRun]) -> None:
    assert "parameters, fp32, local layers" in describe(make_run(), 1)
