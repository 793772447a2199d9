"""One stage by itself, as jobs of a batch system run it, beside a run of the whole graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fusemega.errors import Retryable, UserError
from fusemega.files.lock import locked
from fusemega.pipeline.alone import begin_alone, end_alone, finish_last, run_alone
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.record import lock_of, read_record, read_shape
from fusemega.pipeline.run import Outcome, run
from fusemega.pipeline.stage import Stage
from fusemega.pipeline.verdict import plan_lines
from fusemega.runtime.meeting import note_refusal
from tests.pipeline.test_graph import ALL, DID, FAILING, Seven


@pytest.fixture
def seven(tmp_path: Path) -> Seven:
    FAILING.clear()
    DID.clear()
    return Seven(tmp_path)


def records(seven: Seven) -> dict[str, object]:
    return {path.name: json.loads(path.read_text()) for path in (seven.folder / "stages").glob("*.json")}


def test_stage_by_stage_gives_what_one_run_gives(seven: Seven, tmp_path: Path) -> None:
    for name in ("aside", "words", "count", "upper", "joined", "gate", "end"):
        assert run_alone(seven.graph(), name).state == "finished"
    assert DID == ["aside", "words", "count", "upper", "joined", "gate", "end"]
    assert read_shape(seven.folder)["joined"] == ["upper", "count"] and list(read_shape(seven.folder)) == ALL
    (tmp_path / "other").mkdir()
    other = Seven(tmp_path / "other")
    other.run()
    assert records(seven) == records(other)
    assert seven.run() == [], "a run of all finds everything finished"
    DID.clear()
    assert run_alone(seven.graph(), "joined").state == "finished" and DID == []


def test_what_it_needs_must_be_finished(seven: Seven) -> None:
    with pytest.raises(UserError, match="^stage joined: it needs words, which is not finished \\(new\\)$"):
        run_alone(seven.graph(), "joined")
    assert not seven.folder.exists(), "nothing is written"
    FAILING["words"] = UserError("disk full")
    with pytest.raises(UserError, match="^disk full$"):
        run_alone(seven.graph(), "words")
    with pytest.raises(UserError, match="it needs words, which is not finished \\(failed before: disk full\\)"):
        run_alone(seven.graph(), "upper")
    with pytest.raises(UserError, match="--only: there is no stage 'wrds' \\(did you mean 'words'"):
        run_alone(seven.graph(), "wrds")


def test_behind_a_stop_nothing_is_needed(seven: Seven) -> None:
    seven.settings["longest"] = 5
    for name in ("words", "upper", "count", "joined"):
        run_alone(seven.graph(), name)
    for _ in range(2):
        assert run_alone(seven.graph(), "gate").reason == "48 characters, and 5 are allowed"
    end = run_alone(seven.graph(), "end")
    assert (end.state, end.reason) == ("not needed", "48 characters, and 5 are allowed")
    assert run_alone(seven.graph(), "aside").state == "finished", "it does not need what stopped"


def test_behind_a_stop_of_everything(seven: Seven) -> None:
    seven.settings |= {"longest": 5, "everything": True}
    for name in ("words", "upper", "count", "joined", "gate"):
        run_alone(seven.graph(), name)
    aside = run_alone(seven.graph(), "aside")
    assert (aside.state, aside.reason) == ("not needed", "48 characters, and 5 are allowed")
    assert DID[-1] == "gate"


def test_a_stage_has_one_process_and_the_folder_may_have_several(seven: Seven) -> None:
    graph = seven.graph()
    run_alone(graph, "words")
    holder = "import sys, time; from fusemega.files.lock import locked\n"
    holder += f"with locked({str(lock_of(graph, graph.stages[1]))!r}):\n print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    assert graph.stages[1].name == "upper"
    with pytest.raises(UserError, match="stages/upper: another process is writing it"):
        run_alone(graph, "upper")
    assert run_alone(graph, "count").state == "finished"
    with pytest.raises(UserError, match="stages/upper: another process .* not run: joined"):
        run(graph)
    assert read_record(graph, graph.stages[1]) is None, "it is no failure of the stage"
    other.communicate(b"")
    with locked(graph.folder):  # `fusemega run` would hold it
        assert run_alone(graph, "upper").state == "finished"


def test_the_last_to_end_writes_the_summary(seven: Seven) -> None:
    told: list[Outcome] = []
    for name in ALL:
        assert finish_last(seven.graph(), told.append) is None and told == []
        run_alone(seven.graph(), name)
    finish_last(seven.graph(), told.append)
    assert told[0].complete and told[0].results["joined"] == {"length": 2} and list(told[0].results) == ALL


@pytest.mark.parametrize("everything", [False, True])
def test_after_a_stop_too_the_last_to_end_writes_a_summary(seven: Seven, everything: bool) -> None:
    seven.settings |= {"longest": 5, "everything": everything}
    told: list[Outcome] = []
    for name in ("words", "upper", "count", "joined", "gate", *([] if everything else ["aside"])):
        assert finish_last(seven.graph(), told.append) is None and told == []
        run_alone(seven.graph(), name)
    finish_last(seven.graph(), told.append)
    (found,) = told
    assert found.stopped == {"gate": "48 characters, and 5 are allowed"} and not found.complete
    assert found.not_run == {"end": "gate"} | ({"aside": "gate"} if everything else {})
    assert found.why_not_needed("end") == found.stopped["gate"] and found.results["joined"] == {"length": 2}


def test_begun_and_ended_by_a_script_in_between(seven: Seven) -> None:
    out, file = seven.folder / "run", str(seven.folder / "train.yaml")
    stage = Stage("sft", ("train", file), "", {"lr": 1}, file, {}, {"model": str(out)}, resumes=True)
    graph = Graph(seven.folder, [stage])
    with pytest.raises(UserError, match="stage sft: it has not begun"):
        end_alone(graph, "sft")
    assert begin_alone(graph, "sft").state == "begun" and "lr: 1" in Path(file).read_text()
    with pytest.raises(UserError, match="stage sft: ended without its output model"):
        end_alone(graph, "sft")
    out.write_text("half")
    assert begin_alone(graph, "sft").state == "begun" and out.exists(), "it goes on from there"
    out.write_text("trained")
    end_alone(graph, "sft")
    end_alone(graph, "sft")
    assert begin_alone(graph, "sft").state == "finished" and run(graph).complete
    out.write_text("damaged")
    assert begin_alone(graph, "sft").state == "begun" and not out.exists(), "it begins anew"


def test_a_crash_may_be_tried_again_and_a_mistake_not(
    seven: Seven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage("verify", ("store", "verify", "nothing"))
    graph = Graph(seven.folder, [stage])
    monkeypatch.setenv("FUSEMEGA_REFUSED", str(tmp_path / "refused"))
    with pytest.raises(UserError, match="ended with status 2") as mistake:
        run_alone(graph, "verify")
    assert not isinstance(mistake.value, Retryable)
    note_refusal(mistake.value)
    assert "nothing: " in (tmp_path / "refused").read_text(), "the command's own line stays"
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(Retryable, match="ended with status 3"):
        run_alone(graph, "verify")


def test_a_whole_output_is_not_made_again(seven: Seven) -> None:
    """The command had written it, and then something else ended the job: it would refuse its own output."""
    out, file = seven.folder / "rewards.jsonl", str(seven.folder / "score.yaml")
    stage = Stage("score", ("score", file), "", {"lr": 1}, file, {}, {"rows": str(out)}, resumes=True, whole=True)
    graph = Graph(seven.folder, [stage])
    assert begin_alone(graph, "score").state == "begun"
    out.write_text("whole")
    assert [line.split(": ")[1] for line in plan_lines(graph)] == ["finished when it was interrupted"]
    assert run_alone(graph, "score").state == "finished"
    record = read_record(graph, stage)
    assert record is not None and record.state == "finished" and list(record.outputs) == ["rows"]
    out.unlink()
    with pytest.raises(UserError, match="lr: unknown key"):
        run_alone(graph, "score")
    out.write_text("whole")
    assert run_alone(graph, "score").state == "finished"
    changed = Graph(seven.folder, [replace(stage, settings={"lr": 2})])
    with pytest.raises(UserError, match="lr: unknown key"):
        run_alone(changed, "score")
    assert not out.exists()
