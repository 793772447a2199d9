"""A run's folder, a store and a result have one writer; what stands there and is something else stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.scoring.evaluate import EvalRun, check_output, evaluate
from fusemega.scoring.teach import TeachRun, teach
from fusemega.training.assembly import train
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]


@contextmanager
def _held_elsewhere(path: Path) -> Iterator[None]:
    """Another process writes the output `path`."""
    ready, told = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        with locked(path):
            os.write(told, b"1")
            os.read(wait, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        yield
    finally:
        os.close(end)
        os.waitpid(child, 0)


def _commands(make_run: MakeRun, work: Path, tmp_path: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Command -> its output, and a call of it."""
    inputs: dict[str, Any] = {"model": {"load": str(work / "model"), "dtype": "fp32"}}
    inputs |= {"data": {"path": str(work / "chat.jsonl"), "seq_length": 128}}
    store, result = tmp_path / "store", tmp_path / "result.json"
    taught = validate(TeachRun, {**inputs, "store": str(store)}, "test")
    scored = validate(EvalRun, {**inputs, "output": str(result)}, "test")

    def eval_() -> None:
        with ExitStack() as held:
            evaluate(scored, held)

    return {
        "train": (tmp_path / "run", lambda: train(make_run(training={"train_iters": 1}))),
        "teach": (store, lambda: teach(taught)),
        "eval": (result, eval_),
    }


@pytest.mark.parametrize("command", ["train", "teach", "eval"])
def test_a_second_writer_is_refused(command: str, make_run: MakeRun, work: Path, tmp_path: Path) -> None:
    output, run = _commands(make_run, work, tmp_path)[command]
    words = rf"^{output}: another process is writing it \(process"
    with _held_elsewhere(output), pytest.raises(UserError, match=words):
        run()
    assert not output.exists()


def test_a_result_replaces_results_alone(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    check_output(result)
    found = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5, "samples": 1, "tokens": 2, "bytes": 3}
    result.write_text(json.dumps(found))
    check_output(result)
    for other in ('{"loss": 1.0}', "notes", "[]"):
        result.write_text(other)
        with pytest.raises(UserError, match=r"result\.json: exists and is not a result of an evaluation"):
            check_output(result)
        assert result.read_text() == other


def test_the_record_is_of_the_run_that_goes_on(make_run: MakeRun, tmp_path: Path) -> None:
    """A run that is refused leaves it as it was; one that goes on, with what may change, writes its own."""
    record = tmp_path / "run" / "run.json"
    assert train(make_run(training={"train_iters": 1})) == 0
    before = record.read_text()
    assert json.loads(before)["run"]["training"]["train_iters"] == 1
    with pytest.raises(UserError, match="cannot resume"):
        train(make_run(training={"train_iters": 1, "seed": 7}))
    assert record.read_text() == before
    assert train(make_run(training={"train_iters": 1, "log_interval": 3})) == 0
    assert json.loads(record.read_text())["run"]["training"]["log_interval"] == 3
    record.write_text('{"something": "else"}')
    with pytest.raises(UserError, match=r"run\.json: not the record of a training run"):
        train(make_run(training={"train_iters": 1}))
    assert record.read_text() == '{"something": "else"}'
