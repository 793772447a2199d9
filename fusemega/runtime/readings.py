"""What the device of this process reports: a GPU by NVML's names, or this machine and this process by psutil's."""

from __future__ import annotations

from typing import Protocol

import psutil
import torch

from fusemega.runtime.console import warn_from_here
from fusemega.runtime.nvml import Gpu, Reading


class DeviceReader(Protocol):
    """Read repeatedly, by a thread that nobody waits for."""

    def read(self) -> Reading: ...

    def close(self) -> None: ...


class Host:
    """This machine and this process.

    The values are `cpu_percent` (of all cores) and `virtual_memory.percent` of the machine, and of this process
    `process.cpu_percent` (100: one core) and `process.memory_info.rss` (bytes). The first percentages are 0.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()

    def read(self) -> Reading:
        values = {
            "cpu_percent": psutil.cpu_percent(),
            "virtual_memory.percent": psutil.virtual_memory().percent,
            "process.cpu_percent": self._process.cpu_percent(),
            "process.memory_info.rss": float(self._process.memory_info().rss),
        }
        return Reading(values)

    def close(self) -> None:
        """Nothing is held."""


def reader_of(device: torch.device) -> tuple[DeviceReader, str]:
    """What reads `device`, and "gpu" or "host". In the place of a GPU that NVML does not give, the host is read, with a
    warning."""
    if device.type == "cuda":
        try:
            return Gpu(str(torch.cuda.get_device_properties(device).uuid)), "gpu"
        except RuntimeError as error:
            warn_from_here(f"no readings of {device} ({error}); those of the machine are taken")
    return Host(), "host"
