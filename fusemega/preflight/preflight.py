"""`fusemega preflight`: every rank looks at its node, and rank 0 says what is wrong, with which node, in time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemega.errors import UserError
from fusemega.files.output import write_durably
from fusemega.preflight import findings as found_here
from fusemega.preflight.all_reduce import Measured, measure
from fusemega.preflight.compare import Problem, problems_of
from fusemega.preflight.findings import Findings, node_name
from fusemega.preflight.gpus import gpus_here
from fusemega.preflight.meeting import Absent, Meeting, job_nodes
from fusemega.preflight.shared_paths import Token, is_seen, paths_in, seen
from fusemega.runtime.console import say
from fusemega.runtime.device import own_device

_AFTER_SECONDS = 30.0  # in which the ranks read each other's tokens, beside the deadline


@dataclass(frozen=True)
class NodeChecks:
    """What is to be checked.

    Attributes:
        values: the run file's, whose paths are looked at; {} for none.
        seconds: how long a rank is waited for.
        gpus_per_node: GPUs that each node should have; None: as Slurm says, or as other nodes have.
        min_bandwidth: the least bus bandwidth of the largest all-reduce, 10^9 bytes a second; None: any.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 120.0
    gpus_per_node: int | None = None
    min_bandwidth: float | None = None


@dataclass(frozen=True)
class NodesVerdict:
    """What a preflight has found, on every rank the same.

    Attributes:
        nodes: the nodes that came, in the order of their ranks.
        ranks: how many ranks came.
        problems: what is wrong.
        all_reduce: what was measured; [] where it did not come to that.
    """

    nodes: list[str]
    ranks: int
    problems: list[Problem]
    all_reduce: list[Measured] = field(default_factory=list)

    @property
    def bad_nodes(self) -> list[str]:
        return sorted({problem.node for problem in self.problems if problem.node})

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, "bad_nodes": self.bad_nodes, **asdict(self)}


def preflight(
    asked: NodeChecks, rank: int, world_size: int, told: Callable[[NodesVerdict], None] = lambda verdict: None
) -> NodesVerdict:
    """All checks. Collective, but no rank waits much longer than `asked.seconds` for one that does not come.

    Args:
        asked: what is checked.
        rank, world_size: this process's place.
        told: called by rank 0 with the verdict, before the other ranks know of it: they end, and may take it with them.

    Raises:
        Retryable: rank 0's machine does not answer.
    """
    meeting = Meeting(rank, world_size, asked.seconds)
    meeting.put("here", node_name())
    with_output = "output_dir" in asked.values and found_here.is_first_of_node()
    token = Token(str(asked.values["output_dir"])) if with_output else None
    try:
        written = None if token is None else token.write(rank)
        meeting.put("token", written)
        own = _own_findings(asked, rank, meeting, token is not None and written is None)
        meeting.put("found", own.as_json())
        if rank:
            verdict = _told(meeting)
        else:
            verdict = _judged(meeting, world_size)
            if verdict.problems or world_size == 1:
                told(verdict)
            meeting.put("verdict", {"problems": [asdict(each) for each in verdict.problems], "nodes": verdict.nodes})
        meeting.put("read", True)
        if rank == 0:
            _wait_for_readers(meeting)
    finally:
        if token is not None:
            token.remove()
    if verdict.problems or world_size == 1:
        return verdict
    return _with_all_reduce(verdict, meeting, asked, told)


def add_to_exclude_file(path: Path, nodes: Sequence[str]) -> None:
    """Adds nodes to a file of bad nodes, one a line; those that are in it stay.

    Raises:
        UserError: it cannot be written.
    """
    try:
        before = path.read_text(encoding="utf-8").split() if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(f"{node}\n" for node in dict.fromkeys([*before, *nodes])))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot write there: {error}") from None


def _own_findings(asked: NodeChecks, rank: int, meeting: Meeting, cannot_write: bool) -> Findings:
    gpus, fault = gpus_here()
    asked_gpus = found_here.asked_gpus(asked.gpus_per_node)
    if not found_here.is_first_of_node():
        return Findings(rank, node_name(), gpus=gpus, fault=fault, gpus_asked=asked_gpus)
    versions, broken = found_here.versions_and_faults()
    looked = {f"{key} {path}": seen(path) for key, path in paths_in(asked.values).items()}
    paths = {key: state for key, state in looked.items() if state is not None}
    shared = _shared(asked, meeting, cannot_write) if "output_dir" in asked.values else ()
    return Findings(rank, node_name(), versions, broken, gpus, fault, asked_gpus, paths, shared)


def _shared(asked: NodeChecks, meeting: Meeting, cannot_write: bool) -> tuple[str, ...]:
    """What is wrong with the output folder, which each node reads and writes."""
    folder, faults = str(asked.values["output_dir"]), []
    if cannot_write:
        faults.append(f"output_dir {folder}: cannot be written")
    try:
        first = meeting.all("token", [0], least=_AFTER_SECONDS)[0]
    except Absent:
        return tuple(faults)  # rank 0 is missing, which the others find too
    if first is not None and not is_seen(*first):
        faults.append(f"output_dir {folder}: a file that rank 0 has written is not there: not the same file system")
    return tuple(faults)


def _judged(meeting: Meeting, world_size: int) -> NodesVerdict:
    """On rank 0: the findings of all that came, and what is wrong."""
    absent: list[int] = []
    try:
        found = meeting.all("found", least=_AFTER_SECONDS / 2)
    except Absent as late:
        found, absent = meeting.said("found"), late.ranks
    findings = [Findings.of_json(found[rank]) for rank in sorted(found)]
    here = {rank: str(node) for rank, node in meeting.said("here").items()}
    nodes = list(dict.fromkeys(here[rank] for rank in sorted(here)))
    problems = [*_absences(absent, here, meeting.seconds), *problems_of(findings)]
    return NodesVerdict(nodes, len(findings), problems)


def _absences(absent: Sequence[int], here: Mapping[int, str], seconds: float) -> list[Problem]:
    """The ranks that did not come, or came and did not finish, with their nodes where these are known."""
    problems = []
    for rank in absent:
        if rank in here:
            problems.append(Problem(here[rank], f"rank {rank} came, and did not finish its checks in {seconds:.0f} s"))
    gone = [rank for rank in absent if rank not in here]
    if gone:
        unseen = [node for node in job_nodes() if node not in here.values()]
        came = f"{len(here)} came, from {', '.join(dict.fromkeys(here.values()))}"
        text = f"rank(s) {', '.join(map(str, gone))} did not come within {seconds:.0f} s; {came}"
        problems += [Problem(node, text) for node in unseen] or [Problem("", text)]
    return problems


def _told(meeting: Meeting) -> NodesVerdict:
    """On the other ranks: what rank 0 says."""
    try:
        found = meeting.all("verdict", [0], least=meeting.seconds + 2 * _AFTER_SECONDS)[0]
    except Absent:
        return NodesVerdict([], 0, [Problem("", "rank 0 has said nothing")])
    return NodesVerdict(found["nodes"], meeting.world_size, [Problem(**each) for each in found["problems"]])


def _wait_for_readers(meeting: Meeting) -> None:
    """Rank 0 may have the store in its process: it leaves last, but does not wait for those that are missing."""
    came = list(meeting.said("here"))
    with contextlib.suppress(Absent):
        meeting.all("read", came, least=_AFTER_SECONDS)


def _with_all_reduce(
    verdict: NodesVerdict, meeting: Meeting, asked: NodeChecks, told: Callable[[NodesVerdict], None]
) -> NodesVerdict:
    """The verdict with the all-reduce. Collective. Where it hangs, rank 0 names who is late and ends."""
    meeting.again()
    finished = threading.Event()
    guard = threading.Thread(target=_guard, args=(meeting, finished), daemon=True)
    if meeting.rank == 0:
        guard.start()
    device = own_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    nodes = [str(meeting.said("here")[rank]) for rank in range(meeting.world_size)]
    timeout = timedelta(seconds=2 * asked.seconds)
    dist.init_process_group(
        backend, store=meeting.store, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout
    )
    measured = measure(nodes, meeting.rank, device)
    meeting.put("reduced", [asdict(each) for each in measured])
    by_rank = meeting.all("reduced", least=_AFTER_SECONDS)
    finished.set()
    found = [Measured(**each) for rank in sorted(by_rank) for each in by_rank[rank]]
    dist.destroy_process_group()  # all have told their figures, so none is in an operation
    # Ranks differ a little in their times; of each size and group the first rank's are shown.
    shown = list({(each.group, each.bytes): each for each in reversed(found)}.values())[::-1]
    verdict = NodesVerdict(verdict.nodes, verdict.ranks, reduce_problems(found, asked.min_bandwidth), shown)
    if meeting.rank == 0:
        told(verdict)
        meeting.put("told", True)
    else:
        with contextlib.suppress(Absent, RuntimeError):  # rank 0 may have the store in its process, and be gone
            meeting.all("told", [0], least=_AFTER_SECONDS)
    return verdict


def reduce_problems(measured: Sequence[Measured], least: float | None) -> list[Problem]:
    """What is wrong with the all-reduces.

    Args:
        measured: those of all ranks, the largest last, and those of single nodes, as each rank has found them.
        least: the bandwidth that is asked for; None: any.
    """
    problems = []
    wrong = {each.group for each in measured if not each.is_right}
    nodes = {each.group: each for each in measured if each.group != "all"}
    for node in sorted(wrong - {"all"}):
        problems.append(Problem(node, "the sum of an all-reduce is wrong among its own ranks"))
    if wrong == {"all"}:
        where = " between nodes; among the ranks of each node it is right" if nodes else ""
        problems.append(Problem("", f"the sum of an all-reduce is wrong{where}"))
    if least is None:
        return problems
    slow = [each for each in nodes.values() if each.gb_per_second < least]
    for each in slow:
        speed = f"{each.gb_per_second:.3g} GB/s, and {least:g} is asked for"
        problems.append(Problem(each.group, f"an all-reduce of {each.bytes >> 20} MiB among its own ranks has {speed}"))
    size = max(each.bytes for each in measured)
    largest = next(each for each in measured if each.group == "all" and each.bytes == size)
    if not slow and largest.gb_per_second < least:
        speed = f"{largest.gb_per_second:.3g} GB/s, and {least:g} is asked for"
        alone = "; each node alone is fast enough" if nodes else ""
        problems.append(Problem("", f"an all-reduce of {size >> 20} MiB among all ranks has {speed}{alone}"))
    return problems


def _guard(meeting: Meeting, finished: threading.Event) -> None:
    """Ends an all-reduce that hangs: NCCL's would never return to the thread that called it."""
    if finished.wait(2 * meeting.seconds):
        return
    done = meeting.said("reduced")
    late = [rank for rank in range(meeting.world_size) if rank not in done]
    nodes = dict.fromkeys(str(meeting.said("here")[rank]) for rank in late)
    say(f"the all-reduce hangs: no end on rank(s) {', '.join(map(str, late))}, of {', '.join(nodes)}")
    os._exit(1)
