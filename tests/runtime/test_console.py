"""One rank speaks, and only the known noise is hidden."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from fusemega.cli import main
from fusemega.runtime import console


@pytest.fixture(autouse=True)
def _fresh_console() -> Iterator[None]:
    for cached in (console.console, console._configured):
        cached.cache_clear()
    yield
    for cached in (console.console, console._configured):
        cached.cache_clear()


@pytest.mark.parametrize(("rank", "expected"), [("0", "[red] loss 1.5\n"), ("3", "")])
def test_rank_0_speaks_on_stderr(
    rank: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    console.say("[red] loss 1.5")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", expected)


@pytest.mark.parametrize(
    ("setting", "rank", "expected"),
    [
        (None, "0", ["said", "warning: careful"]),
        ("debug", "0", ["said", "warning: careful", "debug: detail", "debug: phase"]),
        ("warning", "0", ["warning: careful"]),
        ("error", "0", []),
        ("debug", "2", []),
        (
            "debug:all",
            "2",
            [f"[rank 2] {text}" for text in ("said", "warning: careful", "debug: detail", "debug: phase")],
        ),
        ("info:all", "2", ["[rank 2] said", "[rank 2] warning: careful"]),
    ],
)
def test_how_much_is_shown(
    setting: str | None,
    rank: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    if setting is None:
        monkeypatch.delenv("FUSEMEGA_LOG", raising=False)
    else:
        monkeypatch.setenv("FUSEMEGA_LOG", setting)
    console.say("said")
    console.warn("careful")
    console.debug("detail")
    with pytest.raises(ZeroDivisionError), console.phase("phase"):
        raise ZeroDivisionError
    captured = capsys.readouterr()
    assert captured.out == "" and [line.split(": 0.0")[0] for line in captured.err.splitlines()] == expected


@pytest.mark.parametrize("setting", ["debgu", "debug:1", "debug:", ":all", "DEBUG"])
def test_an_unknown_level_is_refused(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEMEGA_LOG", setting)
    with pytest.raises(SystemExit) as ended:
        main(["env"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: FUSEMEGA_LOG: unknown level {setting!r}") and "allowed: debug, info, warning" in err
    assert ("did you mean 'debug'" in err) == setting.startswith("deb")


def test_srun_ranks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert console.global_rank() == 5


def test_importing_megatron_is_silent_and_other_warnings_are_not() -> None:
    # In a process of its own: a module warns on its first import only, and pytest has filters of its own.
    program = (
        "import warnings; from fusemega.runtime.console import quiet_megatron\n"
        "warnings.simplefilter('default'); quiet_megatron()\n"
        "import fusemega.runtime.specs, megatron.core.optimizer\n"
        "warnings.warn('Apex is here')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    shown = [line for line in run.stderr.splitlines() if "Warning:" in line]
    assert len(shown) == 1 and "Apex is here" in shown[0], run.stderr


def test_the_filters_are_narrow() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        console.quiet_megatron()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", UserWarning, stacklevel=1)
        warnings.warn("Apex is not installed. Your results are wrong", UserWarning, stacklevel=1)
        warnings.warn("full scope is deprecated", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == [
        "Apex is not installed. Your results are wrong",
        "full scope is deprecated",
    ]
