"""`fusemega status`: of runs and recipes, with Slurm, without it, and after the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusemega.checkpoint.series import CHECKPOINTS, STATE, TRACKER
from fusemega.cluster.jobs_file import Launch, SlurmJob, add_launch
from fusemega.cluster.status import status_of
from fusemega.files.integrity import write_integrity
from fusemega.monitoring.ranks import RankState, rank_file
from fusemega.pipeline.record import StageRecord
from tests.cluster.conftest import TRAIN
from tests.cluster.fake_slurm import FakeSlurm
from tests.cluster.test_launch import said

NOW = time.time()  # and it stays so, see `still`
RANK = RankState(
    0, 2, "node1", 10, "cpu", NOW, NOW, 5, 4, 10, "forward and backward", NOW, None, NOW, "", "", None, {}, {}, []
)


class Run:
    """A run's folder, made up."""

    def __init__(self, folder: Path, iterations: int = 4) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"fusemega": "0", "run": TRAIN}))
        rows = [
            {"iteration": i + 1, "lm loss": 2.5, "iteration-time": 30.0, "tokens-per-second": 1500.0}
            for i in range(iterations)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint(self, iteration: int, train_iters: int = 10) -> Path:
        folder = self.folder / CHECKPOINTS / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / STATE).write_text(json.dumps({"iteration": iteration, "train_iters": train_iters}))
        write_integrity(folder)
        (folder.parent / TRACKER).write_text(str(iteration))
        os.utime(folder, (NOW - 60, NOW - 60))
        return folder

    def beats(self, *ranks: RankState) -> None:
        for rank in ranks:
            path = rank_file(self.folder, rank.rank)
            path.parent.mkdir(exist_ok=True)
            path.write_text(rank.as_json())

    def submitted(self, *jobs: SlurmJob) -> None:
        add_launch(self.folder, Launch("0", "fusemega launch x", NOW, list(jobs)))


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_run_on_this_machine(here: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "run")
    lines = said(capsys, "status", "run").splitlines()
    assert lines[0] == "run: running" and lines[2:] == ["  no checkpoint yet", "  left: 0:01:00 at this speed"]
    assert lines[1] == ("  iteration 4 of 6, loss 2.5, the last one ended 0:00:00 ago, 30 s each, 1,500 tokens/s")
    run.checkpoint(2)
    os.utime(run.folder / "metrics.jsonl", (NOW - 1000, NOW - 1000))
    lines = said(capsys, "status", "run").splitlines()
    assert lines[0] == "run: not running" and "iteration 4 of 10" in lines[1]
    assert lines[2].startswith("  last checkpoint: iteration 2, 0:01:00 old") and lines[3].startswith("  left: 0:03:00")
    (run.folder / "done").write_text("10\n")
    lines = said(capsys, "status", "run").splitlines()
    assert lines[0] == "run: finished" and lines[1] == "  iteration 10 of 10, loss 2.5, 30 s each, 1,500 tokens/s"


def test_the_rank_that_holds_up_the_others(here: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "run")
    run.beats(RANK, replace(RANK, rank=1, pid=11, host="node2", time=NOW - 100, moved=NOW - 100))
    head = said(capsys, "status", "run").splitlines()[0]
    assert head.startswith("run: running: rank 1 (process 11 on node2) has written no heartbeat for 100 s")
    assert "was last in forward and backward after iteration 4" in head and "waiting: rank 0" in head
    run.beats(replace(RANK, ended="failed: disk full"))
    assert "run: failed: rank 0 (process 10 on node1): failed: disk full\n" in said(capsys, "status", "run")


def test_its_jobs(here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "run")
    run.beats(RANK, replace(RANK, rank=1))
    log = here / "run" / "slurm" / "run-%j.out"
    run.submitted(SlurmJob("7", "run", [], [], "old.out"))
    run.submitted(SlurmJob("101", "run", [], [], str(log)))
    slurm.knows("101", RunTime="00:58:00", Restarts="0")
    notes = [("start", "101"), ("end", "101"), ("start", "101"), ("start", "99")]
    (here / "run" / "slurm" / "jobs.tsv").write_text(
        "".join(f"{what}\tat\t{job}\t0\t2\trequeue\n" for what, job in notes)
    )
    (here / "run" / "slurm" / "run-101.out").write_text(
        "warning: one\nok\n[rank 3] warning: two\nwarning: three\x1b[2J\nwarning: one\nwarning: four\n"
    )
    assert said(capsys, "status", "run").splitlines()[2:] == [
        said_line := said(capsys, "status", "run").splitlines()[2],
        "  no checkpoint yet",
        "  left: 0:03:00 at this speed; the job has 0:02:00 left, so it will save and be requeued",
        "  warning: three\\x1b[2J",
        "  warning: one",
        "  warning: four",
        f"  log: {here}/run/slurm/run-101.out",
    ]
    assert "iteration 4 of 10" in said_line
    assert "  job 101: RUNNING on node[1-2] for 0:58:00 of 1:00:00; restarted 1 time(s)\n" in said(
        capsys, "status", "run"
    )
    slurm.knows("101", JobState="PENDING", Reason="Resources")
    assert said(capsys, "status", "run").splitlines()[:2] == [
        "run: waits in the queue (Resources)",
        "  job 101: PENDING (Resources); restarted 1 time(s)",
    ]
    slurm.forgets("101")
    (slurm.here / "accounts").write_text(f"101|TIMEOUT|None|3600|60|node1|{here}\n")
    assert "  job 101: TIMEOUT; restarted 1 time(s)\n" in said(capsys, "status", "run")
    (slurm.here / "accounts").unlink()
    assert "  job 101: Slurm knows nothing of it (any more)\n" in said(capsys, "status", "run")


def test_a_job_that_was_submitted_by_hand(here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "run")
    run.submitted(SlurmJob("101", "run", [], [], "old.out"))
    (here / "run" / "slurm" / "jobs.tsv").write_text("start\tat\t101\t0\t2\tnode1\nstart\tat\t202\t0\t2\tnode1\n")
    slurm.knows("202")
    lines = said(capsys, "status", "run").splitlines()
    assert lines[1] == "  job 202: RUNNING on node[1-2] for 0:10:00 of 1:00:00" and lines[-1] == "  log: /tmp/x"


def test_before_the_first_job_begins(here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    add_launch(here / "run", Launch("0", "x", NOW, [SlurmJob("101", "run", [], [], "x.out")]))
    slurm.knows("101", JobState="PENDING", Reason="Priority")
    assert said(capsys, "status", "run").splitlines()[:2] == [
        "run: submitted; no job has begun to train",
        "  job 101: PENDING (Priority)",
    ]


def test_for_machines(here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "run")
    run.checkpoint(2)
    run.submitted(SlurmJob("101", "run", [], [], "x.out"))
    slurm.knows("101")
    found = json.loads(said(capsys, "status", "run", "--json"))
    assert found["kind"] == "run" and found["run"]["iteration"] == 4 and found["run"]["checkpoint"] == 2
    assert found["run"]["left_seconds"] == 180.0 and found["jobs"][0]["state"]["limit"] == 3600


def test_a_damaged_checkpoint_is_told(here: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "run")
    (run.checkpoint(2) / STATE).write_text("{}")
    assert "checkpoints: run/checkpoints: no complete checkpoint to resume from" in said(capsys, "status", "run")


NEEDS = {"split": [], "teach-a": ["split"], "teach-b": ["split"], "sft": ["teach-a", "teach-b"], "eval": ["sft"]}


def records(folder: Path, **states: str) -> None:
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    (folder / "stages" / ".graph.json").write_text(json.dumps({"format": "fusemega-graph-1", "needs": NEEDS}))
    for name, state in states.items():
        name = name.replace("_", "-")
        reason = "disk full" if state == "failed" else "no gain" if state == "stopped" else ""
        record: dict[str, Any] = vars(StageRecord(state, {}, {}, [name], reason=reason))  # type: ignore[arg-type]
        (folder / "stages" / f"{name}.json").write_text(json.dumps({"format": "fusemega-stage-1", **record}))


def test_a_recipe_on_this_machine(here: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = here / "out"
    records(out, split="finished", teach_a="failed", teach_b="begun")
    assert said(capsys, "status", "out").splitlines() == [
        "out: 1 of 5 stages finished; failed: teach-a; interrupted: teach-b",
        "  split    finished",
        "  teach-a  failed: disk full",
        "  teach-b  interrupted",
        "  sft      not begun: it needs teach-a",
        "  eval     not begun: it needs sft",
    ]
    holder = "from fusemega.files.lock import locked\n"
    holder += f"with locked({str(out / 'stages' / 'teach-b')!r}):\n print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    assert f"  teach-b  running: process {other.pid} on " in said(capsys, "status", "out")
    other.communicate(b"\n")
    records(out, teach_a="finished", teach_b="finished", sft="stopped")
    assert said(capsys, "status", "out").splitlines()[-2:] == [
        "  sft      stopped: no gain",
        "  eval     not needed: sft stopped",
    ]


def test_a_chain_of_jobs(here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    out = here / "out"
    records(out, split="finished", teach_a="begun", teach_b="begun")
    jobs = [("101", "split"), ("103", "sft"), ("104", "eval")]
    chain = [SlurmJob(job, name, [name], [], f"{name}-%j.out") for job, name in jobs]
    chain.insert(1, SlurmJob("102", "teach", ["teach-a", "teach-b"], ["101"], f"{out}/slurm/teach-%A_%a.out"))
    add_launch(out, Launch("0", "x", NOW, chain))
    slurm.knows("102", "0", "1")
    for job in ("103", "104"):
        slurm.knows(job, JobState="PENDING", Reason="Dependency")
    lines = said(capsys, "status", "out").splitlines()
    assert lines[0] == "out: 1 of 5 stages finished; running: teach-a, teach-b; waiting: sft, eval"
    assert lines[2] == "  teach-a  running  [job 102_0: RUNNING on node[1-2] for 0:10:00 of 1:00:00]"
    assert lines[4] == "  sft      waiting: Dependency  [job 103: PENDING (Dependency)]"
    assert lines[-2:] == [f"  log: {out}/slurm/teach-102_0.out", f"  log: {out}/slurm/teach-102_1.out"]
    # A run inside a stage is shown with it.
    records(out, teach_a="finished", teach_b="finished", sft="begun")
    Run(out / "sft").checkpoint(2)
    slurm.knows("103")
    text = said(capsys, "status", "out")
    assert "\n             iteration 4 of 10, loss 2.5" in text and "last checkpoint: iteration 2" in text
    # It fails without a word in its record; the rest is cancelled.
    slurm.knows("103", JobState="FAILED", Reason="NonZeroExitCode")
    slurm.knows("104", JobState="CANCELLED", Reason="DependencyNeverSatisfied")
    notes = out / "slurm" / "sft" / "jobs.tsv"
    notes.parent.mkdir()
    notes.write_text("start\tat\t103\t0\tnone\tnode1\nend\tat\t103\t0\tnone\trefused: disk full\n")
    lines = said(capsys, "status", "out").splitlines()
    assert lines[0] == "out: 3 of 5 stages finished; failed: sft"
    assert (
        "failed: job 103 ended: FAILED (NonZeroExitCode)  [job 103: FAILED (NonZeroExitCode); refused: disk full]"
        in lines[4]
    )
    assert lines[5].startswith("  eval     not begun: it needs sft")


def test_tasks_that_wait_are_one_line_of_slurm(here: Path, slurm: FakeSlurm) -> None:
    add_launch(
        here / "out", Launch("0", "x", NOW, [SlurmJob("102", "teach", ["teach-a", "teach-b", "teach-c"], [], "x")])
    )
    slurm.knows("102", "0", "1-2%1", JobState="PENDING")
    states = {job.stage: job.state for job in status_of(here / "out").jobs}
    assert [state.job if state else None for state in states.values()] == ["102_0", "102_1-2%1", "102_1-2%1"]


def test_the_folders_of_the_queue(here: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Run(here / "one")
    records(here / "two", split="finished")
    (slurm.here / "queue").write_text("101\n102\n102\n103\n")
    for job, folder in (("101", "one"), ("102", "two")):
        slurm.knows(job, Comment=f"fusemega:{here}/{folder}")
    slurm.knows("103")
    text = said(capsys, "status")
    assert "one: running\n" in text and "two: 1 of 5 stages finished\n" in text
    (slurm.here / "queue").write_text("103\n")
    refused = said(capsys, "status", status=2)
    assert (
        "no job of yours in the queue was submitted by fusemega launch, and .: not the folder of a training" in refused
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{}", "slurm/jobs.json: not a list of jobs of this version of fusemega"),
        ('{"format": "fusemega-jobs-1", "launches": [{"jobs": [1]}]}', "jobs.json: not a list of jobs"),
        ("[", "jobs.json"),
    ],
)
def test_a_list_of_jobs_that_is_none(
    text: str, error: str, here: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(here / "run")
    (here / "run" / "slurm").mkdir()
    (here / "run" / "slurm" / "jobs.json").write_text(text)
    assert error in said(capsys, "status", "run", status=2)
