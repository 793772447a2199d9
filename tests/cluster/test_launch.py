"""`fusemega launch`: the plan, the script, what sbatch is called with, and that a refusal leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fusemega import cli
from fusemega.cluster.jobs_file import read_launches
from fusemega.cluster.request import JobRequest, read_site
from fusemega.cluster.slurm import seconds_of
from fusemega.config import load
from fusemega.errors import UserError
from fusemega.pipeline.record import Contents, StageRecord, made_from, write_record
from fusemega.recipes.registry import read_recipe
from fusemega.training.run_file import TrainRun
from tests.cluster.conftest import RECIPE, TRAIN
from tests.cluster.fake_slurm import FakeSlurm

TWO = ("--nodes", "2", "--gpus-per-node", "2")


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """Runs a command; what it wrote to stdout, or its error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["fusemega", *words])
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert (end.value.code or 0) == status, err
    return err if status else out


def clean(script: Path) -> None:
    if shutil.which("shellcheck", path="/usr/bin:/usr/local/bin:/bin") is not None:
        run = subprocess.run(["shellcheck", "-s", "bash", str(script)], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_a_run(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "launch", "train.yaml", *TWO, "--time", "2:00:00", "--partition", "h100", "optimizer.lr=0.01")
    for line in (
        "processes   2 nodes x 2 GPUs = 4",
        "layout      4 process(es): TP 1 x PP 1 x DP 4",
        "batch       in the first update, of 4 data-parallel rank(s): ",
        "checkpoints every 2 iterations and at the end; and when a job's time limit is near",
        "time        2:00:00 a job; the time of an iteration is unknown: no run/metrics.jsonl",
        "submitted   run  job 101",
        "    fusemega status run\n",
        f"    tail -F {place}/run/slurm/run-101.out",
    ):
        assert line in out
    assert [words[0] for words in slurm.calls("sbatch")] == ["--test-only", "--parsable"]
    script = place / "run" / "slurm" / "train.sbatch"
    assert slurm.submitted() == [[str(script)]]
    clean(script)
    text = script.read_text()
    head = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert head == [
        "--job-name=run", "--time=2:00:00", "--partition=h100", "--nodes=2", "--ntasks-per-node=1",
        "--gpus-per-node=2", "--cpus-per-task=16", "--exclusive", "--mem=0", "--requeue", "--open-mode=append",
        f"--output={place}/run/slurm/%x-%j.out", f"--comment=fusemega:{place}/run", f"--chdir={place}",
    ]  # fmt: skip
    settings = place / "run" / "slurm" / "run.yaml"
    run = load(TrainRun, settings)
    assert run == load(TrainRun, "train.yaml", ["optimizer.lr=0.01"]), "what the job reads is what was checked"
    assert f"set -- {settings} {place}/run " in text and "fusemega launch train.yaml --nodes 2" in text
    assert "\nexport NPROC_PER_NODE=2\n" in text, "an exclusive node has more GPUs than were asked for"
    library = Path("/").joinpath(Path(cli.__file__).parents[2], "slurm", "lib.sh").read_text()
    assert library in text and text.index("read_site\n\nrun_file=") > text.index(library)
    assert sorted(path.name for path in settings.parent.iterdir()) == [
        "exclude.sbatch", "jobs.json", "run.yaml", "train.sbatch",
    ]  # fmt: skip
    (launch,) = read_launches(place / "run")
    assert launch.jobs[0].job == "101" and launch.command.startswith("fusemega launch train.yaml")
    # A folder that only a job script has written in is free for the run.
    assert "starts from the loaded weights" in said(capsys, "train", "train.yaml", "--dry-run")


def test_a_layout_that_crosses_nodes(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--nodes", "2", "--gpus-per-node", "1", "parallel.tensor_model_parallel_size=2")
    out = said(capsys, "launch", "train.yaml", *words)
    assert "note        tensor parallelism over 2 ranks crosses nodes of 1: slow\n" in out


def test_printed_and_nothing_written(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("site.env").write_text("# of the site\nSBATCH_ACCOUNT=abc\nSBATCH_QOS=high\nexport NCCL_IB_HCA='mlx5'\n")
    with pytest.raises(SystemExit):
        cli.main(["launch", "train.yaml", *TWO, "--env-file", "site.env", "--print"])
    out, err = capsys.readouterr()
    assert "processes   2 nodes x 2 GPUs = 4" in err and out.startswith("#!/bin/bash\n# Not submitted yet.")
    assert not Path("run").exists()
    script = tmp_path / "printed.sbatch"
    script.write_text(out)
    clean(script)
    assert (
        "#SBATCH --account=abc\n#SBATCH --qos=high\n" in out
        and "export NCCL_IB_HCA='mlx5'\nEND_OF_FUSEMEGA_FILE\n" in out
    )
    # The first lines put the settings in their place, as a whole.
    written = out[: out.index("FUSEMEGA_SLURM=")]
    subprocess.run(["bash", "-c", written], check=True, env={"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"})
    assert load(TrainRun, "run/slurm/run.yaml") == load(TrainRun, "train.yaml")
    assert sorted(path.name for path in Path("run/slurm").iterdir()) == ["exclude.sbatch", "run.yaml", "site.env"]


def test_what_an_earlier_job_measured(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps({"fusemega": "0", "run": TRAIN}))
    rows = [{"iteration": i + 1, "iteration-time": seconds} for i, seconds in enumerate([900.0, 7200.0, 7200.0])]
    Path("run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = said(capsys, "launch", "train.yaml", *TWO, "--time=180", "training.save_interval=4")
    assert "7.2e+03 s an iteration (median of the last 3 in run/metrics.jsonl); 6 left: 12:00:00, 4 job(s)" in plan
    assert "8:00:00 apart, longer than a job: a node that fails costs all of its time; 1 iterations fit" in plan


def test_jobs_that_are_still_at_work(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "launch", "train.yaml", *TWO)
    slurm.knows("101", JobState="PENDING")
    refused = said(capsys, "launch", "train.yaml", *TWO, status=2)
    assert (
        "error: run: job 101 of an earlier launch is PENDING; `fusemega status run` shows it, `scancel 101`" in refused
    )
    assert len(slurm.submitted()) == 1
    slurm.knows("101", JobState="FAILED")
    assert "job 102" in said(capsys, "launch", "train.yaml", *TWO)
    assert [launch.ids() for launch in read_launches(place / "run")] == [["101"], ["102"]]


def test_slurm_refuses_and_nothing_is_left(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm.here / "refuses").write_text("allocation failure: Requested node configuration is not available\n")
    refused = said(capsys, "launch", "train.yaml", "--nodes", "4", "--gpus-per-node", "1", status=2)
    assert refused == "error: job run: sbatch refuses it: Requested node configuration is not available\n"
    assert not Path("run").exists() and slurm.submitted() == []


def test_no_slurm(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place))
    refused = said(capsys, "launch", "train.yaml", *TWO, status=2)
    assert refused.startswith("error: sbatch: not found: this machine has no Slurm") and not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("train.yaml", "--nodes=3", "--gpus-per-node=1", "parallel.tensor_model_parallel_size=2"),
            "--nodes 3 --gpus-per-node 1: parallel: tensor_model_parallel_size 2 x",
        ),
        (
            ("recipe.yaml", "--nodes=3", "--gpus-per-node=1", "parallel.tensor_model_parallel_size=2"),
            "does not divide the 3",
        ),
        (("recipe.yaml", *TWO, "nproc=2"), "nproc=2: --nodes 2 x --gpus-per-node 2 gives 4 processes; leave nproc out"),
        (("train.yaml", "--time=1h"), "--time: found '1h'; allowed: MINUTES"),
        (("train.yaml", "--sbatch=qos=high"), "--sbatch: found 'qos=high'; expected one option"),
        (("train.yaml", "--partition=a b"), "--partition: found 'a b'; expected a name"),
        (("train.yaml", "--env-file=nowhere.env"), "nowhere.env: "),
        (("train.yaml", "--env-file=site.env"), "site.env:2: CONTAINER_IMAGE has no value; fill it in"),
        (("train.yaml", "training.train_itres=3"), "training.train_itres: unknown key (did you mean 'train_iters'?)"),
        (("train.yaml", "model.load=nowhere"), "nowhere: no such folder"),
        (("train.yaml", "--quick", "output_dir=target"), "target: exists and is not the folder of a training run"),
        (("train.yaml", "output_dir=data.jsonl/run"), "data.jsonl/run: cannot write there"),
    ],
)
def test_refused_and_nothing_submitted(
    words: tuple[str, ...], error: str, place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("site.env").write_text("A=1\nCONTAINER_IMAGE=\n")
    before = sorted(place.rglob("*"))
    refused = said(capsys, "launch", *words, status=2)
    assert error in refused and refused.startswith("error: ") and refused.count("\n") == 1
    assert slurm.calls("sbatch") == [] and sorted(place.rglob("*")) == before


def test_a_launch_without_a_site_uses_none_of_an_earlier_one(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("site.env").write_text("CONTAINER_IMAGE=/old.sqsh\n")
    said(capsys, "launch", "train.yaml", *TWO, "--env-file", "site.env")
    slurm.knows(read_launches(Path("run"))[-1].jobs[0].job, JobState="COMPLETED")
    said(capsys, "launch", "train.yaml", *TWO)
    assert "CONTAINER_IMAGE" not in Path("run/slurm/site.env").read_text()
    assert Path("run/slurm/site.env.before").read_text() == "CONTAINER_IMAGE=/old.sqsh\n", "it may be somebody's own"


def test_a_sites_number_of_ranks(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("site.env").write_text("NPROC_PER_NODE=4\nPYTHON=/opt/python\n")
    assert "1 node x 4 GPUs = 4" in said(capsys, "launch", "train.yaml", "--env-file", "site.env")
    text = Path("run/slurm/train.sbatch").read_text()
    assert "export PYTHON=" not in text and Path("run/slurm/site.env").read_text().startswith("NPROC_PER_NODE=4\n")
    refused = said(capsys, "launch", "train.yaml", "--env-file", "site.env", "--gpus-per-node=8", status=2)
    assert "--gpus-per-node 8, and site.env: NPROC_PER_NODE is 4" in refused


CHAIN = {
    "split": ([], "single"),
    "teach": (["split"], "ranks"),
    "align-other": ([], "single"),
    "target-alike": (["split", "teach"], "ranks"),
    "target-other": (["split", "teach", "align-other"], "ranks"),
    "merge": (["target-alike", "target-other"], "single"),
    "eval": ([], "ranks"),
    "eval-target-alike": (["target-alike"], "ranks"),
    "eval-target-other": (["target-other"], "ranks"),
    "eval-merged": (["merge"], "ranks"),
}


def test_a_recipe_is_a_chain(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "launch", "recipe.yaml", *TWO)
    assert "stages      14, 0 finished; 10 job(s)" in out
    assert "  teach: all processes, array of 3: teach-target, teach-alike, teach-other; after split\n" in out
    (launch,) = read_launches(place / "out")
    jobs = {job.name: job for job in launch.jobs}
    ids = {job.job: job.name for job in launch.jobs}
    assert {name: [ids[one] for one in job.after] for name, job in jobs.items()} == {
        name: sorted(after, key=list(jobs).index) for name, (after, _) in CHAIN.items()
    }
    assert jobs["eval"].stages == ["eval-target", "eval-alike", "eval-other"]
    submitted = {words[[w.startswith("--job-name=") for w in words].index(True)]: words for words in slurm.submitted()}
    for name, (after, kind) in CHAIN.items():
        words = submitted[f"--job-name={name}"]
        assert ("--exclusive" in words) == (kind == "ranks") and ("--nodes=2" in words) == (kind == "ranks")
        assert ("--kill-on-invalid-dep=yes" in words) == bool(after)
    teach = jobs["teach"].job
    waits = submitted["--job-name=target-other"]
    assert f"--dependency=afterok:{jobs['split'].job}:{teach}_0:{teach}_2:{jobs['align-other'].job}" in waits
    assert "--array=0-2" in submitted["--job-name=teach"]
    script = place / "out" / "slurm" / "stage.sbatch"
    assert submitted["--job-name=teach"][-4:] == [str(script), "teach-target", "teach-alike", "teach-other"]
    clean(script)
    assert yaml.safe_load((script.parent / "recipe.yaml").read_text()) == {**RECIPE, "nproc": 4}
    assert "out: 0 of 14 stages finished\n" in said(capsys, "status", "out")
    # `fusemega run` on what the jobs read, or on the recipe itself, takes the same folder for its own.
    assert "run: new" in said(capsys, "run", "recipe.yaml", "--dry-run")


def test_finished_stages_get_no_job(place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, settings = read_recipe("recipe.yaml")
    graph = recipe.graph(settings)
    states = {"split": "finished", "teach-target": "finished", "teach-alike": "failed", "eval-target": "stopped"}
    for stage in graph.stages:
        if stage.name not in states:
            continue
        for path in map(Path, stage.outputs.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(stage.name)
        contents = Contents(graph)
        inputs, outputs = ({k: contents.of(p) for k, p in of.items()} for of in (stage.inputs, stage.outputs))
        owns = [str(path.relative_to(place / "out")) for path in stage.owned()]
        state = states[stage.name]
        write_record(graph, stage, StageRecord(state, made_from(stage), inputs, owns, outputs, None, "no good"))  # type: ignore[arg-type]
    out = said(capsys, "launch", "recipe.yaml", *TWO)
    assert "stages      14, 2 finished; 9 job(s)" in out and "  eval-target: no job: no good\n" in out
    (launch,) = read_launches(place / "out")
    jobs = {job.name: job for job in launch.jobs}
    assert "split" not in jobs and jobs["teach"].stages == ["teach-alike", "teach-other"] and jobs["teach"].after == []
    assert jobs["eval"].stages == ["eval-alike", "eval-other"]


def test_a_chain_is_submitted_whole_or_not_at_all(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm.here / "refused").write_text("104")
    refused = said(capsys, "launch", "recipe.yaml", *TWO, status=2)
    assert "sbatch refuses it: no more" in refused
    assert slurm.calls("scancel") == [["101", "102", "103"]] and not Path("out").exists()


def test_a_printed_chain(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = said(capsys, "launch", "recipe.yaml", *TWO, "--print")
    (tmp_path / "printed.sbatch").write_text(out)
    clean(tmp_path / "printed.sbatch")
    lines = [line for line in out.splitlines() if line.startswith("#     sbatch ")]
    assert len(lines) == 10 and lines[-1].endswith(" SCRIPT eval-merged") and "afterok:ID_OF_merge" in lines[-1]
    assert not Path("out").exists()


def test_durations() -> None:
    assert [seconds_of(text) for text in ("5", "5:30", "1:00:00", "1-0", "1-0:30", "1-01:00:30")] == [
        300, 330, 3600, 86400, 88200, 90030,
    ]  # fmt: skip
    assert seconds_of("a day") is None and seconds_of("1:2:3:4") is None
    with pytest.raises(UserError):
        JobRequest(time="0")


def test_a_site_file(tmp_path: Path) -> None:
    path = tmp_path / "site.env"
    path.write_text('A=1 # one\nexport B="two words"\nmodule load cuda\n\n  # C=\nD=$A/$HOME\n')
    assert read_site(path).values == {"A": "1", "B": "two words", "D": f"1/{os.environ['HOME']}"}
    path.write_text("A=x\nB='$A'\nC=${A}y\n")
    assert read_site(path).values == {"A": "x", "B": "$A", "C": "xy"}, "as bash reads it"
    for text, error in (
        ("A=1\nB=${NOWHERE_SET}/x\n", "site.env:2: B refers to NOWHERE_SET, which is not set"),
        ("SBATCH_TIMELIMIT=5\n", "site.env:1: SBATCH_TIMELIMIT: not read here; allowed: SBATCH_PARTITION,"),
        ("A= # later\n", "site.env:1: A has no value"),
        ("CONTAINER_MOUNTS=/a:/a\n", "CONTAINER_IMAGE is not set, but CONTAINER_MOUNTS"),
        ("A=''\n", "site.env:1: A has no value"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(error)):
            read_site(path)
