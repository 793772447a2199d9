"""The command: what it prints and writes, and a merge that is killed and goes on, from and to Megatron folders too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusemega.errors import UserError
from fusemega.files.safetensors_header import read_header
from fusemega.merge import execute
from fusemega.merge.journal import Journal
from fusemega.merge.merge import Options
from tests.merge.conftest import CONFIG, base_tensors, entries, read_all, run_merge, write_folder, write_tokenizer

Family = Callable[..., tuple[Path, list[Path]]]
ROOT = Path(__file__).resolve().parents[2]


BARE = ("--vocabulary", "position")  # these folders have no tokenizer that shows it


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fusemega", "merge", *map(str, arguments)]


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def _alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"  # one that nobody has waited for
    except OSError:
        return False


def test_the_command(family: Family, tmp_path: Path) -> None:
    base, models = family(dtype=torch.bfloat16)
    options = [*BARE, "--method", "sce", "--base", base, "--models", *models, "parameters.select_topk=0.1"]
    plan = subprocess.run(
        _command(tmp_path / "out", *options, "--dry-run"), env=_environment(), capture_output=True, text=True
    )
    assert plan.returncode == 0, plan.stderr
    assert "3 pass(es)" in plan.stdout and "expected peak memory" in plan.stdout and "lm_head.weight" in plan.stdout
    assert not (tmp_path / "out").exists() and "sce_mergekit" in plan.stderr
    done = subprocess.run(_command(tmp_path / "out", *options), env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrote"] == str(tmp_path / "out")
    page = (tmp_path / "out" / "merge_report.html").read_text()
    assert "<svg" in page and "http" not in page
    assert "<h3>Coefficient</h3>" in page and "<figcaption>m0</figcaption>" in page and "layer 2, mlp.up_proj" in page
    file = tmp_path / "merge.yaml"
    file.write_text(
        yaml.safe_dump({"merge_method": "sce", "base_model": str(base), "models": [{"model": str(m)} for m in models]})
    )
    command = _command(file, tmp_path / "again", *BARE, "parameters.select_topk=0.1")
    again = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    wrong = subprocess.run(_command(file, "a", "b"), env=_environment(), capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_or_interrupted_and_resumed_it_is_bitwise_the_same(workers: int, family: Family, tmp_path: Path) -> None:
    base, models = family(rms=(1e-3, 2e-3, 3e-3), dtype=torch.bfloat16, num_hidden_layers=30)
    run: dict[str, Any] = {"merge_method": "ties", "base_model": str(base), "models": entries(models, weight=[1, 1, 1])}
    options = [*BARE, "--method", "ties", "--base", base, "--models", *models, "--weights", 1, 1, 1]
    options += ["--workers", workers]
    whole = run_merge(tmp_path / "whole", **run)
    out, partial = tmp_path / "out", tmp_path / ".out.incomplete"
    journal = partial / "merge_journal.jsonl"
    # After 40 finished jobs it waits to be killed in the middle of the next: a slow machine cannot miss the moment.
    slow = (
        "import sys, time, fusemega.merge.execute as e\n"
        "from pathlib import Path\n"
        "e.JOURNAL_SECONDS = 0.0\n"
        "load, journal, enough = e.load_block, Path(sys.argv.pop(1)), int(sys.argv.pop(1))\n"
        "def waiting(*arguments):\n"
        "    while journal.read_text().count('\\n') > enough: time.sleep(1)\n"
        "    return load(*arguments)\n"
        "e.load_block = waiting\n"
        "from fusemega.cli import main; main()"
    )
    for number, by in enumerate((signal.SIGKILL, signal.SIGINT)):
        resume, enough = ["--resume"] if number else [], 40 * (number + 1)
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *map(str, [journal, enough, "merge", out, *options, *resume])],
            env=_environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_text().count("\n") > enough:
                break
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == (workers if workers > 1 else 0)
        if by == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, by)  # what a terminal does for Ctrl-C
        _, errors = process.communicate(timeout=300)
        assert process.returncode and "Traceback" not in errors, errors
        while any(map(_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(_alive, children))
        assert not out.exists() and journal.exists()
    refused = subprocess.run(_command(out, *options), env=_environment(), capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    other = subprocess.run(
        _command(out, *options, "seed=1", "--resume", "parameters.density=0.5"),
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2 and "other models or settings" in other.stderr and journal.exists()
    resumed = subprocess.run(_command(out, *options, "--resume"), env=_environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    first, second = (json.loads((folder / "merge_report.json").read_text()) for folder in (whole, out))
    assert first["tensors"] == second["tensors"] and not partial.exists()


def test_a_merge_that_loses_a_process_can_be_gone_on_with(family: Family, tmp_path: Path) -> None:
    base, models = family(dtype=torch.bfloat16, num_hidden_layers=4)
    options = [*BARE, "--method", "varm", "--base", base, "--models", *models]
    out, journal = tmp_path / "out", tmp_path / ".out.incomplete" / "merge_journal.jsonl"
    losing = (
        "import os, signal, sys, fusemega.merge.execute as e\n"
        "from pathlib import Path\n"
        "e.JOURNAL_SECONDS = 0.0\n"
        "load, journal = e.load_block, Path(sys.argv.pop(1))\n"
        "def dying(*arguments):\n"
        "    if journal.read_text().count('\\n') > 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return load(*arguments)\n"
        "e.load_block = dying\n"
        "from fusemega.cli import main; main()"
    )
    lost = subprocess.run(
        [sys.executable, "-c", losing, *map(str, [journal, "merge", out, *options, "--workers", 2])],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert lost.returncode == 2 and "one of 2 worker processes was ended" in lost.stderr, lost.stderr
    assert "Traceback" not in lost.stderr and journal.exists() and not out.exists()
    resumed = subprocess.run(_command(out, *options, "--resume"), env=_environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = run_merge(tmp_path / "whole", merge_method="varm", base_model=str(base), models=entries(models))
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def _interrupted(monkeypatch: pytest.MonkeyPatch, out: Path, **run: Any) -> None:
    """Leaves a merge of which three jobs are finished."""
    add, saved = Journal.add, list[Any]()

    def interrupting(self: Journal, jobs: list[Any]) -> None:
        add(self, jobs)
        saved.extend(jobs)
        if len(saved) >= 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(execute, "JOURNAL_SECONDS", 0.0)
        patch.setattr(Journal, "add", interrupting)
        run_merge(out, Options(workers=1), **run)


CHANGES: dict[str, dict[str, Any]] = {
    "vocabulary": {"vocabulary": "union"},
    "files": {"max_shard_size": "60KB"},
    "setting": {"parameters": {"granularity": "layer"}},
    "type": {"dtype": "float16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_merge_is_not_gone_on_with_otherwise(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(304)]
    folders = []
    for name, rows in (("base", 301), ("longer", 304)):
        tensors = base_tensors(len(folders), torch.bfloat16, vocab_size=rows)
        folders.append(write_folder(tmp_path / name, tensors, vocab_size=rows))
        write_tokenizer(folders[-1], tokens[:rows])
    run: dict[str, Any] = {"merge_method": "varm", "base_model": str(folders[0]), "models": entries(folders[1:])}
    run |= {"vocabulary": "pad", "max_shard_size": "100KB"}
    out, partial = tmp_path / "out", tmp_path / ".out.incomplete"
    _interrupted(monkeypatch, out, **run)
    left = {path.name: path.read_bytes() for path in partial.iterdir()}
    with pytest.raises(UserError, match="other models or settings"):
        run_merge(out, Options(resume=True), **run | CHANGES[change])
    assert left == {path.name: path.read_bytes() for path in partial.iterdir()}
    run_merge(out, Options(resume=True), **run)
    whole = run_merge(tmp_path / "whole", **run)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_merge_is_not_gone_on_with_other_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the same size and time, as by a tool that sets the time of the file that it copies."""
    folders = [write_folder(tmp_path / name, base_tensors(seed)) for seed, name in enumerate(("a", "b"))]
    run: dict[str, Any] = {"merge_method": "linear", "models": entries(folders, weight=[0.5, 0.5])}
    run |= {"vocabulary": "position"}
    _interrupted(monkeypatch, tmp_path / "out", **run)
    weights = next(folders[1].glob("*.safetensors"))
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    os.utime(weights, ns=times)
    with pytest.raises(UserError, match="other models or settings"):
        run_merge(tmp_path / "out", Options(resume=True), **run)


@pytest.mark.parametrize("damage", ["flipped", "zeroed", "another journal's", "no hash"])
def test_finished_jobs_are_proved_before_they_are_kept(
    damage: str, family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, models = family(dtype=torch.bfloat16)
    run: dict[str, Any] = {"merge_method": "varm", "base_model": str(base), "models": entries(models)}
    whole, out, partial = tmp_path / "whole", tmp_path / "out", tmp_path / ".out.incomplete"
    _interrupted(monkeypatch, out, **run)
    journal = partial / "merge_journal.jsonl"
    header, *lines = journal.read_text().splitlines()
    first = json.loads(lines[0])
    path = next(path for path in partial.glob("*.safetensors") if first["job"] in _places(path))
    start, stop = _places(path)[first["job"]]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[stop - 1] ^= 1
    elif damage == "zeroed":
        content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    if damage in ("another journal's", "no hash"):
        changed = first | {"job": "lm_head"} if damage != "no hash" else {key: first[key] for key in ("job", "tensors")}
        journal.write_text("\n".join([header, json.dumps(changed), *lines[1:]]) + "\n")
        with pytest.raises(UserError, match=r"merge_journal.jsonl:2: not a finished job; delete .*out.incomplete"):
            run_merge(out, Options(resume=True), **run)
        return
    capfd.readouterr()
    run_merge(out, Options(resume=True), **run)
    told = [line for line in capfd.readouterr().err.splitlines() if "merging it again" in line]
    assert told == [f"{journal}: {first['job']} was changed after it was written; merging it again"]
    run_merge(whole, **run)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes of a file's tensors begin and end."""
    return {tensor.name: (tensor.start, tensor.stop) for tensor in read_header(path)}


MEGATRON = """
import os, signal, sys
from pathlib import Path
import fusemega.merge.execute as execute
from fusemega.convert import convert
from fusemega.merge.journal import Journal
from fusemega.merge.merge import Options
from tests.merge.conftest import entries, run_merge

base, m0, m1, m2, work = map(Path, sys.argv[1:])
convert.import_hf(m0, work / "megatron")
run = dict(merge_method="sce", base_model=str(base), models=entries([work / "megatron", m1, m2]))
run |= dict(output_format="megatron")


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_export(): convert.write_index = die


def in_the_merge():
    add, saved = Journal.add, []
    execute.JOURNAL_SECONDS = 0.0
    def dying(self, jobs):
        add(self, jobs)
        saved.extend(jobs)
        len(saved) > 5 and die()
    Journal.add = dying


def in_the_import(): convert.write_metadata = die


for break_it in (in_the_export, in_the_merge, in_the_import):
    child = os.fork()
    if not child:
        break_it()
        run_merge(work / "merged", Options(workers=1, resume=True), **run)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, break_it
    assert not (work / "merged").exists()
    print(break_it.__name__, sorted(path.name for path in work.glob(".*") if path.suffix != ".lock"))
run_merge(work / "merged", Options(resume=True), **run)
convert.export_megatron(work / "merged", work / "back")
"""


def test_megatron_folders_in_and_out_killed_on_the_way(family: Family, tmp_path: Path) -> None:
    base, models = family(dtype=torch.bfloat16, vocab_size=CONFIG["vocab_size"])
    for folder in (base, *models):
        write_tokenizer(folder, [f"t{i}" for i in range(301)])
    plain = run_merge(tmp_path / "plain", merge_method="sce", base_model=str(base), models=entries(models))
    done = subprocess.run(
        [sys.executable, "-c", MEGATRON, *map(str, (base, *models, tmp_path))],
        env=_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    left = [".merged.exported", ".merged.incomplete"]
    stages = ["in_the_export", "in_the_merge", "in_the_import"]
    assert done.stdout.splitlines() == [f"{stage} {left[: 1 + (stage != stages[0])]}" for stage in stages]
    first, second = read_all(plain), read_all(tmp_path / "back")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "merged" / "merge_report.html").is_file()
    assert not list(tmp_path.glob(".*"))
