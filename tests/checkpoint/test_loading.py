"""A checkpoint that is whole and does not load: the next start takes the one before it, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusemega.checkpoint.loading import LOADING, STARTS, Loading, loading
from fusemega.checkpoint.series import STATE, TRACKER, find_checkpoint
from fusemega.errors import Retryable, UserError
from fusemega.files.integrity import write_integrity
from fusemega.runtime.meeting import note_refusal, record_error, recorded_error
from fusemega.runtime.parallel import ParallelConfig, World, initialize


@pytest.fixture
def world() -> World:
    return initialize(ParallelConfig())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of iterations 2, 4 and 6."""
    for iteration in (2, 4, 6):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        (folder / STATE).write_text(json.dumps({"iteration": iteration}))
        write_integrity(folder)
    (tmp_path / TRACKER).write_text("6")
    return tmp_path


def found(root: Path, world: World) -> Path:
    folder = find_checkpoint(root, world)
    assert folder is not None
    return folder


def fail(folder: Path, world: World, error: Exception) -> None:
    with loading(folder, TRACKER, world):
        raise error


def test_the_one_before_it_once(root: Path, world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Retryable, match="a bad tensor; the next start takes the checkpoint before it"):
        fail(found(root, world), world, RuntimeError("a bad tensor"))
    folder = found(root, world)
    said = capfd.readouterr().err
    assert folder.name == "iter_0000004"
    assert "iter_0000006: could not be loaded (a bad tensor); resuming from iter_0000004" in said
    with loading(folder, TRACKER, world):
        pass
    assert not (root / LOADING).exists() and (root / TRACKER).read_text() == "4"
    assert "names iter_0000004 from now on; iter_0000006 stays as it is" in capfd.readouterr().err
    assert found(root, world).name == "iter_0000004"  # also at the starts after that
    assert len(list(root.glob("iter_*"))) == 3  # nothing is removed


def test_two_that_do_not_load_are_refused(root: Path, world: World) -> None:
    with pytest.raises(Retryable):
        fail(found(root, world), world, RuntimeError("first"))
    with pytest.raises(RuntimeError, match="second"):
        fail(found(root, world), world, RuntimeError("second"))
    with pytest.raises(UserError, match=rf"iter_0000004: .*second.*neither could iter_0000006; remove .*{LOADING}"):
        find_checkpoint(root, world)
    (root / LOADING).unlink()
    assert found(root, world).name == "iter_0000006"


def test_starts_that_just_ended_are_counted(root: Path, world: World) -> None:
    for started in range(1, STARTS + 1):
        folder = found(root, world)
        assert folder.name == "iter_0000006"
        Loading(folder.name, started).write(root)  # as a kill -9 leaves it
    assert found(root, world).name == "iter_0000004"


def test_the_only_one_is_tried_again(root: Path, world: World) -> None:
    (root / TRACKER).write_text("2")
    with pytest.raises(RuntimeError, match="no memory$"):
        fail(found(root, world), world, RuntimeError("no memory"))
    assert found(root, world).name == "iter_0000002"  # not 4 or 6, which are from before the run went back


def test_an_end_from_outside_is_no_fault(root: Path, world: World) -> None:
    with pytest.raises(SystemExit):
        with loading(found(root, world), TRACKER, world):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass
    assert not (root / LOADING).exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("text", ["{}", "[]", '{"checkpoint": "../x", "starts": 1, "error": null, "instead_of": null}'])
def test_a_damaged_note_is_refused(root: Path, world: World, text: str) -> None:
    (root / LOADING).write_text(text)
    with pytest.raises(UserError, match=LOADING):
        find_checkpoint(root, world)


def test_a_refusal_is_left_for_the_batch_script(tmp_path: Path) -> None:
    environment = os.environ | {"FUSEMEGA_REFUSED": str(tmp_path / "refused")}
    words = [sys.executable, "-m", "fusemega", "train", str(tmp_path / "none.yaml")]
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert (tmp_path / "refused").read_text() == run.stderr.removeprefix("error: ")


@pytest.mark.parametrize(
    "error",
    [Retryable("again"), UserError("checkpoint not saved: Connection closed by peer [127.0.0.12]:3301")],
)
def test_what_may_go_well_the_next_time_is_no_refusal(
    tmp_path: Path, error: UserError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEMEGA_REFUSED", str(tmp_path / "refused"))
    note_refusal(error)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", [Retryable, UserError])
def test_a_launcher_knows_whether_to_try_again(
    tmp_path: Path, kind: type[UserError], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recorded_error(tmp_path) is None
    monkeypatch.setenv("FUSEMEGA_LAUNCH", str(tmp_path))
    assert record_error(kind("iter_0000009: not whole"))
    found = recorded_error(tmp_path)
    assert type(found) is kind and str(found) == "iter_0000009: not whole"
