"""What the job script decides after a step, with a stand-in for the trainer: seconds each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.job import Job

Submit = Callable[..., Job]
StandIn = Callable[[str], Path]

# Makes one update more durable, as a trainer does.
_SAVE = """
mkdir -p out/checkpoints
tracker=out/checkpoints/latest_checkpointed_iteration.txt
echo $(($(cat $tracker 2>/dev/null || echo 0) + 1)) > $tracker
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out  # here\n")
    return path


def test_saved_and_not_done_is_requeued_until_done(submit: Submit, stand_in: StandIn, small: Path) -> None:
    """As after a signal: under torchrun a good save ends with the status of a crash."""
    body = _SAVE + "[[ $(cat $tracker) != 3 ]] || { touch out/done; exit 0; }; exit 143"
    job = submit("train.sbatch", small, PYTHON=stand_in(body))
    job.ended()
    assert [line[4:] for line in job.tries() if line[0] == "end"] == [["1", "requeue"], ["2", "requeue"], ["3", "done"]]
    assert [line[3] for line in job.tries() if line[0] == "start"] == ["0", "1", "2"]
    assert "start 2 of job" in job.log and job.log.count("not done: requeueing") == 2  # one log, appended to


def test_no_progress_has_a_limit(submit: Submit, stand_in: StandIn, small: Path) -> None:
    job = submit("train.sbatch", small, PYTHON=stand_in("exit 1"), MAX_STALLS=2)
    job.ended("FAILED")
    assert [line[-1] for line in job.tries() if line[0] == "end"] == [
        "requeue",
        "2 starts in a row without progress (MAX_STALLS): giving up",
    ]


def test_restarts_have_a_limit(submit: Submit, stand_in: StandIn, small: Path) -> None:
    job = submit("train.sbatch", small, PYTHON=stand_in(_SAVE + "exit 1"), MAX_RESTARTS=1)
    job.ended("FAILED")
    assert "restarted 1 times (MAX_RESTARTS): giving up" in job.log


def test_a_users_error_is_not_tried_again(cluster: Cluster, submit: Submit, stand_in: StandIn, small: Path) -> None:
    (small.parent / "out").mkdir()
    (small.parent / "out" / "done").touch()  # of another run
    body = 'echo "run.yaml: data.path is missing" > "$FUSEMEGA_REFUSED"; exit 1'
    job = submit("train.sbatch", small, PYTHON=stand_in(body))
    job.ended("FAILED")
    assert "refused: run.yaml: data.path is missing" in job.log and len(job.tries()) == 2
    assert cluster.field(job.number, "ExitCode") == "2:0"


def test_the_signal_is_repeated_until_it_is_heard(submit: Submit, stand_in: StandIn, small: Path) -> None:
    """A process that still starts ignores it. Its second life ends by itself."""
    listens = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit()); time.sleep(600)"
    body = f"""{_SAVE}
    [[ $(cat $tracker) == 1 ]] || {{ touch out/done; exit 0; }}
    sleep 12
    exec {sys.executable} -c "{listens}"
    """
    job = submit("train.sbatch", small, PYTHON=stand_in(body))
    job.wait(lambda: (job.out / "checkpoints").exists(), "the start")
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.ended()
    assert "USR1: the command is asked to save and stop (USR1)" in job.log
    assert [line[-1] for line in job.tries() if line[0] == "end"] == ["requeue", "done"]


@pytest.mark.parametrize(
    ("saves", "seconds", "margin"),
    [
        ("", 7200, 600),  # nothing is known
        ("", 1200, 300),  # a quarter of the job at most
        ('{"iteration": 5, "save-time": 40.0, "iteration-time": 2.5}\n{"iteration": 6, "save-time": 30', 7200, 145),
        ('{"iteration": 5, "save-time": 4000.0, "iteration-time": 2.5}\n', 7200, 3600),  # half of the job at most
    ],
)
def test_the_margin_is_what_saves_took(tmp_path: Path, saves: str, seconds: int, margin: int) -> None:
    from tests.slurm.test_templates import in_bash

    (tmp_path / "saves.jsonl").write_text(saves)
    done = in_bash(f"saves={tmp_path}/saves.jsonl; _margin {seconds}")
    assert (done.stdout.strip(), done.stderr) == (str(margin), "")
    assert in_bash(f"saves={tmp_path}/saves.jsonl; STOP_MARGIN=77; _margin {seconds}").stdout.strip() == "77"


def test_a_job_that_is_over_its_steps_is_not_done(submit: Submit, stand_in: StandIn, small: Path) -> None:
    """Status 0 without the marker: preemption with grace looks like that."""
    body = _SAVE + "[[ $(cat $tracker) == 1 ]] || touch out/done; exit 0"
    job = submit("train.sbatch", small, PYTHON=stand_in(body), LAUNCHER="srun")
    job.ended()
    assert [line[-1] for line in job.tries() if line[0] == "end"] == ["requeue", "done"]


_STAGE_ENDS_FROM_OUTSIDE = """
if [[ "$*" == *" --begin "* ]]; then
    [[ -e begun ]] || { touch begun; exit 143; }
    while (($# > 1)); do shift; done
    printf '%s\\n' ranks 1 "$PWD/out/rows" teach teach.yaml > "$1"
elif [[ "$*" == *" --end"* ]]; then
    [[ -e ended ]] || { touch ended; exit 137; }
else
    mkdir -p out && echo row > out/rows
fi
"""


def test_a_stage_is_requeued_where_its_beginning_or_end_is_cut(submit: Submit, stand_in: StandIn, small: Path) -> None:
    job = submit("stage.sbatch", small, "out", "teach-a", PYTHON=stand_in(_STAGE_ENDS_FROM_OUTSIDE))
    job.ended()
    tries = job.tries(job.out / "slurm" / "teach-a")
    assert [line[-1] for line in tries if line[0] == "end"] == ["requeue", "requeue", "done"]
    assert [line[4] for line in tries if line[0] == "start"] == ["beginning", "0 bytes", "4 bytes"]


def test_a_stage_that_never_begins_has_a_limit(submit: Submit, stand_in: StandIn, small: Path) -> None:
    job = submit("stage.sbatch", small, "out", "teach-a", PYTHON=stand_in("exit 1"), MAX_STALLS=2)
    job.ended("FAILED")
    assert "2 starts in a row without progress (MAX_STALLS): giving up" in job.log


def test_a_stage_that_is_refused_when_it_begins(submit: Submit, stand_in: StandIn, small: Path) -> None:
    body = 'echo "recipe.yaml: no such stage" > "$FUSEMEGA_REFUSED"; exit 2'
    job = submit("stage.sbatch", small, "out", "teach-a", PYTHON=stand_in(body))
    job.ended("FAILED")
    assert "refused: recipe.yaml: no such stage" in job.log
    assert job.cluster.field(job.number, "ExitCode") == "2:0"


_NODE1_IS_BAD = """
[[ "$*" == *" preflight "* ]] || { touch out/done; exit 0; }
while (($# > 1)); do shift; done
[[ $SLURMD_NODENAME != node1 ]] || { echo node1 > "$1"; exit 1; }
"""


def test_a_bad_node_is_named(submit: Submit, stand_in: StandIn, small: Path) -> None:
    options = ["--nodes=1", "--nodelist=node1"]
    job = submit("train.sbatch", small, options=options, PYTHON=stand_in(_NODE1_IS_BAD), PREFLIGHT=1)
    job.ended("FAILED")
    assert "bad nodes: node1; leave them out (sbatch --exclude=node1), or set PREFLIGHT=exclude" in job.log


def test_a_bad_node_is_left_out_when_asked(cluster: Cluster, submit: Submit, stand_in: StandIn, small: Path) -> None:
    job = submit("train.sbatch", small, options=["--nodes=1"], PYTHON=stand_in(_NODE1_IS_BAD), PREFLIGHT="exclude")
    job.ended()
    assert [line[-1] for line in job.tries()] == ["node1", "requeue without node1", "node2", "done"]
    assert cluster.field(job.number, "ExcNodeList") == "node1"
