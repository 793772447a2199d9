"""Runs `inside/` in `.venv-te`, and looks at a Transformer Engine that is installed without its compiled library."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fusemega.fixtures.packages import AssetMissing
from tests.te import environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without CUDA")

RUN = """
output_dir: {folder}/run
model: {{load: {folder}/model}}
data: {{path: {folder}/chat.jsonl, seq_length: 64}}
objective: {{name: sft}}
optimizer: {{lr: 1e-3}}
training: {{train_iters: 1, global_batch_size: 2}}
"""


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of `.venv-te`; skips, naming the package, where it cannot be had, and fails in CI."""
    try:
        return environment.python()
    except AssetMissing as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_inside_the_environment(python: Path) -> None:
    env = dict(os.environ, FUSEMEGA_IN_VENV_TE="1", OMP_NUM_THREADS="1")
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/te/inside"]
    run = subprocess.run(command, cwd=environment.ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " skipped" not in run.stdout.splitlines()[-1]


def test_without_its_library_it_is_called_broken(python: Path) -> None:
    run = subprocess.run([python, "-m", "fusemega", "env", "--json"], capture_output=True, text=True)
    report = json.loads(run.stdout)
    assert run.returncode == 1 and "transformer-engine" in report["broken"]
    note = next(item["note"] for item in report["items"] if item["name"] == "transformer-engine")
    assert "cannot be imported, so megatron-core cannot" in note


def test_without_its_library_a_run_is_refused_in_one_line(python: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    run = subprocess.run([python, "-m", "fusemega", "train", tmp_path / "run.yaml"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: transformer-engine cannot be imported") and run.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
