"""One stage by itself, as jobs of a batch system run it, beside a run of the whole graph."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.pipeline.alone import begin_alone, end_alone, finish_last, run_alone
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.record import lock_of, read_record, read_shape
from fusemega.pipeline.run import Outcome, run
from fusemega.pipeline.stage import Stage
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
