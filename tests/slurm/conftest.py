"""The cluster, tiny runs for it, and a stand-in for Python where a test is about the job script alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.slurm.cluster import Cluster, missing
from tests.slurm.job import ROOT, Job

if TYPE_CHECKING:
    from fusemega.fixtures.data import ChatData

_STAND_IN = """#!/bin/bash
# Takes Python's place: `-c` is the check that fusemega is there, all else the command of a step.
[[ $1 != -c ]] || exit 0
[[ $SLURM_PROCID == 0 ]] || exit 0
{body}
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = os.environ.get("FUSEMEGA_NO_SLURM") or missing()
    if reason is not None:
        # .ci/run installs Slurm, and says so where it cannot.
        if os.environ.get("CI") and not os.environ.get("FUSEMEGA_NO_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster() as found:
        yield found


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, chat_files: ChatData) -> Path:
    """`chat.jsonl` and `model/`."""
    from benchmarks import tiny  # torch, which most of these tests can do without

    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_model(folder / "model", tiny.write_chat(folder / "chat.jsonl", rows=24, characters=200))
    return folder


@pytest.fixture
def run_file(inputs: Path, tmp_path: Path) -> Path:
    """A run of 24 updates with a checkpoint every 6; `output_dir` is `tmp_path/out`."""
    run = {
        "output_dir": str(tmp_path / "out"),
        "model": {"load": str(inputs / "model"), "dtype": "fp32"},
        "data": {"path": str(inputs / "chat.jsonl"), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "lr_warmup_fraction": 0.2},
        "training": {"train_iters": 24, "global_batch_size": 8, "save_interval": 6, "export_hf": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Callable[..., Job]:
    """`submit(template, words..., options=[...], NAME=value)`: a job of 2 nodes; every update takes a while."""

    def start(template: str, *words: str | Path, options: list[str] | None = None, **variables: Any) -> Job:
        settings = {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "patched"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "FUSEMEGA_DEVICE": "cpu",
            "FUSEMEGA_TEST_PAUSE": "0.4",
            "NPROC_PER_NODE": "1",
            "PREFLIGHT": "0",
            **{name: str(value) for name, value in variables.items()},
        }
        size = ["--gpus-per-node=2", "--cpus-per-task=2", "--mem=1000", "--time=60", f"--output={tmp_path}/log-%j"]
        script = ROOT / "slurm" / template
        number = cluster.submit(*size, *(options or []), script, *words, folder=tmp_path, **settings)
        return Job(cluster, number, tmp_path)

    return start


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], Path]:
    """`stand_in(body)`: a program to give as PYTHON; `body` is what the first task of a step does, in bash."""

    def write(body: str) -> Path:
        path = tmp_path / "python"
        path.write_text(_STAND_IN.format(body=body))
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def shellcheck() -> str:
    found = shutil.which("shellcheck")
    if found is None:
        pytest.skip("needs the program shellcheck")
    return found
