"""A teacher's rows by an array of tasks: one fails and is tried again, and the store is that of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fusemega.store import Store
from tests.slurm.cluster import Cluster
from tests.slurm.job import LONG, ROOT, Job

Submit = Callable[..., Job]


def rows(folder: Path) -> dict[bytes, tuple[bytes, bytes]]:
    """Every row as it is coded, by key."""
    found = {}
    for shard in Store.open(folder).shards:
        for r in range(len(shard.index)):
            entry, codes = shard.coded(r)
            found[entry["key"].tobytes()] = (entry.tobytes(), codes)
    return found


@pytest.fixture
def teach_file(inputs: Path, tmp_path: Path) -> Path:
    run = {
        "store": str(tmp_path / "store"),
        "model": {"load": str(inputs / "model"), "dtype": "fp32"},
        "data": {"path": str(inputs / "chat.jsonl"), "seq_length": 128},
    }
    path = tmp_path / "teach.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.mark.slurm_full
def test_an_array_of_parts_with_one_that_fails(
    cluster: Cluster, submit: Submit, teach_file: Path, tmp_path: Path
) -> None:
    # Part 1 fails at its first tries: its model is not there.
    failing = tmp_path / "python"
    fails = f"[[ $1 == -c || $SLURM_ARRAY_TASK_ID != 1 || -e {tmp_path}/mended ]] || exit 1"
    failing.write_text(f'#!/bin/bash\n{fails}\nexec {sys.executable} "$@"\n')
    failing.chmod(0o755)
    options = ["--nodes=1", "--array=0-2", f"--output={tmp_path}/log-%A_%a"]
    job = submit("teach.sbatch", teach_file, options=options, PYTHON=failing, LAUNCHER="srun", MAX_STALLS=1)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job.number, check=False), "the array", LONG)
    parts = tmp_path / "store.parts"
    logs = [(tmp_path / f"log-{job.number}_{i}").read_text() for i in range(3)]
    assert [(parts / f"part-{i}.done").exists() for i in range(3)] == [True, False, True], "\n".join(logs)
    assert not (tmp_path / "store").exists()
    assert "part 1 is not finished; the last to finish joins them" in logs[0] + logs[2]
    (tmp_path / "mended").touch()
    options[1] = "--array=1"
    again = submit("teach.sbatch", teach_file, options=options, PYTHON=failing, LAUNCHER="srun", MAX_STALLS=1)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", again.number, check=False), "the retry", LONG)
    text = (tmp_path / f"log-{again.number}_1").read_text()
    assert "part 1 of 3" in text and "store: " in text and (tmp_path / "store").exists(), text
    words = [sys.executable, "-m", "fusemega", "teach", str(teach_file), f"store={tmp_path}/one"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "store") == rows(tmp_path / "one")


@pytest.mark.slurm_full
def test_convert_and_merge(submit: Submit, inputs: Path, tmp_path: Path) -> None:
    model = inputs / "model"
    job = submit("convert.sbatch", "import", model, tmp_path / "megatron", options=["--nodes=1"])
    job.ended()
    assert (tmp_path / "megatron" / "integrity.json").exists()
    merge = {"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": w}} for w in (1, 1)]}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge))
    job = submit("merge.sbatch", tmp_path / "merge.yaml", tmp_path / "merged", options=["--nodes=1"])
    job.ended()
    assert (tmp_path / "merged" / "config.json").exists()
    job = submit("merge.sbatch", tmp_path / "merge.yaml", tmp_path / "merged", options=["--nodes=1"])
    job.ended("FAILED")  # what is there is not replaced, and the job does not try again
    assert "merged: exists" in job.log or "refused" in job.log


def test_servers_and_a_command(submit: Submit, tmp_path: Path) -> None:
    """With a stand-in for vLLM, whose own start needs GPUs."""
    served = tmp_path / "www" / "v1"
    served.mkdir(parents=True)
    (served / "models").write_text("{}")
    port = 20000 + os.getpid() % 20000
    command = f"{sys.executable} -m http.server {{port}} --directory {tmp_path}/www"
    body = "cat servers-*.txt > seen; echo {url} {urls} >> seen"
    words = ["some/model", "--", "bash", "-c", body]
    job = submit(
        "serve.sbatch", *words, options=["--nodes=2"], SERVE_COMMAND=command + " --bind {host}", SERVE_PORT=port
    )
    job.ended()
    urls = [f"http://node{i}:{port}/v1" for i in (1, 2)]
    assert (tmp_path / "seen").read_text().split() == [*urls, urls[0], ",".join(urls)]
    assert not list(tmp_path.glob("servers-*"))
