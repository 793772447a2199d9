"""`fusemega launch` and `fusemega status` on a real Slurm of two pretend nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import RECIPE, TRAIN, write_inputs
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
RANKS = ("--nodes", "2", "--gpus-per-node", "2", "--cpus-per-gpu", "1", "--time", "30")


class Place:
    """A folder with tiny models, as a user of the cluster has it.

    Args:
        folder: an empty one.
        cluster: its Slurm.
    """

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        write_inputs(folder)
        self.env = cluster.env | {"FUSEMEGA_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "FUSEMEGA_DEVICE": "cpu"}
        for name in ("WORLD_SIZE", "RANK", "CUDA_VISIBLE_DEVICES"):
            self.env.pop(name, None)

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

    def ended(self, output: str, seconds: float = 900) -> dict[str, str]:
        """Waits for all jobs of the newest launch; name -> state."""
        return {name: self.cluster.wait_state(job, seconds=seconds) for name, job in self.jobs(output).items()}

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
    refused = place.fusemega("launch", "train.yaml", *RANKS, status=2)
    assert f"run: job {job} of an earlier launch is " in refused
    queued = place.fusemega("status")
    assert queued.startswith("run: ") and f"job {job}: " in queued
    assert place.ended("run") == {"run": "COMPLETED"}, place.logs("run")
    done = place.fusemega("status", "run")
    assert done.startswith("run: finished\n") and "iteration 6 of 6" in done and "checkpoint: iteration 6" in done
    assert f"  job {job}: COMPLETED; done\n" in done
    state = json.loads((place.folder / "run" / "checkpoints" / "iter_0000006" / "state.json").read_text())
    assert state["layout"]["world_size"] == 4
    assert "nothing to do: run is finished" in place.fusemega("launch", "train.yaml", *RANKS)


def test_stages_as_jobs(place: Place) -> None:
    """What a job has finished is finished for `fusemega run`; a stage that fails is named, and the rest cancelled."""
    recipe = {**RECIPE, "sources": {"alike": "alike"}}
    (place.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    place.fusemega("launch", "recipe.yaml", *RANKS, "--until", "teach-alike")
    assert place.ended("out") == {"split": "COMPLETED", "teach-alike": "COMPLETED"}, place.logs("out")
    dry = place.fusemega("run", "recipe.yaml", "--until", "teach-alike", "--dry-run")
    assert "split        skip: finished\n" in dry and "teach-alike  skip: finished\n" in dry
    record = place.folder / "out" / "stages" / "split.json"
    record.write_text(record.read_text().replace('"finished"', '"failed"'))
    (place.folder / "data.jsonl").rename(place.folder / "away.jsonl")
    (place.folder / "data.jsonl").write_text("no row\n")
    place.fusemega("launch", "recipe.yaml", *RANKS, "--until", "teach-alike")
    assert place.ended("out") == {"split": "FAILED", "teach-alike": "CANCELLED"}, place.logs("out")
    said = place.fusemega("status", "out")
    assert "failed: split" in said and "data.jsonl:1" in said


@pytest.mark.slurm_full
def test_a_recipe_as_a_chain_is_what_one_run_gives(place: Place) -> None:
    told = place.fusemega("launch", "recipe.yaml", *RANKS)
    assert "array of 3: teach-target, teach-alike, teach-other; after split" in told
    while "PENDING" in {place.cluster.field(job, "JobState") for job in place.jobs("out").values()}:
        assert place.fusemega("status", "out").startswith("out: ")
        assert not {"FAILED", "CANCELLED"} & set(place.states("out").values()), place.logs("out")
    ends = place.ended("out")
    assert set(ends.values()) == {"COMPLETED"}, place.logs("out")
    assert "out: 14 of 14 stages finished" in place.fusemega("status", "out")
    assert "nothing to do: no stage of out has to run" in place.fusemega("launch", "recipe.yaml", *RANKS)
    here = place.fusemega("run", "recipe.yaml", "nproc=4", "output_dir=here")
    summary = sorted(path.name for path in (place.folder / "here").iterdir())
    assert sorted(path.name for path in (place.folder / "out").iterdir()) == sorted([*summary, "slurm"]), here
    for name, state in place.states("here").items():
        records = [json.loads((place.folder / out / "stages" / f"{name}.json").read_text()) for out in ("out", "here")]
        assert state == "finished" and records[0]["inputs"] == records[1]["inputs"], name
        outputs = [{k: v for k, v in record["outputs"].items() if k != "metrics"} for record in records]
        assert outputs[0] == outputs[1], name


@pytest.mark.slurm_full
def test_a_printed_script_goes_alone(place: Place) -> None:
    text = place.fusemega("launch", "train.yaml", *RANKS, "--print")
    script = place.folder / "elsewhere.sbatch"
    script.write_text(text)
    job = place.cluster.submit(
        script, folder=place.folder, **{k: v for k, v in place.env.items() if k not in os.environ}
    )
    assert place.cluster.wait_state(job, seconds=900) == "COMPLETED", place.logs("run")
    assert (place.folder / "run" / "done").exists() and TRAIN["output_dir"] == "run"
