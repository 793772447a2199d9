"""What README.md and docs/commands.md tell people to type works: the quickstarts, smallest size, then the rest.

A line that is indented by four spaces is one to type.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from fusemega.fixtures import data as assets
from fusemega.fixtures.packages import AssetMissing

ROOT = Path(__file__).resolve().parents[1]
PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/commands.md")]
TYPED = [line.strip() for page in PAGES for line in page.splitlines() if line[:4] == " " * 4]


def run(module: str, arguments: list[str], folder: Path) -> str:
    """`python -m module arguments` in `folder`; in this process, which has imported what every command imports."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, f"{module} {shlex.join(arguments)}: exit {end.code}\n{printed.getvalue()}"
    return printed.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, chat_files: assets.ChatData) -> Path:
    """A folder like the repository's, after both quickstarts."""
    try:
        for kind in assets.DOMAINS:
            assets.domain_data(kind)
    except AssetMissing as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("home")
    (folder / "examples").symlink_to(ROOT / "examples")
    for module, out in (("quickstart", "runs/quickstart"), ("quickstart_xtok", "runs/quickstart-xtok")):
        printed = run(f"fusemega.recipes.{module}", ["--smoke", "--out", out], folder)
        assert "bits per byte (lower is better)" in printed and "fused is better than control on" in printed
    return folder


KINDS = {"chat", *assets.DOMAINS}


def test_quickstart(home: Path) -> None:
    folder = home / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    bits, found = summary["bits_per_byte"], summary["measures"]
    assert bits.keys() == found.keys() == summary["answers"].keys() == {"target", "control", "fused", "teacher"}
    assert bits["teacher"] < bits["control"] < bits["target"] and bits["fused"] < bits["target"]
    assert bits["fused"] != bits["control"]
    for of in found.values():
        assert of.keys() == KINDS
        assert all(one.keys() == {"bits_per_byte", "kl", "same_top_1"} for one in of.values())
    (before,), (after,) = (found[name]["chat"]["kl"] for name in ("target", "fused"))
    assert 0 < after < before and found["teacher"]["chat"]["kl"] == [0]
    assert all(summary["answers"].values()) and (folder / "summary.png").stat().st_size > 10_000
    page = (folder / "report" / "report.html").read_text()
    assert summary["prompt"] in page and "<svg" in page and "http" not in page.split("</style>")[1].split("<svg")[0]
    with safe_open(folder / "fused" / "hf" / "model.safetensors", "np") as weights:
        assert "model.layers.25.mlp.down_proj.weight" in weights.keys()  # noqa: SIM118  (not a mapping)
        assert "model.layers.26.mlp.down_proj.weight" not in weights.keys()  # noqa: SIM118


def test_quickstart_across_tokenizers(home: Path) -> None:
    folder = home / "runs" / "quickstart-xtok"
    summary = json.loads((folder / "summary.json").read_text())
    bits = summary["bits_per_byte"]
    assert bits.keys() == {"target", "control", "fused", "smollm2"}
    assert bits["smollm2"] < bits["control"] < bits["target"] and bits["smollm2"] < bits["fused"] < bits["target"]
    assert bits["fused"] != bits["control"]
    found = summary["measures"]
    assert all(one.keys() == {"bits_per_byte", "kl"} for of in found.values() for one in of.values())
    assert all((one["kl"] == [0]) == (name == "smollm2") for name, of in found.items() for one in of.values())
    config = json.loads((folder / "fused" / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 32_768
    taught = [json.loads(line) for line in (folder / "fused" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["distill loss"] > 0 for row in taught)


def test_a_second_run_skips_what_is_finished(home: Path) -> None:
    """As it is typed, in a process of its own."""
    store = home / "runs" / "quickstart" / "stores" / "teacher"
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    command = [sys.executable, "-m", "fusemega.recipes.quickstart", "--smoke", "--out", "runs/quickstart"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "[fused] finished before, skipped" in done.stdout + done.stderr, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before


def test_commands(home: Path) -> None:
    commands = [shlex.split(line.removeprefix("python -m ")) for line in TYPED if "fusemega" in line.split("#")[0]]
    assert {command[1] for command in commands} >= {"env", "convert", "teach", "train", "eval", "merge", "align"}
    for module, *arguments in commands:
        run(module, arguments, home)
    assert (home / "runs" / "example" / "fusechat" / "merged" / "model.safetensors").exists()
    assert (home / "runs" / "example" / "distill" / "done").exists()
    evaluation = json.loads((home / "runs" / "example" / "eval.json").read_text())
    assert evaluation["bits_per_byte"] > 0 and evaluation["kl"] > 0
    assert (home / "runs" / "example" / "merged" / "model.safetensors").exists()


def test_make_targets() -> None:
    lines = [*TYPED, *(line.strip() for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines())]
    targets = {match[1] for line in lines if (match := re.match(r"make ([\w-]+)", line))}
    assert {"quickstart", "test", "test-fast"} <= targets
    said = {}
    for target in targets:
        run = subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, text=True)
        said[target] = run.stdout
    paths = re.findall(r"tests/\S+", said["test-fast"])
    assert len(paths) > 20 and all((ROOT / path).exists() for path in paths)
