"""One GPU as NVML sees it: readings by NVML's names and in its units, and faults: XIDs, a lost GPU, ECC, NVLink.

What a GPU or its driver does not support is left out. Queries may take milliseconds, and much longer where a GPU fails:
they are for a thread that nobody waits for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# nvmlClocksEventReasons that say that a GPU is slowed down because something is wrong. SwPowerCap is usual under load.
SLOWDOWNS = {
    0x08: "HwSlowdown",
    0x20: "SwThermalSlowdown",
    0x40: "HwThermalSlowdown",
    0x80: "HwPowerBrakeSlowdown",
}
# What NVIDIA's list of XIDs says of those that training meets.
XIDS = {
    13: "graphics engine exception: most often an access out of bounds in a kernel",
    31: "memory page fault: most often an illegal address in a kernel",
    32: "invalid or corrupted push buffer: the bus, or the driver",
    38: "driver firmware error",
    43: "a kernel stopped: the application's fault, the GPU is sound",
    45: "work was removed: the application ended, or an earlier error",
    48: "double-bit ECC error: the application ends; reset the GPU",
    61: "internal micro-controller breakpoint: reset the GPU",
    62: "internal micro-controller halt: reset the GPU",
    63: "a memory row or page is to be retired: drain the node and reset the GPU soon",
    64: "a memory row or page could not be retired: reset the GPU",
    68: "video processor exception",
    69: "graphics engine class error",
    74: "NVLink error: check the links and the switch",
    79: "the GPU has fallen off the bus: power, heat or the board; drain the node",
    92: "many single-bit ECC errors: watch the GPU",
    94: "contained ECC error: the application ends, others go on; reset the GPU when idle",
    95: "uncontained ECC error: all applications on the GPU are affected; reset the GPU",
    119: "the GPU's system processor does not answer: reset the GPU or the node",
    120: "error of the GPU's system processor: reset the GPU or the node",
    121: "corrected error of the link between chips",
    140: "ECC error that could not be recovered: reset the GPU",
    143: "error at the start of the GPU's system processor",
    145: "NVLink error of the links' level: check the links and the switch",
    149: "NVLink error: check the links and the switch",
}
_UNKNOWN = "NVIDIA's list of XIDs says what it means"
_COUNTERS = ("DL_REPLAY", "DL_RECOVERY", "DL_CRC_FLIT")


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a GPU.

    Attributes:
        kind: "xid", "lost", "ecc", "nvlink" or "slowdown".
        text: what, and what it means; without the GPU and the node.
        is_error: whether `monitoring.on_gpu_error` applies; a GPU that is merely slow is no error.
    """

    kind: str
    text: str
    is_error: bool = True


@dataclass(frozen=True)
class Reading:
    """One sample.

    Attributes:
        values: by NVML's names, in NVML's units: MemoryInfo.used (bytes), PowerUsage (mW), Temperature (C),
            UtilizationRates.gpu (percent), ClockInfo.SM (MHz), ClocksEventReasons (bits), TotalEccErrors.corrected and
            .uncorrected, NvLinkErrorCounter (of all links).
        faults: those since the last sample.
    """

    values: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def health(uuid: str | None) -> list[str]:
    """What is wrong with a GPU now, a line each; [] where nothing is, or NVML does not say.

    Uncorrected ECC errors, memory rows that wait to be remapped or cannot be, clocks that are slowed down, a lost GPU.
    """
    try:
        gpu = Gpu(uuid)
    except RuntimeError as error:
        return [str(error)] if "lost" in str(error) else []
    try:
        return gpu.faults_now()
    finally:
        gpu.close()


class Gpu:
    """A GPU that is read repeatedly.

    Args:
        uuid: which one, as torch gives it; None: the first.

    Raises:
        RuntimeError: NVML or the GPU cannot be opened; says why.
    """

    def __init__(self, uuid: str | None) -> None:
        try:
            import pynvml
        except ImportError:
            raise RuntimeError("the package nvidia-ml-py is not installed") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            if uuid is None:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML: {error}") from None
        self._events = self._registered()
        self._links = [link for link in range(18) if self._try(pynvml.nvmlDeviceGetNvLinkState, link) == 1]
        self._before: dict[str, float] = {}
        self._slow = 0
        self._is_lost = False

    def read(self) -> Reading:
        """One sample. Raises nothing; a lost GPU has no values any more."""
        reading = Reading()
        if not self._is_lost:
            self._read_values(reading.values)
            self._find_faults(reading)
        self._read_events(reading.faults)
        return reading

    def faults_now(self) -> list[str]:
        """What is wrong with it, whatever was read before; see `health`."""
        values: dict[str, float] = {}
        self._read_values(values)
        if self._is_lost:
            return ["NVML: GPU is lost"]
        found = []
        if uncorrected := values.get("TotalEccErrors.uncorrected"):
            found.append(f"{uncorrected:.0f} uncorrected ECC errors since the driver was loaded")
        rows = self._try(self._nvml.nvmlDeviceGetRemappedRows)
        if rows is not None and (rows[2] or rows[3]):
            found.append(
                "a memory row could not be remapped" if rows[3] else "a memory row waits for a reset to be remapped"
            )
        slow = int(values.get("ClocksEventReasons", 0.0))
        if names := [name for bit, name in SLOWDOWNS.items() if slow & bit]:
            found.append(f"slowed down ({', '.join(names)})")
        return found

    def close(self) -> None:
        if self._events is not None:
            self._try_free(self._events)
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _read_values(self, values: dict[str, float]) -> None:
        nvml = self._nvml
        wanted: dict[str, Callable[[], Any]] = {
            "MemoryInfo.used": lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle).used,
            "PowerUsage": lambda: nvml.nvmlDeviceGetPowerUsage(self._handle),
            "Temperature": lambda: nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU),
            "UtilizationRates.gpu": lambda: nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu,
            "ClockInfo.SM": lambda: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM),
            "ClocksEventReasons": self._reasons,
            "TotalEccErrors.corrected": lambda: self._ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            "TotalEccErrors.uncorrected": lambda: self._ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        }
        if self._links:
            wanted["NvLinkErrorCounter"] = self._link_errors
        for name, ask in wanted.items():
            try:
                values[name] = float(ask())
            except nvml.NVMLError as error:
                if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                    self._is_lost = True
                    values.clear()
                    return

    def _find_faults(self, reading: Reading) -> None:
        if self._is_lost:
            reading.faults.append(Fault("lost", "NVML: GPU is lost: it does not answer any more; drain the node"))
            return
        values, before = reading.values, self._before
        if (now := values.get("TotalEccErrors.uncorrected", 0.0)) > before.get("TotalEccErrors.uncorrected", now):
            text = f"{now:.0f} uncorrected ECC errors since the driver was loaded: results may be wrong; reset the GPU"
            reading.faults.append(Fault("ecc", text))
        if (now := values.get("NvLinkErrorCounter", 0.0)) > before.get("NvLinkErrorCounter", now):
            more = now - before["NvLinkErrorCounter"]
            text = f"{more:.0f} new NVLink errors ({now:.0f} in all): transfers are repeated; check the links"
            reading.faults.append(Fault("nvlink", text, is_error=False))
        slow = int(values.get("ClocksEventReasons", 0.0))
        if new := [name for bit, name in SLOWDOWNS.items() if slow & bit and not self._slow & bit]:
            clock = f" at {values['ClockInfo.SM']:.0f} MHz" if "ClockInfo.SM" in values else ""
            heat = f", {values['Temperature']:.0f} C" if "Temperature" in values else ""
            text = f"slowed down ({', '.join(new)}){clock}{heat}: cooling or power"
            reading.faults.append(Fault("slowdown", text, is_error=False))
        self._before, self._slow = dict(values), slow

    def _read_events(self, faults: list[Fault]) -> None:
        for _ in range(64 if self._events is not None else 0):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError:  # none waits, or the driver gives none any more
                return
            number = int(event.eventData)
            faults.append(Fault("xid", f"XID {number}: {XIDS.get(number, _UNKNOWN)}"))

    def _registered(self) -> Any:
        """A set of XID events of this GPU; None where the driver has none for this process."""
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            return None
        try:
            nvml.nvmlDeviceRegisterEvents(self._handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            self._try_free(events)
            return None
        return events

    def _try_free(self, events: Any) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlEventSetFree(events)

    def _reasons(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        except self._nvml.NVMLError_FunctionNotFound:  # drivers before 535 have the older name
            return int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))

    def _ecc(self, kind: int) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, self._nvml.NVML_VOLATILE_ECC))

    def _link_errors(self) -> float:
        kinds = [getattr(self._nvml, f"NVML_NVLINK_ERROR_{name}") for name in _COUNTERS]
        found = [
            self._nvml.nvmlDeviceGetNvLinkErrorCounter(self._handle, link, k) for link in self._links for k in kinds
        ]
        return float(sum(found))

    def _try(self, query: Callable[..., Any], *more: Any) -> Any:
        try:
            return query(self._handle, *more)
        except self._nvml.NVMLError:
            return None
