"""A graph of seven tiny stages with a diamond: what runs, what is kept, what is refused.

words -> upper -> joined -> gate -> end
      -> count ->                      aside (needs nothing)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.pipeline import run as running
from fusemega.pipeline.functions import name_of, stage_function
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome, run
from fusemega.pipeline.scope import Scope
from fusemega.pipeline.stage import Resources, Stage, Stop
from fusemega.pipeline.verdict import plan, plan_lines

DID: list[str] = []
FAILING: dict[str, Exception] = {}


@stage_function
def write(stage: str, out: str, read: list[str], **settings: Any) -> dict[str, Any]:
    """Writes what it reads and its settings."""
    DID.append(stage)
    texts = [Path(path).read_text() for path in read]
    Path(out).write_text(f"{stage}({', '.join(texts)}{json.dumps(settings) if settings else ''})")
    if stage in FAILING:
        raise FAILING[stage]
    return {"length": len(texts)}


@stage_function
def gate(stage: str, out: str, read: list[str], longest: int, everything: bool) -> None:
    """Stops where its text is longer than `longest`."""
    DID.append(stage)
    if (length := len(Path(read[0]).read_text())) > longest:
        raise Stop(f"{length} characters, and {longest} are allowed", everything)
    shutil.copy(read[0], out)


class Seven:
    """The graph below a folder, with settings that a test changes."""

    def __init__(self, place: Path) -> None:
        self.source, self.folder = place / "source.txt", place / "out"
        self.source.write_text("hello")
        self.settings: dict[str, Any] = {"upper": {}, "count": {}, "longest": 1000, "everything": False}

    def stage(self, name: str, *read: str, function: Callable[..., Any] = write, **settings: Any) -> Stage:
        out, paths = (
            f"{self.folder}/{name}.txt",
            [path if "/" in path else f"{self.folder}/{path}.txt" for path in read],
        )
        settings = {"stage": name, "out": out, "read": paths, **settings}
        inputs = {path.rpartition("/")[2].removesuffix(".txt"): path for path in paths}
        return Stage(name, (), name_of(function), settings, "", inputs, {"text": out})

    def graph(self) -> Graph:
        of = self.settings
        limits = {key: of[key] for key in ("longest", "everything")}
        return Graph(
            self.folder,
            [
                self.stage("joined", "upper", "count"),
                self.stage("words", str(self.source)),
                self.stage("upper", "words", **of["upper"]),
                self.stage("count", "words", **of["count"]),
                self.stage("gate", "joined", function=gate, **limits),
                self.stage("end", "gate"),
                self.stage("aside"),
            ],
        )

    def run(self) -> list[str]:
        """The names of the stages that had something to do."""
        DID.clear()
        self.outcome: Outcome = run(self.graph())
        return list(DID)

    def reasons(self) -> dict[str, str]:
        """Of those that would run."""
        return {name: one.reason for name, one in plan(self.graph()).items() if one.action == "run"}


@pytest.fixture
def seven(tmp_path: Path) -> Seven:
    FAILING.clear()
    return Seven(tmp_path)


ALL = ["words", "upper", "count", "joined", "gate", "end", "aside"]


def test_each_runs_once_after_those_that_it_needs(seven: Seven) -> None:
    assert seven.reasons() == dict.fromkeys(ALL, "new") and not seven.folder.exists(), "a plan writes nothing"
    assert seven.run() == ALL
    assert seven.outcome.complete and seven.outcome.results["joined"] == {"length": 2}
    assert (seven.folder / "end.txt").read_text() == "end(joined(upper(words(hello)), count(words(hello))))"
    assert seven.run() == [] and seven.outcome.results["joined"] == {"length": 2}
    assert seven.reasons() == {}


def test_a_setting_reruns_what_depends_on_it_and_nothing_else(seven: Seven) -> None:
    seven.run()
    seven.settings["count"] = {"teach": {"top_k": 20}}
    reasons = seven.reasons()
    assert reasons.pop("count") == "its setting teach changed"
    assert reasons.pop("joined") == "its input count (of count) may change"
    assert list(reasons) == ["gate", "end"]
    assert seven.run() == ["count", "joined", "gate", "end"]
    seven.settings["count"] = {"teach": {"top_k": 10}}
    assert seven.reasons()["count"] == "its setting teach.top_k changed"


def test_contents_decide_and_not_times_or_places(seven: Seven, tmp_path: Path) -> None:
    seven.run()
    seven.source.write_text("hello")
    assert seven.run() == [], "written anew, and the same"
    (tmp_path / "moved").mkdir()
    seven.folder = seven.folder.rename(tmp_path / "moved" / "out")
    seven.source = seven.source.rename(tmp_path / "moved" / "source.txt")
    assert seven.run() == []
    seven.source.write_text("hellO")
    assert seven.reasons()["words"] == "its input source changed"
    assert seven.run() == ["words", "upper", "count", "joined", "gate", "end"]


def test_what_comes_out_the_same_reruns_nothing_further(seven: Seven) -> None:
    seven.run()
    (seven.folder / "words.txt").unlink()
    assert seven.reasons()["words"] == "its output text is missing"
    assert seven.run() == ["words"]


@pytest.mark.parametrize(("name", "reruns"), [("upper", ["upper"]), ("end", ["end"])])
def test_a_damaged_output_is_made_again(seven: Seven, name: str, reruns: list[str]) -> None:
    seven.run()
    (seven.folder / f"{name}.txt").write_text("damaged")
    assert seven.reasons()[name].startswith("its output text is damaged")
    assert seven.run() == reruns
    assert "damaged" not in (seven.folder / f"{name}.txt").read_text() and seven.run() == []


def test_a_failure_ends_its_branch_and_is_tried_again(seven: Seven, capfd: pytest.CaptureFixture[str]) -> None:
    FAILING["count"] = UserError("disk full")
    with pytest.raises(UserError, match="^disk full; not run: joined, gate, end$"):
        seven.run()
    assert DID == ["words", "upper", "count", "aside"], "independent stages run"
    said = capfd.readouterr().err
    assert "[count] failed: disk full" in said and "[joined] not run: it needs count" in said
    assert seven.reasons()["count"] == "failed before: disk full"
    FAILING.clear()
    assert seven.run() == ["count", "joined", "gate", "end"]


def test_a_stop_ends_its_branch_and_is_remembered(seven: Seven, capfd: pytest.CaptureFixture[str]) -> None:
    seven.settings["longest"] = 5
    assert seven.run() == ["words", "upper", "count", "joined", "gate", "aside"]
    assert seven.outcome.stopped == {"gate": "48 characters, and 5 are allowed"}
    assert seven.outcome.not_run == {"end": "gate"} and not seven.outcome.complete
    assert "[end] not needed: 48 characters, and 5 are allowed\n" in capfd.readouterr().err
    assert seven.run() == [] and "[gate] stopped before: 48 characters" in capfd.readouterr().err
    assert [line.split("  ")[-1].strip() for line in plan_lines(seven.graph())][-3:] == [
        "stopped: 48 characters, and 5 are allowed",
        "not needed: 48 characters, and 5 are allowed",
        "skip: finished",
    ]
    seven.settings["longest"] = 100
    assert seven.reasons()["gate"] == "its setting longest changed"
    assert seven.run() == ["gate", "end"] and seven.outcome.complete


def test_a_stop_of_everything(seven: Seven) -> None:
    seven.settings |= {"longest": 5, "everything": True}
    assert seven.run() == ["words", "upper", "count", "joined", "gate"]
    assert set(seven.outcome.not_run) == {"end", "aside"} and seven.run() == []


def test_a_killed_run_goes_on(seven: Seven, tmp_path: Path) -> None:
    """Killed within `joined`, which had written half of its output."""
    script = f"""
import os, pathlib
from tests.pipeline import test_graph
from tests.pipeline.test_graph import Seven
class Killed(dict):
    def __contains__(self, stage):
        if stage == "joined":
            os.kill(os.getpid(), 9)
        return False
test_graph.FAILING = Killed()
Seven(pathlib.Path({str(tmp_path)!r})).run()
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True).returncode == -9
    assert (seven.folder / "joined.txt").exists()
    assert seven.reasons()["joined"] == "was interrupted" and seven.reasons()["gate"] == "new"
    assert seven.run() == ["joined", "gate", "end", "aside"]


def test_what_resumes_is_kept_and_what_does_not_is_removed(seven: Seven, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was interrupted finds what it left, if it continues from it."""
    left: list[bool] = []
    out = seven.folder / "run"
    monkeypatch.setattr(
        running, "launch_ranks", lambda *_: left.append(out.exists()) or out.mkdir(exist_ok=True) or 143
    )
    for resumes, wanted in ((True, [False, True]), (False, [False, False])):
        left.clear()
        file = str(seven.folder / f"{resumes}.yaml")
        owned = {"owns": (str(out),), "resumes": resumes, "resources": Resources(2)}
        stage = Stage(f"train-{resumes}", ("train", file), settings={"lr": 1e-3}, run_file=file, **owned)  # type: ignore[arg-type]
        graph = Graph(seven.folder, [stage, seven.stage("aside")])
        for _ in range(2):
            DID.clear()
            with pytest.raises(UserError, match="--nproc 2: ended with status 143"):
                run(graph)
            assert DID == [], "a signal ends everything"
        assert left == wanted
        assert Path(file).read_text() == f"# fusemega train {file} --nproc 2\nlr: 0.001\n"
        out.rmdir()


def test_a_function_is_called_by_hand_as_its_stage_calls_it(seven: Seven, capsys: pytest.CaptureFixture[str]) -> None:
    from fusemega.pipeline.call import main

    seven.run()
    DID.clear()
    file = seven.folder / "stages" / "joined.yaml"
    assert seven.graph().stages[3].command(seven.folder) == f"python -m fusemega.pipeline.call {file}"
    assert main([str(file)]) == 0 and DID == ["joined"] and capsys.readouterr().out == '{"length": 2}\n'
    file.write_text("function: os:system\narguments: {}\n")
    assert main([str(file)]) == 2 and "function os:system: not known" in capsys.readouterr().err


def test_nothing_of_others_is_touched(seven: Seven) -> None:
    seven.folder.mkdir()
    (seven.folder / "upper.txt").write_text("mine")
    with pytest.raises(UserError, match="upper.txt: exists, and stage upper did not make it"):
        seven.run()
    assert (seven.folder / "upper.txt").read_text() == "mine"
    assert [path.name for path in seven.folder.iterdir()] == ["upper.txt"], "nothing is begun"
    (seven.folder / "stages").mkdir()
    (seven.folder / "upper.txt").unlink()
    record, whole = seven.folder / "stages" / "count.json", {"format": "fusemega-stage-1", "state": "begun"}
    whole |= {"made_from": {}, "inputs": [], "owns": [], "outputs": {}, "result": 1, "reason": "", "everything": False}
    for malformed in ({"identity": "0", "result": None}, whole, whole | {"inputs": {}, "state": "begone"}):
        record.write_text(json.dumps(malformed))
        with pytest.raises(UserError, match="count.json: not a record of this version"):
            seven.run()
    record.write_text(json.dumps(whole | {"inputs": {}}))
    assert seven.run() == ALL


def stage(name: str, reads: str = "", makes: str = "", function: str = "") -> Stage:
    inputs, outputs = ({key: path} if path else {} for key, path in (("in", reads), ("out", makes)))
    return Stage(name, () if function else ("env",), function, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([stage("a", "o/c", "o/a"), stage("b", "o/a", "o/b"), stage("c", "o/b", "o/c")], "a -> c -> b -> a"),
        ([stage("z", "", "o/z"), stage("a", "o/a/x", "o/a")], "each after the next: a -> a"),
        ([stage("a", "", "o/x"), stage("b", "", "o/x")], "stages a and b both write "),
        ([stage("a", "", "o/x"), stage("b", "", "o/x/y")], "stage b writes "),
        ([stage("a", "", "o/model"), stage("b", "o/modle")], "no stage makes it (did you mean 'o/model'?)"),
        ([stage("a", "", "o")], "where the records of stages are"),
        ([stage("a"), stage("a")], "stage a: there are 2 of this name"),
        ([stage("../a")], "stage '../a': a name is letters"),
        ([Stage("a")], "stage a: give it either a command or a function"),
        ([stage("a", function="os:system")], "function os:system: not known"),
        ([stage("a", function="fusemega.recipes.nowhere:f")], "No module named 'fusemega.recipes.nowhere'"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(
    stages: list[Stage], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        Graph("o", stages)
    assert words in str(refused.value)


def test_an_output_in_another_place_removes_nothing_there(seven: Seven) -> None:
    seven.run()
    other = seven.folder / "other.txt"
    other.write_text("mine")
    moved = Stage("aside", ("env",), outputs={"text": str(other)})
    with pytest.raises(UserError, match="other.txt: exists, and stage aside did not make it"):
        run(Graph(seven.folder, [moved]))
    assert other.read_text() == "mine"


def test_until_a_stage_and_no_further(seven: Seven) -> None:
    scope = Scope.of(seven.graph(), "upper", None)
    assert {name for name, one in plan(seven.graph(), scope).items() if one.action == "leave"} == {*ALL[2:]}
    DID.clear()
    outcome = run(seven.graph(), scope)
    assert DID == ["words", "upper"] and outcome.left == ["count", "joined", "gate", "end", "aside"]
    assert not outcome.complete
    assert seven.run() == ALL[2:] and seven.outcome.complete


def test_from_a_stage_on_again(seven: Seven) -> None:
    seven.run()
    scope = Scope.of(seven.graph(), None, "count")
    found = {name: one.reason for name, one in plan(seven.graph(), scope).items() if one.action == "run"}
    assert found == dict.fromkeys(["count", "joined", "gate", "end"], "again, as --from asks")
    assert seven.reasons() == {}, "a plan writes nothing"
    FAILING["joined"] = UserError("disk full")
    DID.clear()
    with pytest.raises(UserError, match="disk full"):
        run(seven.graph(), scope)
    FAILING.clear()
    assert DID == ["count", "joined"]
    assert seven.run() == ["joined", "gate", "end"], "what --from asked is remembered, and count is not made twice"
    DID.clear()
    run(seven.graph(), Scope.of(seven.graph(), "joined", "upper"))
    assert DID == ["upper", "joined"]
    assert seven.run() == [], "what came out is the same"


@pytest.mark.parametrize(
    ("until", "start", "words"),
    [
        ("joned", None, "--until: there is no stage 'joned' (did you mean 'joined'?); allowed: words, upper, count"),
        (None, "samples", "--from: there is no stage 'samples'; allowed: "),
        ("upper", "joined", "--from joined: --until upper ends before it; stages until then: words, upper"),
    ],
)
def test_parts_that_are_not_there(seven: Seven, until: str | None, start: str | None, words: str) -> None:
    with pytest.raises(UserError) as refused:
        Scope.of(seven.graph(), until, start)
    assert words in str(refused.value)


def test_the_beginning_of_names_is_all_of_them(seven: Seven) -> None:
    graph = Graph("o", [seven.stage("sample-a"), seven.stage("sample-b"), seven.stage("collect", "sample-a")])
    assert graph.named("--until", "sample") == ["sample-a", "sample-b"]
    assert graph.named("--until", "sample-b") == ["sample-b"]


def test_a_command_that_keeps_its_output_finds_it_after_a_change(seven: Seven, monkeypatch: pytest.MonkeyPatch) -> None:
    out, found = seven.folder / "responses.jsonl", []

    def sample(*_: object, **__: object) -> subprocess.CompletedProcess[bytes]:
        found.append(out.exists())
        out.write_text(str(len(found)))
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(running.subprocess, "run", sample)
    for n, part in ((1, None), (2, None), (2, "sample"), (2, None)):
        file = str(seven.folder / "sample.yaml")
        outputs = {"responses": str(out)}
        stage = Stage("sample", ("sample", file), "", {"n": n}, file, outputs=outputs, resumes=True, keeps=True)
        graph = Graph(seven.folder, [stage])
        run(graph, Scope.of(graph, None, part))
    assert found == [False, True, False], "kept with another n; removed by --from; the last had nothing to do"
