"""`fusemega tasks` from the run file to tasks.json, with a real model; interrupted, gone on with, and refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusemega import cli
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.sampling.engine import Missing, Response
from fusemega.sampling.engines import TransformersSettings, open_engine
from fusemega.sampling.transformers_engine import TransformersEngine
from fusemega.tasks import lm_eval
from fusemega.tasks.run import run_tasks
from fusemega.tasks.run_file import TasksRun
from tests.sampling import server

QUESTIONS = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(7)]


@pytest.fixture
def run(work: Path, tmp_path: Path) -> dict[str, Any]:
    """Two tasks that ask and two that read log-probabilities, of a tiny model."""
    rows = [json.loads(line)["messages"] for line in (work / "chat.jsonl").read_text().splitlines()][:5]
    pairs = [
        {"prompt": row[:1], "chosen": row[1:2], "rejected": other[1:2]}
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    instructions = [{"instruction": row[0]["content"], "dataset": "koala"} for row in rows[:3]]
    for name, content in (("maths", QUESTIONS), ("pairs", pairs), ("alpaca", instructions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return {
        "engine": {"name": "transformers", "load": str(work / "model"), "dtype": "fp32", "batch_size": 2},
        "sampling": {"max_tokens": 6},
        "tasks": {
            "maths": {"name": "gsm8k", "data": {"path": str(tmp_path / "maths.jsonl")}},
            "several": {
                "name": "gsm8k",
                "data": {"path": str(tmp_path / "maths.jsonl"), "limit": 2},
                "sampling": {"n": 3, "temperature": 1.0, "max_tokens": 6},
            },
            "pairs": {"name": "pairs", "data": {"path": str(tmp_path / "pairs.jsonl"), "seq_length": 256}},
            "text": {
                "name": "bits_per_byte",
                "data": {"path": str(work / "chat.jsonl"), "limit": 4, "seq_length": 128},
            },
            "alpaca": {"name": "alpaca_eval", "data": {"path": str(tmp_path / "alpaca.jsonl")}},
        },
        "output_dir": str(tmp_path / "out"),
    }


class Interrupted(Exception):
    pass


class Breaking:
    """A real engine that ends after some responses; counts what it gives."""

    def __init__(self, settings: TransformersSettings, after: int) -> None:
        engine = open_engine(settings)
        assert isinstance(engine, TransformersEngine)
        self._engine, self._left, self.given = engine, after, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any) -> Iterator[Response]:
        for response in self._engine.generate(*arguments):
            if not self._left:
                raise Interrupted
            self._left -= 1
            self.given += 1
            yield response


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(run: dict[str, Any], tmp_path: Path) -> None:
    run["tasks"] = {label: run["tasks"][label] for label in ("maths", "several", "alpaca")}
    parsed = validate(TasksRun, run, "run.yaml")
    assert isinstance(parsed.engine, TransformersSettings)
    with pytest.raises(Interrupted):
        run_tasks(parsed, Breaking(parsed.engine, after=9))  # within the second task
    out = tmp_path / "out"
    assert (out / "maths" / "judged.jsonl").exists() and not (out / "tasks.json").exists()
    half = (out / "several" / "responses.jsonl").read_bytes()
    engine = Breaking(parsed.engine, after=100)
    content = run_tasks(parsed, engine)
    assert engine.given == 7 + 2 * 3 + 3 - 9 and (out / "several" / "responses.jsonl").read_bytes().startswith(half)
    found = json.loads((out / "tasks.json").read_text())
    assert found["tasks"] == json.loads(json.dumps(content["tasks"])) and found["generator"] == "model"

    whole = run_tasks(validate(TasksRun, run | {"output_dir": str(tmp_path / "whole")}, "run.yaml"))
    assert whole == content
    assert {**_files(out), "run.json": b""} == {**_files(tmp_path / "whole"), "run.json": b""}
    assert run_tasks(parsed, Breaking(parsed.engine, after=0)) == content  # nothing is left to ask


def test_results_have_figures_counts_and_settings(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    with pytest.raises(SystemExit) as end:
        cli.main(["tasks", str(tmp_path / "run.yaml"), "generator=tiny-1", "tasks.maths.data.limit=3"])
    assert not end.value.code
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["task", "figure", "value", "+-", "of"]
    assert [line[0] for line in shown[1:] if len(line) > 3] == list(run["tasks"])
    found = json.loads((tmp_path / "out" / "tasks.json").read_text())
    tasks = found["tasks"]
    assert found["generator"] == "tiny-1" and {"python", "torch", "transformers"} <= found["versions"].keys()
    assert tasks["maths"]["counts"]["judged"] == 3 and tasks["several"]["counts"]["judged"] == 6
    assert tasks["maths"]["sampling"]["temperature"] == 0 and tasks["several"]["sampling"]["n"] == 3
    assert 0 <= tasks["pairs"]["figures"]["accuracy_mean"] <= 1 and tasks["pairs"]["counts"] == {"rows": 5}
    assert tasks["text"]["figures"]["bits_per_byte"] > 0
    outputs = json.loads((tmp_path / "out" / "alpaca" / "outputs.json").read_text())
    assert [each["generator"] for each in outputs] == ["tiny-1"] * 3
    judged = [json.loads(line) for line in (tmp_path / "out" / "several" / "judged.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in judged] == [0, 1, 2] * 2 and all(row["text"] for row in judged)


def test_answers_of_a_server(run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows sums of even numbers. What it fails to answer is asked for by the next command."""

    def knows(text: str, seed: int) -> str:
        number = int(re.findall(r"\d+", text)[0])
        return f"#### {2 * number}" if number % 2 == 0 else "I do not know."

    monkeypatch.setattr(server, "answer", knows)
    with server.serve() as served:
        run["engine"] = {"name": "openai", "base_url": served.url, "model": server.MODEL, "max_retries": 0}
        run |= {"generator": "served", "tasks": {"maths": run["tasks"]["maths"]}}
        parsed = validate(TasksRun, run, "run.yaml")
        served.always = "500"
        with pytest.raises(Missing, match="7 of 7 requests have no response"):
            run_tasks(parsed)
        served.always = ""
        served.asked.clear()
        content = run_tasks(parsed)
        assert run_tasks(parsed) == content and sum(served.asked.values()) == 7
        assert {body["model"] for body in served.bodies} == {server.MODEL}
        assert {body["temperature"] for body in served.bodies} == {0.0}
    figures = content["tasks"]["maths"]["figures"]
    assert figures["exact_match_strict"] == pytest.approx(4 / 7) and content["generator"] == "served"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {}}, "tasks: none given"),
        ({"tasks": {"a": {"name": "gsm9k"}}}, "tasks.a.name: unknown name 'gsm9k' (did you mean 'gsm8k'?)"),
        ({"tasks": {"a": {"data": {}}}}, "tasks.a.name: required"),
        ({"tasks": {"a/b": {"name": "gsm8k"}}}, "'a/b' is no name of a task"),
        ({"tasks": {"a": {"name": "gsm8k", "data": {"path": "x"}, "tempalte": "x"}}}, "did you mean 'template'?"),
        ({"tasks": {"a": {"name": "gsm8k", "data": {"path": "x"}, "template": "x"}}}, "has no {question}"),
        ({"generator": "a/b"}, "generator: files are called so"),
        (
            {"engine": {"name": "openai", "base_url": "http://localhost:1", "model": "m"}},
            "tasks.pairs: needs the model's",
        ),
        ({"sampling": {"n": 2}}, "with temperature 0 all of them would be equal"),
        ({"sampling": {"n": 2, "temperature": 1.0}}, "tasks.alpaca: sampling.n: 2 answers"),
        ({"lm_eval": {"tasks": []}}, "lm_eval.tasks"),
    ],
)
def test_bad_run_files(run: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        run_tasks(validate(TasksRun, run | changes, "run.yaml"))
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_and_other_settings_are_refused(run: dict[str, Any], tmp_path: Path) -> None:
    run["tasks"] = {"maths": run["tasks"]["maths"]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder of `fusemega tasks`"):
        run_tasks(validate(TasksRun, run, "run.yaml"))
    run["output_dir"] = str(tmp_path / "other")
    run_tasks(validate(TasksRun, run, "run.yaml"))
    before = _files(tmp_path / "other")
    with pytest.raises(UserError, match=r"begun with other settings .*max_tokens: 6 there, 7 now"):
        run_tasks(validate(TasksRun, run | {"sampling": {"max_tokens": 7}}, "run.yaml"))
    after = _files(tmp_path / "other")
    assert {**before, "run.json": b""} == {**after, "run.json": b""}


def test_lm_eval_is_asked_for_by_its_extra(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'fusemega\[lm-eval\]'"):
        run_tasks(validate(TasksRun, run | {"lm_eval": {"tasks": ["a"]}}, "run.yaml"))
    assert not (tmp_path / "out").exists()


STAND_IN = """
import json, pathlib, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "run" and words["--model"] == "hf" and words["--tasks"] == "a,b", sys.argv
print("evaluating", words["--model_args"])
if words["--num_fewshot"] == "9":
    sys.exit("no such examples")
out = pathlib.Path(words["--output_path"]) / "model"
out.mkdir()
results = {"a": {"alias": "a", "exact_match,none": 0.25, "exact_match_stderr,none": 0.125}}
results["b"] = {"acc,none": 1.0, "acc_stderr,none": "N/A"}
said = {"results": results, "versions": {"a": 1.0}, "n-samples": {"a": {"effective": 4}}, "lm_eval_version": "0"}
(out / "results_2026.json").write_text(json.dumps(said))
"""


def test_lm_eval_runs_in_a_process_of_its_own(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in the place of lm_eval, which takes its words and leaves what it leaves."""
    (tmp_path / "path" / "lm_eval").mkdir(parents=True)
    (tmp_path / "path" / "lm_eval" / "__init__.py").touch()
    (tmp_path / "path" / "lm_eval" / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    engine = TransformersSettings(load=str(work / "model"), dtype="fp32")
    out = tmp_path / "out"
    bad = lm_eval.LmEvalSection(tasks=["a", "b"], num_fewshot=9)
    with pytest.raises(UserError, match=r"ended with status 1: .*no such examples"):
        lm_eval.run_lm_eval(bad, engine, {"weights": "x"}, out)
    assert not out.exists()
    section = lm_eval.LmEvalSection(tasks=["a", "b"], num_fewshot=0)
    found = lm_eval.run_lm_eval(section, engine, {"weights": "x"}, out)
    assert found["results"]["a"]["exact_match,none"] == 0.25
    assert f"pretrained={work / 'model'},dtype=float32" in (out / "log.txt").read_text()
    monkeypatch.setenv("PYTHONPATH", "")
    assert lm_eval.run_lm_eval(section, engine, {"weights": "x"}, out) == found  # kept
    with pytest.raises(UserError, match="results of another model or other settings"):
        lm_eval.run_lm_eval(section, engine, {"weights": "y"}, out)
