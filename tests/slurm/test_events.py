"""Real runs on two nodes: each event of a cluster, and the curve that is left is that of a run without it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import fusemega
from fusemega.checkpoint.series import latest_checkpoint
from fusemega.monitoring.ranks import rank_file, read_rank
from fusemega.training.records import read_metrics
from tests.slurm.cluster import Cluster
from tests.slurm.job import LONG, ROOT, Job, curve

Submit = Callable[..., Job]
Curve = list[dict[str, float]]


def _alone(run_file: Path, folder: Path, *words: str) -> Curve:
    """The curve of the same run from `fusemega train` on this machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fusemega", "train", str(run_file), f"output_dir={folder}", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return curve(folder)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Curve]:
    """Curves by name; each is made once."""
    return {}


@pytest.fixture
def two_ranks(run_file: Path, tmp_path: Path, uninterrupted: dict[str, Curve]) -> Curve:
    if "two" not in uninterrupted:
        uninterrupted["two"] = _alone(run_file, tmp_path / "reference", "--nproc", "2")
    return uninterrupted["two"]


def newest(job: Job) -> int:
    """Iteration of the newest checkpoint that is whole."""
    found = latest_checkpoint(job.out / "checkpoints")
    return 0 if found is None else json.loads((found / "state.json").read_text())["iteration"]


def test_two_nodes_of_two_ranks_requeued(submit: Submit, run_file: Path, tmp_path: Path) -> None:
    """Its curve is that of one process."""
    job = submit("train.sbatch", run_file, NPROC_PER_NODE=2)
    job.wait_rows(8)
    job.cluster.run("scontrol", "requeue", job.number)
    reference = _alone(run_file, tmp_path / "reference")
    job.ended()
    assert (job.out / "done").read_text() == "24\n" and "TP 1 x PP 1 x DP 4" in job.log
    assert "TERM: Slurm has decided what comes next" in job.log
    starts = [line for line in job.tries() if line[0] == "start"]
    assert len(starts) == 2 and int(starts[1][4]) >= 8  # the last save was on TERM: no step is done twice
    assert len(job.curve()) == len(reference) == 24
    for mine, theirs in zip(job.curve(), reference, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


@pytest.mark.slurm_full
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_requeued(submit: Submit, run_file: Path, two_ranks: Curve, launcher: str) -> None:
    job = submit("train.sbatch", run_file, LAUNCHER=launcher)
    job.wait_rows(8)
    job.cluster.run("scontrol", "requeue", job.number)
    job.ended()
    starts = [line for line in job.tries() if line[0] == "start"]
    assert len(starts) == 2 and int(starts[1][4]) >= 8
    assert job.curve() == two_ranks


@pytest.mark.slurm_full
def test_the_time_limit(submit: Submit, run_file: Path, two_ranks: Curve) -> None:
    job = submit("train.sbatch", run_file, options=["--time=5"], STOP_MARGIN=150, FUSEMEGA_TEST_PAUSE=8)
    job.wait(lambda: any(line[-1] == "requeue" for line in job.tries()), "the requeue")
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    assert "s until the time limit" in job.log and "SIGUSR1: stopping after this step" in job.log
    assert newest(job) == len(job.curve())  # all that was done is saved
    job.ended()
    assert job.curve() == two_ranks and (job.out / "saves.jsonl").exists()


@pytest.mark.slurm_full
@pytest.mark.parametrize("partition", ["batch", "nograce"])
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_preempted(
    cluster: Cluster, submit: Submit, run_file: Path, two_ranks: Curve, tmp_path: Path, partition: str, launcher: str
) -> None:
    if (partition, launcher) == ("nograce", "srun"):
        pytest.skip("to Slurm this is a requeue, which is tried with both launchers")
    job = submit("train.sbatch", run_file, options=["-p", partition], LAUNCHER=launcher)
    job.wait_rows(8)
    urgent = cluster.submit(
        "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 3", "-o", "/dev/null", folder=tmp_path
    )
    cluster.wait_state(urgent, "COMPLETED")
    job.ended()
    starts = [line for line in job.tries() if line[0] == "start"]
    assert len(starts) == 2 and int(starts[1][4]) >= 8
    assert job.curve() == two_ranks
    assert ("TERM: Slurm has decided" in job.log) == (partition == "nograce")


@pytest.mark.slurm_full
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_goes_down(cluster: Cluster, submit: Submit, run_file: Path, two_ranks: Curve, node: str) -> None:
    """Also that of rank 0, whose process had the run's lock, and of the job script."""
    job = submit("train.sbatch", run_file)
    job.wait_rows(8)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    cluster.wait(lambda: int(cluster.field(job.number, "Restarts") or 0) > 0, "the requeue", LONG)
    cluster.run(
        "scontrol", "update", f"NodeName={node}", "State=RESUME", check=False
    )  # its slurmd may have asked for it
    job.ended()
    starts = [line for line in job.tries() if line[0] == "start"]
    assert len(starts) == 2 and int(starts[1][4]) >= 6  # at least the last regular save
    assert job.curve() == two_ranks


@pytest.mark.slurm_full
def test_scancel_saves_and_a_new_job_goes_on(submit: Submit, run_file: Path, two_ranks: Curve) -> None:
    job = submit("train.sbatch", run_file)
    job.wait_rows(8)
    job.cluster.run("scancel", job.number)
    job.ended("CANCELLED")
    assert newest(job) == len(job.curve()) >= 8 and not (job.out / "done").exists()
    again = submit("train.sbatch", run_file)
    again.ended()
    assert again.curve() == two_ranks and len(again.tries()) == 2


@pytest.mark.slurm_full
def test_a_checkpoint_that_crashes_on_loading(submit: Submit, run_file: Path, two_ranks: Curve) -> None:
    """Two starts end while they load it; the third takes the one before it, and says so."""
    first = submit("train.sbatch", run_file)
    first.wait_rows(8)
    first.cluster.run("scancel", first.number)
    first.ended("CANCELLED")
    bad = newest(first)
    job = submit("train.sbatch", run_file, FUSEMEGA_TEST_CRASH=f"iter_{bad:07d}")
    job.ended()
    assert f"iter_{bad:07d}: 2 starts in a row ended while they loaded it; resuming from iter_0000006" in job.log
    assert [line[4] for line in job.tries() if line[0] == "start"] == [str(bad)] * 3
    assert job.curve() == two_ranks


@pytest.mark.slurm_full
def test_a_folder_of_another_run_is_refused(submit: Submit, run_file: Path) -> None:
    job = submit("train.sbatch", run_file, "training.train_iters=6")
    job.ended()
    settings = yaml.safe_load(run_file.read_text())
    settings["optimizer"]["lr"] = 1e-3
    run_file.write_text(yaml.safe_dump(settings))
    again = submit("train.sbatch", run_file)
    again.ended("FAILED")
    assert "cannot resume: the checkpoint has" in again.log and len(again.tries()) == 2
    assert again.cluster.field(again.number, "ExitCode") == "2:0"


@pytest.mark.slurm_full
def test_preflight_comes_first(submit: Submit, run_file: Path) -> None:
    words = [run_file, "training.train_iters=2"]
    job = submit("train.sbatch", *words, options=["--gpus-per-node=0"], PREFLIGHT=1)  # there are none
    job.ended()
    assert "preflight: passed, 2 rank(s) on 2 node(s) (node1, node2)" in job.log
    assert job.log.index("preflight: passed") < job.log.index("iteration 1/2")


@pytest.mark.slurm_full
def test_a_node_of_another_version_is_left_out(
    cluster: Cluster, submit: Submit, run_file: Path, two_ranks: Curve, tmp_path: Path
) -> None:
    """A line more in one file of fusemega, on node2 alone."""
    file = Path(fusemega.__file__).with_name("errors.py")
    (tmp_path / "errors.py").write_text(file.read_text() + "# another version\n")
    options = ["--partition=spare", "--gpus-per-node=0"]
    cluster.mount_over("node2", file, tmp_path / "errors.py")
    try:
        job = submit("train.sbatch", run_file, options=options, PREFLIGHT="exclude")
        job.ended()
    finally:
        cluster.unmount("node2", file)
    assert "bad node node2: fusemega is " in job.log and "requeueing without them" in job.log
    assert [line[-1] for line in job.tries()] == ["node[1-2]", "requeue without node2", "node[1,3]", "done"]
    assert cluster.field(job.number, "ExcNodeList") == "node2"
    assert "preflight: passed, 2 rank(s) on 2 node(s) (node1, node3)" in job.log
    assert job.curve() == two_ranks


def process_of(job: Job, rank: int) -> int:
    """Its process on this machine, from its heartbeat."""
    state = read_rank(rank_file(job.out, rank))
    assert state is not None
    return state.pid


@pytest.mark.slurm_full
def test_a_stopped_rank_is_named(submit: Submit, run_file: Path, two_ranks: Curve) -> None:
    """With the intervals that a run has by default."""
    job = submit("train.sbatch", run_file)
    job.wait_rows(8)
    pid = process_of(job, 1)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        job.wait(lambda: f"rank 1 (process {pid} on node2) has written no heartbeat for " in job.log, "the name")
        print(f"named after {time.monotonic() - started:.0f} s")
    finally:
        os.kill(pid, signal.SIGCONT)
    job.ended()
    assert f"rank 1 (process {pid} on node2): going on, after " in job.log
    assert job.curve() == two_ranks and len(job.tries()) == 2


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """The process runs for a fifth of the time."""
    over = threading.Event()

    def halt() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.04)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slurm_full
def test_a_slow_rank_is_named(submit: Submit, run_file: Path) -> None:
    job = submit(
        "train.sbatch",
        run_file,
        "training.train_iters=100000",
        "monitoring.straggler_interval=5",
        FUSEMEGA_TEST_PAUSE=0,
    )
    job.wait_rows(8)
    with slowed(process_of(job, 1)):
        job.wait(
            lambda: "rank 1 on node2 is slower than the other ranks of its pipeline stage: " in job.log, "the name"
        )
    assert "rank 0 on node1 is slower" not in job.log
    job.cluster.run("scancel", job.number)
    job.ended("CANCELLED")
    ratios = [row["ranks/slowest ratio"] for row in read_metrics(job.out) if row.get("ranks/slowest") == 1]
    assert len(ratios) >= 3 and max(ratios) > 1.3
