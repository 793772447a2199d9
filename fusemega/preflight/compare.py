"""What is wrong among the findings of all ranks, and with which node. Pure functions of the findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusemega.preflight.findings import EQUAL, Findings, GpuFound

GIB = 1 << 30


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        node: the node to be left out; "" where no single node is to blame.
        text: what is wrong, in one line, without the node.
    """

    node: str
    text: str

    @property
    def line(self) -> str:
        return f"bad node {self.node}: {self.text}" if self.node else self.text


def problems_of(findings: Sequence[Findings]) -> list[Problem]:
    """Everything that is wrong, each once for a node, in the order of the checks.

    Where nodes differ, those that are fewer are named; of two halves, the half without rank 0.
    """
    found = [*_broken(findings), *_unequal_versions(findings), *_gpus(findings), *_paths(findings)]
    return list(dict.fromkeys(found))


def _broken(findings: Sequence[Findings]) -> Iterator[Problem]:
    for each in findings:
        if each.fault is not None:
            yield Problem(each.node, each.fault)
        for line in each.broken:
            yield Problem(each.node, line)


def _unequal_versions(findings: Sequence[Findings]) -> Iterator[Problem]:
    for name in EQUAL:
        by_node = {each.node: each.versions[name] for each in findings if name in each.versions}
        for node, value, usual, count in _odd_ones(by_node):
            yield Problem(node, f"{name} is {value}, and on {count} other node(s) {usual}")


def _gpus(findings: Sequence[Findings]) -> Iterator[Problem]:
    nodes: dict[str, dict[str, GpuFound]] = {}
    for each in findings:
        nodes.setdefault(each.node, {}).update({gpu.uuid: gpu for gpu in each.gpus})
    asked = next((each.gpus_asked for each in findings if each.gpus_asked is not None), None)
    faulty = {each.node for each in findings if each.fault is not None}
    for node, gpus in nodes.items():
        for gpu in gpus.values():
            for fault in gpu.faults:
                yield Problem(node, f"{gpu.name} {gpu.uuid}: {fault}")
        if asked is not None and len(gpus) != asked and node not in faulty:
            yield Problem(node, f"torch can use {len(gpus)} GPU(s), and the job has asked for {asked} on each node")
    if asked is None:
        counts = {node: f"{len(gpus)} GPU(s)" for node, gpus in nodes.items() if node not in faulty}
        most = max((len(gpus) for gpus in nodes.values()), default=0)
        for node, count in counts.items():
            # A node without a GPU among nodes with some is the bad one, however many there are of it.
            if most and not nodes[node]:
                yield Problem(node, f"torch can use {count}, and other nodes have {most}")
        some = {node: count for node, count in counts.items() if nodes[node]}
        for node, value, usual, others in _odd_ones(some):
            yield Problem(node, f"torch can use {value}, and on {others} other node(s) {usual}")
    kinds = {
        node: ", ".join(sorted({f"{gpu.name} of {gpu.total_bytes / GIB:.0f} GiB" for gpu in gpus.values()}))
        for node, gpus in nodes.items()
        if gpus
    }
    for node, value, usual, others in _odd_ones(kinds):
        yield Problem(node, f"has {value}, and {others} other node(s) {usual}")


def _paths(findings: Sequence[Findings]) -> Iterator[Problem]:
    for each in findings:
        for text in each.path_faults:
            yield Problem(each.node, text)
    speakers = [each for each in findings if each.versions]  # one of each node looks at paths
    for key in {key: None for each in speakers for key in each.paths}:
        by_node = {each.node: each.paths.get(key, "nothing is there") for each in speakers}
        for node, value, usual, count in _odd_ones(by_node):
            yield Problem(node, f"{key}: {value}, and on {count} other node(s) {usual}")


def _odd_ones(by_node: dict[str, str]) -> Iterator[tuple[str, str, str, int]]:
    """Nodes whose value is not the usual one: node, its value, the usual one, how many have that."""
    counts = Counter(by_node.values())
    if len(counts) < 2:
        return
    most = max(counts.values())
    usual = next(value for value in by_node.values() if counts[value] == most)  # the first node's, of two halves
    for node, value in by_node.items():
        if value != usual:
            yield node, value, usual, most
