"""The verbs of `fusemega convert`, called as the command line calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusemega.cli import convert
from fusemega.errors import UserError
from fusemega.files.sizes import parse_size
from fusemega.runtime import parallel
from tests.checkpoint.conftest import save_llama


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(parallel, "shutdown", lambda: None)  # the process group serves the other tests too
    return CliRunner()


def test_import_export_verify(runner: CliRunner, tmp_path: Path) -> None:
    source, megatron, out = save_llama(tmp_path / "source"), tmp_path / "megatron", tmp_path / "out"
    assert runner.invoke(convert.app, ["import", str(source), str(megatron)]).exit_code == 0
    done = runner.invoke(convert.app, ["export", str(megatron), str(out), "--max-shard-size", "20KB", "--workers", "1"])
    assert done.exit_code == 0 and done.stdout.startswith(f"wrote {out}: ")
    assert re.search(r"kB in \d+\.\d s \([\d.]+ [kM]B/s\), peak memory [\d.]+ [MG]B in 1 process\n$", done.stdout)
    assert len(list(out.glob("*.safetensors"))) == 5
    done = runner.invoke(convert.app, ["verify", str(source), str(out)])
    assert done.exit_code == 0 and json.loads(done.output)["identical"] is True
    half = tmp_path / "half"
    assert runner.invoke(convert.app, ["export", str(megatron), str(half), "--dtype", "bfloat16"]).exit_code == 0
    done = runner.invoke(convert.app, ["verify", str(source), str(half)])
    assert done.exit_code == 1 and len(json.loads(done.output)["different"]) == 21


@pytest.mark.parametrize("as_file", [False, True])
def test_verify_on_a_text(runner: CliRunner, tmp_path: Path, smollm2_folder: Path, as_file: bool) -> None:
    text = "Paris is the capital of France. " * 2
    if as_file:
        (tmp_path / "text.txt").write_text(text)
    argument = str(tmp_path / "text.txt") if as_file else text
    done = runner.invoke(convert.app, ["verify", str(smollm2_folder), str(smollm2_folder), "--text", argument])
    assert done.exit_code == 0 and json.loads(done.stdout)["max_logit_difference"] == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "Paris", "--tensor-model-parallel-size", "2"], "this layout needs 2 processes; give --nproc 2"),
        (["--tensor-model-parallel-size", "2"], "need --text; files are compared by --workers"),
        (["--nproc", "2"], "need --text; files are compared by --workers"),
    ],
)
def test_verify_names_nproc(runner: CliRunner, tmp_path: Path, options: list[str], words: str) -> None:
    done = runner.invoke(convert.app, ["verify", "a", str(tmp_path / "b"), *options])
    assert isinstance(done.exception, UserError) and words in str(done.exception)


def test_only_one_rank_of_a_launcher_converts(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    done = runner.invoke(convert.app, ["import", str(save_llama(tmp_path / "source")), str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (0, "") and not (tmp_path / "out").exists()


def test_dry_runs_print_what_each_rank_would_read_and_write_nothing(runner: CliRunner, tmp_path: Path) -> None:
    source, megatron, out = save_llama(tmp_path / "source"), tmp_path / "megatron", tmp_path / "out"
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--dry-run"]
    done = runner.invoke(convert.app, ["import", str(source), str(megatron), *layout])
    assert done.exit_code == 0, done.output
    assert "4 rank(s) read" in done.output and f"of weights to {megatron}" in done.output
    assert not megatron.exists()
    runner.invoke(convert.app, ["import", str(source), str(megatron)])
    done = runner.invoke(convert.app, ["export", str(megatron), str(out), "--max-shard-size", "20KB", *layout])
    assert "would write 21 tensors" in done.output and "in 5 file(s)" in done.output
    assert not out.exists()
    wide = ["--tensor-model-parallel-size", "3", "--dry-run"]
    for arguments in (["import", str(source), str(out)], ["export", str(megatron), str(out)]):
        assert "does not divide this model's" in str(runner.invoke(convert.app, [*arguments, *wide]).exception)
    for arguments in (["import", str(source), str(source)], ["export", str(megatron), str(source)]):
        assert "not an empty folder" in str(runner.invoke(convert.app, [*arguments, "--dry-run"]).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "m", "o", "--dtype", "bfloat"], "--dtype: unknown name 'bfloat' (did you mean 'bfloat16'?)"),
        (["export", "m", "o", "--max-shard-size", "5"], "--max-shard-size: found '5'; expected"),
        (["export", "m", "o", "--max-shard-size", "0GB"], "--max-shard-size: found '0GB'; expected"),
        (["import", "./m", "o"], "m: no such model folder"),
        (["export", "./m", "o"], "m/manifest.json: cannot read: No such file"),
        (["import", "./m", "o", "--tensor-model-parallel-size", "2"], "need --dry-run"),
    ],
)
def test_mistakes(runner: CliRunner, arguments: list[str], message: str) -> None:
    result = runner.invoke(convert.app, arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 500 * 10**6), ("20KB", 20_000)])
def test_sizes_are_decimal(text: str, size: int) -> None:
    assert parse_size("--max-shard-size", text) == size
