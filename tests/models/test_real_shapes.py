"""Models of 7B to 70B parameters by shape alone: rules, Megatron's parameters and the read plan, without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from fusemega.files.boxes import Box, volume
from fusemega.models.registry import architecture_of
from fusemega.models.rules import VocabRows, WeightRanks
from fusemega.models.stages import check_layout, stage_rules
from tests.models.published import PARAMETERS, PUBLISHED
from tests.models.test_stages import layout

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (4, 4), (8, 2), (8, 4)]
CASES = [
    (name, tp, pp)
    for name, config in PUBLISHED.items()
    for tp, pp in LAYOUTS
    if config["num_key_value_heads"] % tp == 0 and config["num_hidden_layers"] % pp == 0
]


def overlap(a: Box, b: Box) -> bool:
    return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b, strict=True))


def assert_tiles(boxes: list[Box], shape: tuple[int, ...], covered: int) -> None:
    """The boxes lie inside `shape`, no two overlap, and together they cover `covered` elements."""
    assert all(0 <= start < stop <= n for box in boxes for (start, stop), n in zip(box, shape, strict=True))
    boxes = sorted(boxes)
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if b[0][0] >= a[0][1]:
                break  # sorted by first row: no later one can overlap either
            assert not overlap(a, b)
    assert sum(volume(box) for box in boxes) == covered


def test_the_cases_reach_every_model_and_a_layout_of_32_ranks() -> None:
    assert {name for name, _, _ in CASES} == set(PUBLISHED)
    assert ("Llama-3.1-70B", 8, 4) in CASES and ("Qwen2.5-7B", 4, 4) in CASES


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_every_element_is_on_exactly_one_rank(name: str, tp: int, pp: int) -> None:
    config = PUBLISHED[name]
    check_layout(architecture_of(config), layout(tp, pp))
    held: dict[str, list[Box]] = defaultdict(list)
    replicated: set[str] = set()
    for pp_rank in range(pp):
        for rule in stage_rules(architecture_of(config), layout(tp, pp), pp_rank):
            if rule.partition_dim is None:
                replicated |= rule.hf_shapes().keys()
            for tp_rank in range(tp):
                ranks = WeightRanks(tp, tp_rank)
                pieces = rule.pieces(ranks)
                local = torch.Size(rule.local_shape(ranks))
                padding = isinstance(rule, VocabRows) and config["vocab_size"] % tp
                assert padding or sum(volume(piece.local_box) for piece in pieces) == local.numel()
                assert_tiles([p.local_box for p in pieces], local, sum(volume(p.local_box) for p in pieces))
                assert all(volume(p.local_box) == volume(p.hf_box) for p in pieces)
                if rule.duplicate:  # a tied head, beside the embedding of another stage
                    continue
                if rule.partition_dim is not None or tp_rank == 0:
                    for piece in pieces:
                        held[piece.hf].append(piece.hf_box)
                else:  # the same on every tensor-parallel rank
                    assert pieces == rule.pieces(ranks.at(0))
    shapes = {key: shape for rule in architecture_of(config).rules() for key, shape in rule.hf_shapes().items()}
    assert held.keys() == shapes.keys()
    for key, shape in shapes.items():
        assert_tiles(held[key], shape, torch.Size(shape).numel())
    assert sum(volume(box) for boxes in held.values() for box in boxes) == PARAMETERS[name]
    assert all("norm" in key for key in replicated)


def test_the_tiling_check_finds_a_gap_and_an_overlap() -> None:
    for boxes in ([((0, 2), (0, 4))], [((0, 3), (0, 4)), ((2, 4), (0, 4))], [((0, 5), (0, 4))]):
        with pytest.raises(AssertionError):
            assert_tiles(boxes, (4, 4), 16)
    assert_tiles([((2, 4), (0, 4)), ((0, 2), (0, 1)), ((0, 2), (1, 4))], (4, 4), 16)


def test_megatron_builds_the_parameters_that_the_rules_name() -> None:
    cases = [
        (name, tp, pp, None, rank, tp > 1)
        for name, tp, pp in CASES
        if (tp, pp) in ((1, 1), (4, 4), (8, 4))
        for rank in sorted({0, tp * (pp // 2), tp * pp - 1})
    ]
    cases += [("Llama-3.1-70B", 8, 4, 2, rank, True) for rank in (0, 16, 31)]  # two pieces of every stage
    command = [sys.executable, "-m", "tests.models.fake_world", json.dumps(cases)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    for (name, tp, pp, vpp, rank, _), built in zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True):
        rules = stage_rules(architecture_of(PUBLISHED[name]), layout(tp, pp, vpp), rank // tp)
        wanted = [
            [rule.megatron, list(rule.local_shape(WeightRanks(tp))), rule.partition_dim is not None] for rule in rules
        ]
        assert sorted(built) == sorted(wanted), (name, tp, pp, vpp, rank)
        if tp == pp == 1:
            assert sum(torch.Size(shape).numel() for _, shape, _ in built) == PARAMETERS[name]
