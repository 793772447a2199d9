"""Megatron-core's functions are not compiled where no GPU is, and nothing imports the compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusemega.runtime import without_compiling

SCRIPT = """
import fusemega
from megatron.core.fusions import fused_bias_geglu
import inspect, sys
import megatron.core.jit
print(megatron.core.jit.jit_fuser.__name__, "torch._inductor.compile_fx" in sys.modules)
print(inspect.getsource(megatron.core.jit.noop_decorator).split("(")[0])
"""


def test_functions_stay_as_they_are_written():
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["noop_decorator False", "def noop_decorator"]


@pytest.mark.parametrize("gpu_file, finders", [("/dev/null", 0), ("/no/such/file", 1)])
def test_where_there_is_a_gpu_megatron_decides(monkeypatch, gpu_file, finders):
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(without_compiling, "_GPU_FILE", Path(gpu_file))
    without_compiling.turn_off_where_no_gpu_is()
    without_compiling.turn_off_where_no_gpu_is()
    assert len(sys.meta_path) == finders
