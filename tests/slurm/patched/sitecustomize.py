"""On the PYTHONPATH of test jobs: updates take a while, so that a test meets a run in the middle; a load may crash.

FUSEMEGA_TEST_PAUSE: seconds before each update. FUSEMEGA_TEST_CRASH: name of a checkpoint whose load kills the process.
FUSEMEGA_TEST_ONCE: a command of fusemega and a file; the command crashes unless the file is there, and makes it.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time

_command, _, _file = os.environ.get("FUSEMEGA_TEST_ONCE", "").partition(":")
if _file and sys.orig_argv[1:4] == ["-m", "fusemega", _command] and not os.path.exists(_file):
    open(_file, "x").close()
    os._exit(3)


def _pause(module):
    step = module.Trainer.step

    def slow(trainer):
        time.sleep(float(os.environ.get("FUSEMEGA_TEST_PAUSE", 0)))
        return step(trainer)

    module.Trainer.step = slow


def _crash(module):
    load = module.load_checkpoint

    def crash(folder, *arguments):
        if folder.name == os.environ.get("FUSEMEGA_TEST_CRASH"):
            os.kill(os.getpid(), signal.SIGKILL)
        return load(folder, *arguments)

    module.load_checkpoint = crash


_CHANGES = {"fusemega.training.trainer": _pause, "fusemega.training.checkpoints": _crash}


class _Changed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        change = _CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Changed())
