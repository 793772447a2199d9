"""The parts of the check, in order of worth: what comes first has run when the time is up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part, which runs in a process of its own.

    Attributes:
        name: on the command line and in the table.
        module: imported there; its `measure(report, job)` writes the rows.
        limit: seconds after which the process is ended.
        needs: what has to be there, of `worker.NEEDS`; without it the part is "not measured".
    """

    name: str
    module: str
    limit: float
    needs: tuple[str, ...] = ()


PARTS = (
    Part("environment", "gpu.environment", 60),
    Part("head", "gpu.exact_head", 60),
    Part("attention", "gpu.packed_attention", 120),
    Part("objectives", "gpu.objectives", 150),
    Part("resume", "gpu.resume", 120),
    Part("head-cost", "gpu.head_cost", 90),
    Part("speed-1b", "gpu.speed", 120),
    Part("speed-8b", "gpu.speed", 120, ("gpu",)),
    Part("shared-prompts", "gpu.shared_prompts", 120),
    Part("fusion", "gpu.real_fusion", 180),
    Part("fp8", "gpu.fp8", 120, ("gpu", "transformer_engine")),
    Part("experts", "gpu.fp8", 90, ("gpu", "transformer_engine")),
)
