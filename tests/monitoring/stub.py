"""A stand-in for the driver's NVML library, compiled for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def built_stub(folder: Path) -> dict[str, str]:
    """The environment of a process whose pynvml finds one GPU, commanded by the file that NVML_STUB names.

    Skips the test where there is no compiler; in CI that is a failure.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: CI needs one for the stand-in of NVML")
        pytest.skip("no C compiler for the stand-in of NVML")
    source = Path(__file__).with_name("nvml_stub.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True
    )
    (folder / "command").touch()
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": str(folder),
        "NVML_STUB": str(folder / "command"),
        "FUSEMEGA_DEVICE": "cpu",
    }
