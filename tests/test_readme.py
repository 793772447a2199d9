"""What the README tells people to type works: the quickstarts, in their smallest size, then every other line."""

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
    """A folder like the repository's, after both quickstarts."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "examples").symlink_to(ROOT / "examples")
    for module, out in (("quickstart", "runs/quickstart"), ("quickstart_xtok", "runs/quickstart-xtok")):
        printed = run([sys.executable, "-m", f"fusemega.recipes.{module}", "--smoke", "--out", out], folder)
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


def test_quickstart_across_tokenizers(home: Path) -> None:
    folder = home / "runs" / "quickstart-xtok"
    summary = json.loads((folder / "summary.json").read_text())
    bits = summary["bits_per_byte"]
    assert bits.keys() == {"target", "control", "fused", "smollm2"}
    assert bits["smollm2"] < bits["control"] < bits["target"] and bits["smollm2"] < bits["fused"] < bits["target"]
    assert bits["fused"] != bits["control"]
    config = json.loads((folder / "fused" / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 32_768
    taught = [json.loads(line) for line in (folder / "fused" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["distill loss"] > 0 for row in taught)


def test_a_second_run_skips_what_is_finished(home: Path) -> None:
    store = home / "runs" / "quickstart" / "stores" / "teacher"
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    run([sys.executable, "-m", "fusemega.recipes.quickstart", "--smoke", "--out", "runs/quickstart"], home)
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before


def test_commands(home: Path) -> None:
    commands = [shlex.split(line.removeprefix("python -m ")) for line in TYPED if "fusemega" in line.split("#")[0]]
    assert {command[1] for command in commands} >= {"env", "convert", "teach", "train", "eval", "merge", "align"}
    for command in commands:
        run([sys.executable, "-m", *command], home)
    assert (home / "runs" / "example" / "fusechat" / "merged" / "model.safetensors").exists()
    assert (home / "runs" / "example" / "distill" / "done").exists()
    assert json.loads((home / "runs" / "example" / "eval.json").read_text())["bits_per_byte"] > 0
    assert (home / "runs" / "example" / "merged" / "model.safetensors").exists()


def test_make_targets() -> None:
    targets = [match[1] for line in TYPED if (match := re.match(r"make (\w+)", line))]
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
