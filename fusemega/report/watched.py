"""What monitoring left of a run, for the page: titles of its charts, and a line for each rank."""

from __future__ import annotations

from fusemega.monitoring.ranks import RankState
from fusemega.training.records import SLOWEST, SLOWEST_RATIO

RANK_HEAD = ["rank", "node", "device", "iterations", "ended", "most so far", "errors of the device"]
_LEFT_OUT = (SLOWEST,)  # the number of a rank makes no curve
# By the end of the metric's name, without the kind of device and "max" or "min": title, factor.
_QUANTITIES: dict[str, tuple[str, float]] = {
    "MemoryInfo.used": ("GPU memory in use, GB", 1e-9),
    "PowerUsage": ("GPU power, W", 1e-3),
    "Temperature": ("GPU temperature, degrees Celsius", 1.0),
    "UtilizationRates.gpu": ("GPU utilization, percent", 1.0),
    "ClockInfo.SM": ("GPU clock, MHz", 1.0),
    "ClocksEventReasons": ("Reasons for the GPUs' clocks, bits", 1.0),
    "TotalEccErrors.corrected": ("Corrected ECC errors", 1.0),
    "TotalEccErrors.uncorrected": ("Uncorrected ECC errors", 1.0),
    "NvLinkErrorCounter": ("NVLink errors", 1.0),
    "cpu_percent": ("Load of the machine's cores, percent", 1.0),
    "virtual_memory.percent": ("Memory of the machine in use, percent", 1.0),
    "process.cpu_percent": ("Load of a process, percent of a core", 1.0),
    "process.memory_info.rss": ("Memory of a process, GB", 1e-9),
}
_WHICH = {"max": "of all ranks, the most", "min": "of all ranks, the least"}


def is_charted(metric: str) -> bool:
    """Whether a metric has a chart."""
    return metric not in _LEFT_OUT


def title_of(metric: str) -> tuple[str, str, float]:
    """Title, note and factor of a metric that monitoring adds.

    Example:
        >>> title_of("gpu/PowerUsage max")
        ('GPU power, W', 'of all ranks, the most', 0.001)
    """
    if metric == SLOWEST_RATIO:
        return "Slowest rank", "its own time for a token, as a multiple of the median of its peers", 1.0
    name, _, which = metric.partition("/")[2].partition(" ")
    title, factor = _QUANTITIES.get(name, (metric, 1.0))
    return title, _WHICH.get(which, "of all ranks together"), factor


def rank_cells(state: RankState) -> list[str]:
    """A rank's line of the table."""
    ended = state.ended or f"not ended; last in {state.doing}"
    most = [_in_words(name, value) for name, value in state.device_worst.items()]
    errors = "; ".join(state.device_errors)
    return [str(state.rank), state.host, state.device, f"{state.iteration:,}", ended, "; ".join(most), errors]


def _in_words(name: str, value: float) -> str:
    title, factor = _QUANTITIES.get(name, (name, 1.0))
    what, _, unit = title.partition(", ")
    return f"{what} {value * factor:.4g} {unit}".rstrip()
