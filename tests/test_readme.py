"""What the README tells people to type works: the quickstart, in its smallest size, then every `fusemega` line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from fusemega import assets

ROOT = Path(__file__).resolve().parents[1]
TYPED = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line[:4] == " " * 4]


def run(command: list[str], folder: Path) -> str:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop("OMP_NUM_THREADS", None)  # as a user's shell has it
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, chat_files: assets.ChatData) -> Path:
    """A folder like the repository's, after the quickstart."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "examples").symlink_to(ROOT / "examples")
    command = [sys.executable, "-m", "fusemega.recipes.quickstart", "--smoke", "--out", "runs/quickstart"]
    printed = run(command, folder)
    assert "held-out bits per byte" in printed
    return folder


def test_quickstart(home: Path) -> None:
    folder = home / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["layout"] == {"processes": 6, "TP": 3, "PP": 2}
    bits = summary["bits_per_byte"]
    assert bits.keys() == {"target", "control", "fused", "teacher"}
    assert bits["teacher"] < bits["control"] < bits["target"] and bits["fused"] < bits["target"]
    assert bits["fused"] != bits["control"]
    assert summary["sentence"] and (folder / "summary.png").stat().st_size > 10_000
    with safe_open(folder / "fused" / "hf" / "model.safetensors", "np") as weights:
        assert "model.layers.19.mlp.down_proj.weight" in weights.keys()  # noqa: SIM118  (not a mapping)
        assert "model.layers.20.mlp.down_proj.weight" not in weights.keys()  # noqa: SIM118


def test_a_second_run_skips_what_is_finished(home: Path) -> None:
    store = home / "runs" / "quickstart" / "stores" / "teacher"
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    run([sys.executable, "-m", "fusemega.recipes.quickstart", "--smoke", "--out", "runs/quickstart"], home)
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before


def test_commands(home: Path) -> None:
    commands = [shlex.split(line) for line in TYPED if line.startswith("fusemega ")]
    assert {command[1] for command in commands} >= {"env", "convert", "teach", "train", "eval", "merge"}
    for command in commands:
        run([sys.executable, "-m", *command], home)
    assert (home / "runs" / "example" / "distill" / "done").exists()
    assert json.loads((home / "runs" / "example" / "eval.json").read_text())["bits_per_byte"] > 0
    assert (home / "runs" / "example" / "merged" / "model.safetensors").exists()


def test_make_targets() -> None:
    targets = [match[1] for line in TYPED if (match := re.match(r"make (\w+)", line))]
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
