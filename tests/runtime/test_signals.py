"""Signals come in pairs under launchers that pass on what the whole job gets."""

from __future__ import annotations

import os
import signal

import pytest

from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.runtime.signals import StopSignals


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", None])
def test_the_second_one(launcher: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "FUSEMEGA_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    if launcher is not None:
        monkeypatch.setenv(launcher, "1")

    def second(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, second)
    try:
        with StopSignals(initialize(ParallelConfig())) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            if launcher is None:
                with pytest.raises(InterruptedError):
                    os.kill(os.getpid(), signal.SIGTERM)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
