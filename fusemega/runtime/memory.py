"""Peak memory of a process, on the GPU and on the host; and how freed memory is kept."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # malloc.h


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held since it started.

    On a GPU, what torch's allocator gave out there; else the resident set of the process, from Linux's VmHWM, because
    getrusage's maximum begins with that of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def own_memory() -> int:
    """Bytes that a forked process has held beside what it shares with the one that forked it.

    What it holds by itself now, which includes pages that the other process has changed since, plus what it held in
    addition at its peak. 0 where the kernel does not say.
    """
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    alone = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    most, now = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmHWM", "VmRSS"))
    return (alone + max(0, most - now)) * 1024


def keep_freed_memory(largest: int | None = None) -> None:
    """Let glibc keep what is freed for what is allocated next, in this process. Other libraries: nothing happens.

    Otherwise glibc asks the kernel for each large block and gives it back when it is freed, and the kernel clears the
    same memory page by page again and again.

    Args:
        largest: bytes, at most 32 MiB: larger blocks are given back, and what is free beyond twice that. None: nothing
            is given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if largest is None:
        options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
    else:
        options = {_M_MMAP_THRESHOLD: largest, _M_TRIM_THRESHOLD: 2 * largest}
    for option, value in options.items():
        mallopt(option, value)
