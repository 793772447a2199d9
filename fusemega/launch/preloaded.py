"""What the ranks of every command import, for the process that they are forked from (`launch`)."""

import contextlib
import importlib
import os
import shutil
import signal
from types import FrameType

from fusemega.runtime import lifeline
from fusemega.runtime.console import quiet_megatron
from fusemega.runtime.meeting import LAUNCH_FOLDER

# By name: the launcher knows nothing of what it launches, and another command's ranks import what they lack themselves.
MODULES = (
    "transformers.modeling_utils",  # AutoTokenizer imports it on first use, after the filters
    "fusemega.cli",
    "fusemega.scoring.evaluate",
    "fusemega.scoring.teach",
    "fusemega.training.assembly",
)


def _last_act(number: int, frame: FrameType | None) -> None:
    """Called when the launcher has been killed: removes its folder and ends this process, and with it the ranks."""
    shutil.rmtree(os.environ[LAUNCH_FOLDER], ignore_errors=True)
    os._exit(1)


# The fork server would not notice the launcher's end by itself: the pipe that should tell it is held by the ranks too.
if launcher := os.environ.pop(lifeline.PARENT, None):
    signal.signal(signal.SIGUSR2, _last_act)
    lifeline.die_with(int(launcher), by=signal.SIGUSR2)
    lifeline.keep_children()

quiet_megatron()

for _name in MODULES:
    with contextlib.suppress(ImportError):  # a rank that needs the module reports the error
        importlib.import_module(_name)
