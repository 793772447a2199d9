"""The shell around the commands: help without torch, one line for what the user can mend, tracebacks for the rest."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from fusemega import cli
from fusemega.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the command `train`, which a test gives its behaviour."""
    module = types.ModuleType("fusemega.cli.train")
    monkeypatch.setitem(sys.modules, "fusemega.cli.train", module)
    return module


def _status(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from fusemega.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: print('status', stop.code, file=sys.stderr)\n"
        "print(*[m for m in ('torch', 'transformers', 'megatron', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.split() == ["status", "0"], run.stderr
    assert all(name in run.stdout for name in (*cli.COMMANDS, *cli.GROUPS))


def test_a_user_error_is_one_line_and_status_2(train: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def command(run_file: str) -> None:
        raise UserError(f"{run_file}: no such thing")

    train.command = command  # type: ignore[attr-defined]
    assert _status(["train", "run.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: run.yaml: no such thing\n" and captured.out == ""


def test_another_exception_keeps_its_traceback(train: types.ModuleType) -> None:
    def command() -> None:
        raise ZeroDivisionError("ours")

    train.command = command  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["train"])


def test_a_command_that_ends_well(train: types.ModuleType) -> None:
    given: list[str] = []
    train.command = lambda run_file: given.append(run_file)  # type: ignore[attr-defined]
    assert _status(["train", "run.yaml"]) == 0 and given == ["run.yaml"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_leaves_its_world_before_python_ends(fails: bool, tmp_path: Path) -> None:
    """Without that, one in ten aborted: gloo's thread had the last object's tensor. Here the world is left for sure."""
    probe = (
        "import atexit, sys, types\n"
        "import torch.distributed as dist\n"
        "from fusemega import cli\n"
        "from fusemega.runtime import parallel  # what commands with a world have imported\n"
        "def command(fails: bool = False) -> None:\n"
        f"    dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "    if fails: sys.exit(1)\n"
        "sys.modules['fusemega.cli.train'] = types.SimpleNamespace(command=command)\n"
        "atexit.register(lambda: print('in a world:', dist.is_initialized()))\n"
        "cli.main(['train', *sys.argv[1:]])"
    )
    words = ["--fails"] if fails else []
    run = subprocess.run([sys.executable, "-c", probe, *words], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (len(words), f"in a world: {bool(words)}\n"), run.stderr


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["trian"]) == 2
    assert "train" in capsys.readouterr().err
