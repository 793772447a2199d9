"""A thread that reads this rank's device every few seconds, and what all ranks' readings are together."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from fusemega.monitoring.heartbeat import Heartbeat
from fusemega.runtime.console import warn_from_here
from fusemega.runtime.nvml import Fault
from fusemega.runtime.readings import DeviceReader

_SMALLEST = ("UtilizationRates.gpu", "ClockInfo.SM")  # where the least of all ranks says more than the most
_BITS = ("ClocksEventReasons",)


class Sampler:
    """Reads a device from `start` to `end`; the main thread never waits for a reading.

    Args:
        reader: what reads the device.
        rank, device: for messages.
        seconds: between two readings.
        heartbeat: takes each reading, and a line for each fault.
        say: shows such a line.
    """

    def __init__(
        self,
        reader: DeviceReader,
        rank: int,
        device: str,
        seconds: float,
        heartbeat: Heartbeat | None = None,
        say: Callable[[str], None] = warn_from_here,
    ) -> None:
        self._reader, self._seconds = reader, seconds
        self._name = f"rank {rank} on {socket.gethostname()}, {device}"
        self._heartbeat, self._say = heartbeat, say
        self._values: dict[str, float] = {}
        self._count = self._taken = 0
        self.failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="readings", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ends the thread, unless it hangs in the driver."""
        self._stop.set()
        self._thread.join(2)
        if not self._thread.is_alive():
            self._reader.close()

    def take(self) -> dict[str, float] | None:
        """The newest values, if they were not taken before."""
        if self._count == self._taken:
            return None
        self._taken = self._count
        return self._values

    def _run(self) -> None:
        while True:
            reading = self._reader.read()
            self._values = reading.values
            if self._heartbeat is not None:
                self._heartbeat.tell(reading.values)
            for fault in reading.faults:
                self._report(fault)
            self._count += 1
            if self._stop.wait(self._seconds):
                return

    def _report(self, fault: Fault) -> None:
        line = f"{self._name}: {fault.text}"
        if self._heartbeat is not None:
            self._heartbeat.tell_error(line)
        self._say(line)
        self.failed = self.failed or fault.is_error


def together(readings: Sequence[dict[str, float]], prefix: str) -> dict[str, float]:
    """The readings of all ranks as metrics: of each the largest, or the smallest where that says more.

    Example:
        >>> cool, hot = {"Temperature": 60.0, "ClockInfo.SM": 1980.0}, {"Temperature": 91.0, "ClockInfo.SM": 345.0}
        >>> together([cool, hot], "gpu")
        {'gpu/Temperature max': 91.0, 'gpu/ClockInfo.SM min': 345.0}
    """
    out: dict[str, float] = {}
    for name in {name: None for reading in readings for name in reading}:
        values = [reading[name] for reading in readings if name in reading]
        if name in _BITS:
            bits = 0
            for value in values:
                bits |= int(value)
            out[f"{prefix}/{name}"] = float(bits)
        else:
            least = name in _SMALLEST
            out[f"{prefix}/{name} {'min' if least else 'max'}"] = min(values) if least else max(values)
    return out
