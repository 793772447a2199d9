"""Parts that end badly, for the check's frame, and a function to call on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any


def measure(report: Any, job: Any) -> None:
    report.compare("before", 1.0, 2.0)
    getattr(sys.modules[__name__], job.name)(report, job)
    report.measured("after", 3, "s")


def good(report: Any, job: Any) -> None:
    with report.case("a case that fails"):
        raise ValueError("of this case alone\nwith a second line")


def raises(report: Any, job: Any) -> None:
    raise RuntimeError("no such kernel")


def killed(report: Any, job: Any) -> None:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def exits(report: Any, job: Any) -> None:
    sys.stdout.flush()
    os._exit(3)


def hangs(report: Any, job: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (job.work / "child").write_text(str(child.pid))
    time.sleep(600)


def echo(words: list[str]) -> dict[str, Any]:
    import torch

    return {"words": words, "device": os.environ["FUSEMEGA_DEVICE"], "tensor": torch.arange(3)}
