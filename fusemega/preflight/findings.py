"""What one rank finds on its node: versions, GPUs, and whether they compute."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

# Facts of `fusemega env` that must be equal on all nodes.
EQUAL = (
    "python",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "apex",
    "NCCL",
    "driver",
    "fusemega",
)


def node_name() -> str:
    """This node as Slurm calls it, or its hostname."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class GpuFound:
    """One GPU that this process sees.

    Attributes:
        uuid, name, total_bytes: which one.
        faults: what is wrong with it, in words.
    """

    uuid: str
    name: str
    total_bytes: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What a rank tells the others.

    Attributes:
        rank, node: who says it.
        versions: by the names of `EQUAL`.
        broken: what `fusemega env` finds broken on the node, a line each.
        gpus: the GPUs that torch can use here.
        fault: why there should be a GPU that torch cannot use; None where nothing says so.
        gpus_asked: what the job has asked for on each node; None where nothing says so.
        paths: what it found at paths that should be shared, by key of the run file.
        path_faults: what is wrong with them.
    """

    rank: int
    node: str
    versions: dict[str, str] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    gpus: tuple[GpuFound, ...] = ()
    fault: str | None = None
    gpus_asked: int | None = None
    paths: dict[str, str] = field(default_factory=dict)
    path_faults: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Findings:
        gpus = tuple(GpuFound(**{**gpu, "faults": tuple(gpu["faults"])}) for gpu in found["gpus"])
        lists = {name: tuple(found[name]) for name in ("broken", "path_faults")}
        return cls(**{**found, **lists, "gpus": gpus})


def versions_and_faults() -> tuple[dict[str, str], tuple[str, ...]]:
    """The versions that must be equal, and what is broken; from `fusemega env`."""
    from fusemega import __version__
    from fusemega.runtime.environment import BROKEN, examine

    facts = examine()
    versions = {fact.name: fact.found for fact in facts if fact.name in EQUAL}
    # A version number stays while somebody edits an installed copy.
    versions["fusemega"] = f"{__version__}, source {_source_hash()}"
    broken = tuple(f"{fact.name} {fact.found}: {fact.note}" for fact in facts if fact.status == BROKEN)
    return versions, broken


def _source_hash() -> str:
    digest, package = xxhash.xxh3_64(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def asked_gpus(option: int | None) -> int | None:
    """GPUs that each node of the job should have: as given, or as Slurm was asked for."""
    if option is not None:
        return option
    slurm = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(slurm) if slurm.isdecimal() else None


def is_first_of_node() -> bool:
    """Whether this rank speaks for its node where one is enough."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
