"""What is asked of Slurm for a job: nodes, GPUs, time, and what the site's file says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusemega.cluster.slurm import seconds_of
from fusemega.errors import UserError
from fusemega.files.opening import read_bytes

_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_REFERENCE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_SITE_BYTES = 1 << 20
_OPTIONS = {f"SBATCH_{name.upper()}": name for name in ("partition", "account", "qos", "reservation", "constraint")}
"""What sbatch reads from its environment, and the option that says the same in a script."""


@dataclass(frozen=True)
class Site:
    """A file of the site's settings (slurm/site.env.example): NAME=VALUE lines and others, which bash reads in a job.

    Attributes:
        path: the file; None: there is none, and the job takes the environment's own settings.
        text: its text.
        values: names -> values, quotes removed and references resolved: to lines before, else to the environment.
    """

    path: Path | None = None
    text: str = ""
    values: Mapping[str, str] = field(default_factory=dict)


def read_site(path: Path) -> Site:
    """The site's file.

    Raises:
        UserError: it cannot be read; a variable has no value, or refers to one that is not set; an option of sbatch
            that is not known here.
    """
    try:
        text = read_bytes(path, limit=_SITE_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8") from None
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if (hit := _LINE.fullmatch(line)) is None:
            continue  # a comment, or a command such as `module load`
        value = re.sub(r"(^|\s+)#.*$", "", hit[2]).strip()
        quote = value[:1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else ""
        value = value[1:-1] if quote else value
        if not value:
            raise UserError(f"{path}:{number}: {hit[1]} has no value; fill it in, or take the line out")
        if quote != "'":
            value = _resolved(value, values, f"{path}:{number}: {hit[1]}")
        if hit[1].startswith("SBATCH_") and hit[1] not in _OPTIONS:
            raise UserError(
                f"{path}:{number}: {hit[1]}: not read here; allowed: {', '.join(_OPTIONS)}; other options of sbatch: "
                "--sbatch=--OPTION=VALUE"
            )
        values[hit[1]] = value
    if {"CONTAINER_MOUNTS", "CONTAINER_WORKDIR"} & values.keys() and "CONTAINER_IMAGE" not in values:
        raise UserError(f"{path}: CONTAINER_IMAGE is not set, but CONTAINER_MOUNTS or CONTAINER_WORKDIR is")
    return Site(path, text, values)


def _resolved(value: str, before: Mapping[str, str], where: str) -> str:
    """The value with its references to lines `before`, else to the environment, replaced."""

    def found(reference: re.Match[str]) -> str:
        name = reference[1] or reference[2]
        if not (said := before.get(name) or os.environ.get(name)):
            raise UserError(f"{where} refers to {name}, which is not set; fill it in")
        return said

    return _REFERENCE.sub(found, value)


def use_caches(site: Site) -> None:
    """Takes the caches that the jobs will use for this process too, so that what it prepares is found there."""
    for name in ("FUSEMEGA_CACHE", "HF_HOME"):
        if (value := site.values.get(name)) is not None and name not in os.environ:
            os.environ[name] = value


@dataclass(frozen=True)
class JobRequest:
    """What a job gets.

    Attributes:
        nodes, gpus_per_node: where a command runs as several ranks, one for each GPU.
        time: limit of a job, in Slurm's form.
        cpus_per_gpu: cores for each rank.
        exclusive: whether a job of several ranks has its nodes for itself.
        options: further words for sbatch, such as `--qos=high`.
        partition, account: "": the site's file says, or Slurm's default.
        site: the site's file.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    cpus_per_gpu: int = 8
    exclusive: bool = True
    options: Sequence[str] = ()
    partition: str = ""
    account: str = ""
    site: Site = Site()

    def __post_init__(self) -> None:
        if not self.seconds:
            raise UserError(
                f"--time: found {self.time!r}; allowed: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS or "
                "DAYS-HOURS:MINUTES:SECONDS"
            )
        for name, value in (("--partition", self.partition), ("--account", self.account)):
            if value and not re.fullmatch(r"[\w.,@+-]+", value):
                raise UserError(f"{name}: found {value!r}; expected a name")
        for word in self.options:
            if not re.fullmatch(r"--?[a-zA-Z][\w-]*(=\S+)?", word):
                raise UserError(f"--sbatch: found {word!r}; expected one option, as in --sbatch=--qos=high")

    @property
    def world_size(self) -> int:
        """Ranks of a command that runs as several."""
        return self.nodes * self.gpus_per_node

    @property
    def seconds(self) -> int:
        """The time limit; 0: not a duration."""
        return seconds_of(self.time) or 0

    def place(self) -> list[str]:
        """Options of every job: partition, account, time, and what was added."""
        given = {"partition": self.partition, "account": self.account}
        words = [f"--time={self.time}"]
        for variable, name in _OPTIONS.items():
            if value := given.get(name) or self.site.values.get(variable, ""):
                words.append(f"--{name}={value}")
        return [*words, *self.options]

    def ranks(self) -> list[str]:
        """Options of a job whose command runs as a rank for each GPU; one task on each node."""
        words = [f"--nodes={self.nodes}", "--ntasks-per-node=1", f"--gpus-per-node={self.gpus_per_node}"]
        words.append(f"--cpus-per-task={self.cpus_per_gpu * self.gpus_per_node}")
        return [*words, "--exclusive", "--mem=0"] if self.exclusive else words

    def single(self, gpu: bool) -> list[str]:
        """Options of a job of one process, with a GPU or without."""
        words = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={self.cpus_per_gpu}"]
        return [*words, "--gpus-per-node=1"] if gpu else words


def ranks_per_node(given: int | None, site: Site) -> int:
    """Ranks, and GPUs, of each node.

    Args:
        given: what the command line says.
        site: NPROC_PER_NODE of it, or of the environment, decides how many ranks the job starts.

    Raises:
        UserError: the two differ.
    """
    place = "NPROC_PER_NODE" if "NPROC_PER_NODE" in os.environ else f"{site.path}: NPROC_PER_NODE"
    said = os.environ.get("NPROC_PER_NODE") or site.values.get("NPROC_PER_NODE")
    if said is None:
        return given or 8
    if not re.fullmatch(r"[1-9]\d{0,3}", said):
        raise UserError(f"{place}: found {said!r}; expected a number")
    if given is not None and given != int(said):
        raise UserError(f"--gpus-per-node {given}, and {place} is {said}, which the job would start; give one of them")
    return int(said)
