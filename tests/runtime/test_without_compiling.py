"""Megatron-core's functions are not compiled where no GPU is, and nothing imports the compiler."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
import fusemega.runtime.without_compiling as without
{before}
import megatron.core.jit
from megatron.core.fusions import fused_bias_geglu
print(megatron.core.jit.jit_fuser.__name__, "torch._inductor.compile_fx" in sys.modules, megatron.core.jit.__loader__)
"""


@pytest.mark.parametrize(
    "before, said",
    [
        ("", "noop_decorator False"),
        (
            "sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, without._Finder)]\n"
            "without._GPU_FILE = Path('/dev/null')\nwithout.turn_off_where_no_gpu_is()",
            "compile True",
        ),
    ],
    ids=["no GPU", "a GPU"],
)
def test_functions_stay_as_they_are_written(before, said):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(before=before)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith(said)


def test_asked_twice_there_is_one_finder():
    from fusemega.runtime.without_compiling import _Finder, turn_off_where_no_gpu_is

    turn_off_where_no_gpu_is()
    turn_off_where_no_gpu_is()
    assert sum(isinstance(finder, _Finder) for finder in sys.meta_path) <= 1
