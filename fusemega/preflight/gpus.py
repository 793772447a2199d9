"""The GPUs that this process sees: there, sound by NVML, and able to multiply."""

from __future__ import annotations

import torch

from fusemega.preflight.findings import GpuFound
from fusemega.runtime.device import missing_gpu
from fusemega.runtime.nvml import health


def gpus_here() -> tuple[tuple[GpuFound, ...], str | None]:
    """The GPUs, and why there should be some that torch cannot use (None: nothing says so)."""
    if not torch.cuda.is_available():
        return (), missing_gpu()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = str(properties.uuid)
        faults = [*health(uuid), *_wrong_product(torch.device("cuda", index))]
        found.append(GpuFound(uuid, properties.name, properties.total_memory, tuple(faults)))
    return tuple(found), None


def _wrong_product(device: torch.device) -> list[str]:
    """Multiplies matrices of small whole numbers, whose product is exact in fp32."""
    try:
        numbers = torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024)
        a, b = numbers.remainder(5), numbers.remainder(3)
        product = (a.to(device) @ b.to(device)).cpu()
    except RuntimeError as error:
        return [f"cannot compute: {str(error).strip().splitlines()[0]}"]
    return [] if torch.equal(product, a @ b) else ["a product of two matrices is wrong"]
