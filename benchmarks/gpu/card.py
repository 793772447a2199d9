"""The device that is checked: its clock, its memory, its peak rate."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

# Dense bf16 of the data sheets, TFLOP/s, by a part of the name; the first that fits.
_PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)


@dataclass(frozen=True)
class Card:
    """The device of this process, and what it is called.

    Attributes:
        device: "cuda:0", or the CPU.
        name: of the GPU; "CPU" without one.
    """

    device: torch.device
    name: str

    @classmethod
    def find(cls) -> Card:
        """As a training run would take it.

        Raises:
            UserError: there should be a GPU, and torch cannot use it.
        """
        from fusemega.runtime.device import hide_gpus_if_unwanted, own_device

        hide_gpus_if_unwanted()
        device = own_device(0)
        return cls(device, torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU")

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def peak_tflops(self) -> float | None:
        """Of dense bf16 products, by the data sheet; None for a card that is not listed here."""
        return next((peak for part, peak in _PEAKS if part in self.name), None)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
        """The median time of `work`, waited for."""
        for _ in range(warm_up):
            work()
        taken = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return median(taken)

    def free(self) -> None:
        """Gives back what nothing refers to any more, and begins the maximum anew."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int:
        """Bytes of the GPU that tensors hold now; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.is_gpu else 0

    def most(self) -> int:
        """The most that they have held since `free`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else 0
