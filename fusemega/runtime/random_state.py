"""Saves and restores every random generator of this process, as byte tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def random_state() -> dict[str, torch.Tensor]:
    """Name -> uint8 [bytes]: torch's CPU and device generators, and Megatron's named ones."""
    # Without CUDA "device" is the CPU generator once more (`cpu_backend.py`).
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    return states | {name: state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()}


def restore_random_state(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    states = dict(states)
    torch.set_rng_state(states.pop("cpu"))
    torch.cuda.set_rng_state(states.pop("device"))
    get_cuda_rng_tracker().set_states(states)
