"""What is wrong among the nodes, and with which: pure functions of what ranks have found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fusemega.errors import UserError
from fusemega.preflight.all_reduce import Measured
from fusemega.preflight.compare import problems_of
from fusemega.preflight.findings import Findings, GpuFound
from fusemega.preflight.preflight import NodesVerdict, add_to_exclude_file, reduce_problems
from fusemega.preflight.shared_paths import Token, is_seen, paths_in, seen

GPUS = tuple(GpuFound(f"uuid{i}", "H100", 80 << 30) for i in range(2))
VERSIONS = {"python": "3.11", "torch": "2.13.0", "driver": "580"}
GOOD = [Findings(i, f"node{i}", VERSIONS, gpus=tuple(replace(g, uuid=f"{g.uuid}{i}") for g in GPUS)) for i in range(3)]


def _lines(*findings: Findings) -> list[str]:
    return [problem.line for problem in problems_of(findings)]


def test_nodes_that_are_alike_have_no_problem() -> None:
    assert _lines(*GOOD) == [] and _lines(GOOD[0]) == []
    assert _lines(*(replace(each, gpus_asked=2) for each in GOOD)) == []


def test_a_node_with_another_version_is_named() -> None:
    odd = replace(GOOD[1], versions={**VERSIONS, "torch": "2.12.0"})
    assert _lines(GOOD[0], odd, GOOD[2]) == ["bad node node1: torch is 2.12.0, and on 2 other node(s) 2.13.0"]
    # Of two halves, that without rank 0.
    assert _lines(GOOD[0], odd) == ["bad node node1: torch is 2.12.0, and on 1 other node(s) 2.13.0"]


def test_a_node_whose_gpus_do_not_work_is_named_and_never_taken_for_a_cpu_node() -> None:
    fault = "torch (2.13.0, CUDA 13.0) finds no usable GPU, and there is /dev/nvidia0"
    blind = replace(GOOD[2], gpus=())
    assert _lines(*GOOD[:2], replace(blind, fault=fault)) == [f"bad node node2: {fault}"]
    # Nothing on the node says that there should be one: other nodes do, or the job.
    assert _lines(*GOOD[:2], blind) == ["bad node node2: torch can use 0 GPU(s), and other nodes have 2"]
    assert _lines(GOOD[0], replace(blind, node="a"), replace(blind, node="b")) == [
        "bad node a: torch can use 0 GPU(s), and other nodes have 2",
        "bad node b: torch can use 0 GPU(s), and other nodes have 2",
    ]
    assert _lines(replace(blind, gpus_asked=8)) == [
        "bad node node2: torch can use 0 GPU(s), and the job has asked for 8 on each node"
    ]


def test_gpus_are_counted_by_node_and_compared() -> None:
    one = replace(GOOD[1], gpus=GOOD[1].gpus[:1])
    assert _lines(GOOD[0], one, GOOD[2]) == ["bad node node1: torch can use 1 GPU(s), and on 2 other node(s) 2 GPU(s)"]
    # Two ranks of a node with a GPU each are a node with two.
    second = replace(one, rank=3, versions={}, gpus=GOOD[1].gpus[1:])
    assert _lines(GOOD[0], one, GOOD[2], second) == []
    small = replace(GOOD[1], gpus=tuple(replace(gpu, total_bytes=40 << 30) for gpu in GOOD[1].gpus))
    assert _lines(GOOD[0], small, GOOD[2]) == ["bad node node1: has H100 of 40 GiB, and 2 other node(s) H100 of 80 GiB"]
    sick = replace(
        GOOD[1], gpus=(replace(GOOD[1].gpus[0], faults=("a product of two matrices is wrong",)), GOOD[1].gpus[1])
    )
    assert _lines(GOOD[0], sick, GOOD[2]) == ["bad node node1: H100 uuid01: a product of two matrices is wrong"]


def test_what_is_broken_or_not_shared_is_named() -> None:
    paths = {"model.load /m": "a folder of 3 file(s), 10 bytes, 0a"}
    first, second, third = (replace(each, paths=paths) for each in GOOD)
    assert _lines(first, second, replace(third, paths={})) == [
        "bad node node2: model.load /m: nothing is there, and on 2 other node(s) a folder of 3 file(s), 10 bytes, 0a"
    ]
    assert _lines(first, second, replace(third, path_faults=("output_dir /o: cannot be written",))) == [
        "bad node node2: output_dir /o: cannot be written"
    ]
    assert _lines(first, second, replace(third, broken=("psutil -: missing",))) == ["bad node node2: psutil -: missing"]
    # Ranks that do not speak for their node have looked at no path.
    assert _lines(first, replace(first, rank=4, versions={}, paths={}), second) == []


def test_findings_travel_as_json() -> None:
    sick = replace(GOOD[0], gpus=(replace(GPUS[0], faults=("hot",)),), broken=("x",), path_faults=("y",), gpus_asked=3)
    assert Findings.of_json(sick.as_json()) == sick


def test_paths_of_a_run_file() -> None:
    values = {
        "output_dir": "/o",
        "model": {"load": "/m", "dtype": "fp32"},
        "data": {"path": ["a/b", "c"]},
        "url": "http://x/y",
    }
    assert paths_in(values) == {"model.load": "/m", "data.path.0": "a/b"}


def test_what_is_at_a_path(tmp_path: Path) -> None:
    assert seen(str(tmp_path / "absent")) is None
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    first = seen(str(tmp_path / "m"))
    assert str(first).startswith("a folder of 1 file(s), 2 bytes, ")
    (tmp_path / "m" / "config.json").write_text("[]")
    assert seen(str(tmp_path / "m")) != first
    (tmp_path / "f").write_text("text")
    assert str(seen(str(tmp_path / "f"))).startswith("a file of 4 bytes, ")


def test_a_token_is_read_by_others_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusemega.preflight.shared_paths._PATIENCE_SECONDS", 0.1)
    token = Token(str(tmp_path / "not" / "there"))
    assert token.folder == tmp_path
    written = token.write(0)
    assert written is not None and is_seen(*written) and not is_seen(written[0], "other")
    token.remove()
    assert list(tmp_path.iterdir()) == [] and not is_seen(*written)
    assert Token("/proc/x").write(0) is None


def test_bad_nodes_are_added_to_a_file(tmp_path: Path) -> None:
    odd = replace(GOOD[1], versions={**VERSIONS, "torch": "2.12.0", "python": "3.9"})
    verdict = NodesVerdict(["node0", "node1", "node2"], 3, problems_of([GOOD[0], odd, GOOD[2]]))
    assert verdict.bad_nodes == ["node1"] and len(verdict.problems) == 2
    file = tmp_path / "deep" / "exclude"
    add_to_exclude_file(file, verdict.bad_nodes)
    add_to_exclude_file(file, ["node7", "node1"])
    assert file.read_text() == "node1\nnode7\n"
    with pytest.raises(UserError, match="cannot write there"):
        add_to_exclude_file(tmp_path / "deep" / "exclude" / "x", ["a"])


def test_an_all_reduce_that_is_slow_or_wrong_names_a_node_where_it_can() -> None:
    def lines(*measured: Measured, least: float | None = None) -> list[str]:
        return [problem.line for problem in reduce_problems(measured, least)]

    whole, one, two = (Measured(group, 8 << 20, 0.1, 10.0, True) for group in ("all", "node1", "node2"))
    assert lines(whole, one, two) == lines(whole, one, two, least=10.0) == []
    assert lines(replace(whole, gb_per_second=2.0), one, two, least=5) == [
        "an all-reduce of 8 MiB among all ranks has 2 GB/s, and 5 is asked for; each node alone is fast enough"
    ]
    assert lines(replace(whole, gb_per_second=2.0), replace(one, gb_per_second=3.0), two, least=5) == [
        "bad node node1: an all-reduce of 8 MiB among its own ranks has 3 GB/s, and 5 is asked for"
    ]
    wrong = replace(whole, is_right=False)
    assert lines(wrong, replace(one, is_right=False), two) == [
        "bad node node1: the sum of an all-reduce is wrong among its own ranks"
    ]
    assert lines(wrong, one, two) == [
        "the sum of an all-reduce is wrong between nodes; among the ranks of each node it is right"
    ]
    assert lines(wrong) == ["the sum of an all-reduce is wrong"]
