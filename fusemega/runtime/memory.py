"""How much memory a process has needed at most, where that was: the GPU's, or the process's own."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes, the most this process has held since it started.

    On a GPU what torch's allocator gave out there, else the resident set of the process: Linux's VmHWM, since
    getrusage's maximum begins with that of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
