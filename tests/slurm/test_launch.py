"""`fusemega launch` and `fusemega status` on a real Slurm of two pretend nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import RECIPE, write_inputs
from tests.recipes.small import write_tiny_models
from tests.recipes.test_implicit import RECIPE as IMPLICIT
from tests.recipes.test_implicit import prompts, write
from tests.recipes.test_implicit_runs import QUESTIONS, SELECT
from tests.recipes.test_mutual import MUTUAL
from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.job import LONG, ROOT

TWO = ("--nodes", "2", "--gpus-per-node", "1", "--cpus-per-gpu", "1", "--time", "60")
RANKS = ("--nodes", "2", "--gpus-per-node", "2", "--cpus-per-gpu", "1", "--time", "60")


class Place:
    """A folder with tiny models, as a user of the cluster has it.

    Args:
        folder: an empty one.
        cluster: its Slurm.
    """

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        write_inputs(folder)
        self.variables = {"FUSEMEGA_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
        self.variables |= {"OMP_NUM_THREADS": "1", "FUSEMEGA_DEVICE": "cpu"}
        self.env = cluster.env | self.variables

    def write_recipe(self, **settings: object) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **settings}))

    def fusemega(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fusemega", *words], cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr

    def jobs(self, output: str) -> dict[str, str]:
        """Name -> id, of the newest launch."""
        said = json.loads((self.folder / output / "slurm" / "jobs.json").read_text())
        return {job["name"]: job["job"] for job in said["launches"][-1]["jobs"]}

    def ended(self, output: str, seconds: float = LONG) -> dict[str, str]:
        """Waits for all jobs of the newest launch; name -> state."""
        jobs, found = self.jobs(output), dict[str, str]()

        def have_ended() -> bool:
            for name in jobs.keys() - found.keys():  # Slurm forgets a job some minutes after its end
                shown = self.cluster.run("scontrol", "show", "job", "-o", jobs[name], check=False)
                states = set(re.findall(r" JobState=(\w+)", shown))  # of the tasks of an array
                if states and states <= ENDED:
                    found[name] = "/".join(sorted(states))
            return found.keys() == jobs.keys()

        self.cluster.wait(have_ended, f"jobs {jobs}", seconds)
        return found

    def logs(self, output: str) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / output / "slurm").glob("*.out")))

    def states(self, output: str) -> dict[str, str]:
        """Stage -> state in its record."""
        found = (self.folder / output / "stages").glob("[!.]*.json")
        return {path.stem: json.loads(path.read_text())["state"] for path in found}


@pytest.fixture
def place(tmp_path: Path, cluster: Cluster) -> Place:
    return Place(tmp_path, cluster)


def test_a_run_and_its_status(place: Place) -> None:
    told = place.fusemega("launch", "train.yaml", *RANKS)
    (job,) = place.jobs("run").values()
    assert f"job {job}" in told and "= 4" in told
    queued = place.fusemega("status")
    assert queued.startswith("run: ") and f"job {job}: " in queued
    assert place.ended("run") == {"run": "COMPLETED"}, place.logs("run")
    done = place.fusemega("status", "run")
    assert done.startswith("run: finished\n") and "iteration 6 of 6" in done and "checkpoint: iteration 6" in done
    assert f"  job {job}: COMPLETED; done\n" in done
    state = json.loads((place.folder / "run" / "checkpoints" / "iter_0000006" / "state.json").read_text())
    assert state["layout"]["world_size"] == 4


def test_stages_as_jobs(place: Place) -> None:
    """What a job has finished is finished for `fusemega run`."""
    place.write_recipe(sources={"alike": "alike"})
    place.fusemega("launch", "recipe.yaml", *TWO, "--until", "teach-alike")
    assert place.ended("out") == {"split": "COMPLETED", "teach-alike": "COMPLETED"}, place.logs("out")
    dry = place.fusemega("run", "recipe.yaml", "--until", "teach-alike", "--dry-run")
    assert re.search(r"^split +skip: finished$", dry, re.MULTILINE), dry
    assert re.search(r"^teach-alike +skip: finished$", dry, re.MULTILINE), dry


@pytest.mark.slurm_full
def test_a_stage_that_fails_and_what_is_left(place: Place) -> None:
    place.write_recipe(sources={"alike": "alike"})
    text = (place.folder / "data.jsonl").read_text()
    (place.folder / "data.jsonl").write_text("no row\n")
    place.fusemega("launch", "recipe.yaml", *TWO, "--until", "teach-alike")
    assert place.ended("out") == {"split": "FAILED", "teach-alike": "CANCELLED"}, place.logs("out")
    said = place.fusemega("status", "out")
    assert "; failed: split\n" in said and "error: data.jsonl:1" in said
    (place.folder / "data.jsonl").write_text(text)
    place.fusemega("launch", "recipe.yaml", *TWO, "--until", "teach-alike")
    refused = place.fusemega("launch", "recipe.yaml", *TWO, status=2)
    assert re.search(r"out: job \d+ of an earlier launch is ", refused)
    assert set(place.ended("out").values()) == {"COMPLETED"}, place.logs("out")
    # By hand, of a stage that is finished.
    words = (place.folder / "out" / "slurm" / "stage.sbatch", "teach-alike")
    options = ("--gpus-per-node=1", "--mem=1000", f"--output={place.folder}/by-hand.out")
    job = place.cluster.submit(*options, *words, folder=place.folder, **place.variables)
    assert place.cluster.wait_state(job, seconds=LONG) == "COMPLETED"
    assert "job: teach-alike has nothing to do" in (place.folder / "by-hand.out").read_text()
    assert "nothing to do: no stage of out has to run" in place.fusemega(
        "launch", "recipe.yaml", *TWO, "--until", "teach-alike"
    )


@pytest.mark.slurm_full
def test_a_recipe_as_a_chain_is_what_one_run_gives(place: Place) -> None:
    told = place.fusemega("launch", "recipe.yaml", *RANKS)
    assert "array of 3: teach-target, teach-alike, teach-other; after split" in told
    ends = place.ended("out")
    assert set(ends.values()) == {"COMPLETED"}, place.logs("out")
    assert "out: 14 of 14 stages finished" in place.fusemega("status", "out")
    assert "nothing to do: no stage of out has to run" in place.fusemega("launch", "recipe.yaml", *RANKS)
    here = place.fusemega("run", "recipe.yaml", "nproc=4", "output_dir=here")
    summary = sorted(path.name for path in (place.folder / "here").iterdir())
    assert sorted(path.name for path in (place.folder / "out").iterdir()) == sorted([*summary, "slurm"]), here
    assert set(place.states("here").values()) == {"finished"}
    chain, one = place.folder / "out", place.folder / "here"
    # Of the other files, some say where they lie, or how long they took.
    for pattern in ("**/*.safetensors", "eval-*.json", "*.jsonl"):
        found = sorted(path.relative_to(one) for path in one.glob(pattern) if "checkpoints" not in path.parts)
        assert found
        for path in found:
            assert (chain / path).read_bytes() == (one / path).read_bytes(), path


@pytest.mark.slurm_full
def test_from_prompts_to_a_model_as_a_chain(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FuseChat-3.0: two sources sampled, scored, selected; SFT, and DPO by its reference's rows."""
    monkeypatch.chdir(tmp_path)
    write_tiny_models()
    write("prompts.jsonl", prompts("instruction", *QUESTIONS))
    place = Place(tmp_path, cluster)
    recipe = {**IMPLICIT, "select": SELECT["fusechat3"], "nproc": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    place.fusemega("launch", "recipe.yaml", *RANKS)
    assert set(place.ended("out").values()) == {"COMPLETED"}, place.logs("out")
    place.fusemega("run", "recipe.yaml", "output_dir=here")
    assert place.states("out") == place.states("here") and set(place.states("here").values()) == {"finished"}
    chain, one = tmp_path / "out", tmp_path / "here"
    found = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    same = [
        path
        for path in found
        if path.parts[0] in ("prompts", "groups", "rewards", "sets") or path.suffix == ".safetensors"
    ]
    assert len(same) >= 10
    for path in same:
        assert (chain / path).read_bytes() == (one / path).read_bytes(), path


@pytest.mark.slurm_full
def test_a_printed_script_goes_alone(place: Place) -> None:
    script = place.folder / "elsewhere.sbatch"
    script.write_text(place.fusemega("launch", "train.yaml", *TWO, "--print"))
    job = place.cluster.submit(script, folder=place.folder, **place.variables)
    assert place.cluster.wait_state(job, seconds=LONG) == "COMPLETED", place.logs("run")
    assert (place.folder / "run" / "done").exists()
    assert "nothing to do: run is finished" in place.fusemega("launch", "train.yaml", *TWO)


@pytest.mark.slurm_full
def test_a_stage_that_crashes_is_tried_again(place: Place) -> None:
    place.write_recipe(sources={"alike": "alike"})
    place.env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "patched"), str(ROOT)])
    place.env["FUSEMEGA_TEST_ONCE"] = f"split:{place.folder}/crashed"
    place.fusemega("launch", "recipe.yaml", *TWO, "--until", "split")
    assert place.ended("out") == {"split": "COMPLETED"}, place.logs("out")
    lines = (place.folder / "out" / "slurm" / "split" / "jobs.tsv").read_text().splitlines()
    assert [line.split("\t")[-1] for line in lines if line.startswith("end")] == ["requeue", "done"]
    assert place.states("out") == {"split": "finished"}


@pytest.mark.slurm_full
def test_a_recipe_that_stops(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint wins at each of eight prompts: the jobs behind the decision find that they are not needed."""
    monkeypatch.chdir(tmp_path)
    write_tiny_models()
    write("prompts.jsonl", prompts(None, *(f"What is {i}?" for i in range(16))))
    place = Place(tmp_path, cluster)
    stops = {"tau": 1.0, "splits": {"selection": 8}, "iterations": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**MUTUAL, **stops}, sort_keys=False))
    place.fusemega("launch", "recipe.yaml", *TWO)
    assert set(place.ended("out").values()) == {"COMPLETED"}, place.logs("out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["policy"] == 0 and list(summary["stopped"]) == ["choose-1"]
    states = place.states("out")
    assert states["compare-1"] == "finished" and states["choose-1"] == "stopped" and "reward-1" not in states
    assert "not needed: " in place.logs("out") and "choose-1" in place.fusemega("status", "out")
    assert "nothing to do: no stage of out has to run" in place.fusemega("launch", "recipe.yaml", *TWO)
