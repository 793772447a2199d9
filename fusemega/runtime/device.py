"""Chooses the device of this process, and checks that all processes of a run agree.

`FUSEMEGA_DEVICE` is `cuda`, `cpu` (GPUs are then hidden from this process), or unset: the GPU if there is one. A
machine that should have a GPU but whose CUDA does not work is refused. On its CPU the run would take weeks, and the
other processes would wait for it in another kind of process group.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch

from fusemega.errors import UserError, choose

WANTED = "FUSEMEGA_DEVICE"
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES: the last is Slurm's, for a job without GPUs
_DEVICE_FILES = Path("/dev")
_KEY = "fusemega/device"


def hide_gpus_if_unwanted() -> None:
    """Obey FUSEMEGA_DEVICE=cpu: call it before CUDA is asked for anything.

    Raises:
        UserError: another value than cpu or cuda.
    """
    wanted = os.environ.get(WANTED, "")
    if wanted and choose(WANTED, wanted, ("cpu", "cuda")) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def own_device(local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU.

    A process that sees one GPU takes it, whatever its local rank: batch systems give each task its own
    (`srun --gpus-per-task=1`). Where it sees several, it takes that of its local rank.

    Raises:
        UserError: fewer GPUs than local ranks; a GPU that should be there and cannot be used.
    """
    if not torch.cuda.is_available():
        if reason := missing_gpu():
            raise UserError(
                f"{reason}; repair it (`fusemega env` says more), or set {WANTED}=cpu to compute on the CPU"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise UserError(
            f"LOCAL_RANK {local_rank}, and this process sees {count} GPUs{shown}: start at most {count} processes on "
            f"{socket.gethostname()}, or give each a GPU of its own (srun --gpus-per-task=1)"
        )
    return torch.device("cuda", index)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of host memory on `device`. The host does not wait for the copy, which for a GPU is made from pinned
    memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def missing_gpu() -> str | None:
    """Says why there should be a GPU that torch does not find; None if nothing says so, or the user hid the GPUs."""
    if os.environ.get(WANTED) == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return None
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    found = _evidence()
    if found is None and os.environ.get(WANTED) == "cuda":
        found = f"{WANTED}=cuda asks for one"
    return None if found is None else f"torch ({torch.__version__}, {build}) finds no usable GPU, and {found}"


def _evidence() -> str | None:
    """The evidence that this machine has a GPU. A CUDA build of torch is none, because it is the usual one anywhere."""
    files = sorted(file.name for file in _DEVICE_FILES.glob("nvidia[0-9]*"))
    if files:
        return f"there is /dev/{files[0]}"
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} names one"
    count = _nvml_devices()
    return f"the driver (NVML) counts {count}" if count else None


def _nvml_devices() -> int:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # the package or the driver is absent
        return 0


def agreed_device(local_rank: int, store: Any, rank: int, world_size: int) -> torch.device:
    """The result of `own_device`, once every rank has found one. Collective.

    Refuses, on every rank, a run on GPUs and CPUs at once, with two processes on one GPU, or with a rank without any.

    It comes before the process group, in which NCCL and gloo would wait for each other. The first rank reads what all
    have found, and the others read its verdict.

    Args:
        store: the key-value store that the ranks meet in.

    Raises:
        UserError: names the ranks and their hosts.
    """
    own = {"host": socket.gethostname()}
    try:
        device = own_device(local_rank)
        own |= {"device": str(device), "id": _identity(device)}
    except UserError as error:
        own |= {"fault": str(error)}
    store.set(f"{_KEY}/{rank}", json.dumps(own))
    if rank == 0:
        all_ranks = [json.loads(store.get(f"{_KEY}/{other}")) for other in range(world_size)]
        store.set(f"{_KEY}/verdict", _disagreement(all_ranks))
    verdict = store.get(f"{_KEY}/verdict").decode()
    if verdict and rank:
        store.set(f"{_KEY}/read/{rank}", "")
    elif verdict:
        store.wait([f"{_KEY}/read/{other}" for other in range(1, world_size)])  # this process may host the store
    if verdict:
        raise UserError(verdict)
    return device


def _identity(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def _disagreement(ranks: list[dict[str, str]]) -> str:
    """One line; empty where all is well. `ranks`: host of each, and its device and identity or its fault."""
    for rank, found in enumerate(ranks):
        if "fault" in found:
            return found["fault"] if len(ranks) == 1 else f"rank {rank} on {found['host']}: {found['fault']}"
    first: dict[str, int] = {}
    for rank, found in enumerate(ranks):
        first.setdefault(torch.device(found["device"]).type, rank)
    if len(first) > 1:
        told = ", ".join(f"rank {rank} on {ranks[rank]['host']} computes on {kind}" for kind, rank in first.items())
        return (
            f"all processes of a run compute on one kind of device, and {told}: set {WANTED} everywhere, or repair one"
        )
    owner: dict[tuple[str, str], int] = {}
    for rank, found in enumerate(ranks):
        other = owner.setdefault((found["host"], found["id"]), rank)
        if found["id"] and other != rank:
            where = f"the GPU {found['id']} of {found['host']}"
            return f"ranks {other} and {rank} are both on {where}: start one process for each GPU"
    return ""
