"""Weight rules against oracles written the other way round: build the full Megatron matrix, then cut it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fusemega.files.boxes import slices
from fusemega.models.rules import (
    QKV,
    ColumnParallel,
    GateUp,
    Replicated,
    RowParallel,
    Rule,
    VocabRows,
    WeightRanks,
    padded_vocab_size,
)

HIDDEN = 6


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Each element of each tensor is a different number."""
    out, start = {}, 1
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        out[name] = np.arange(start, start + size).reshape(shape)
        start += size
    return out


def import_rank(rule: Rule, hf: dict[str, np.ndarray], tp_size: int, tp_rank: int) -> np.ndarray:
    local = np.zeros(rule.local_shape(WeightRanks(tp_size)), dtype=np.int64)
    for piece in rule.pieces(WeightRanks(tp_size, tp_rank)):
        local[slices(piece.local_box)] = hf[piece.hf][slices(piece.hf_box)]
    return local


def export_all(rule: Rule, locals_: list[np.ndarray]) -> dict[str, np.ndarray]:
    hf = {name: np.full(shape, -1) for name, shape in rule.hf_shapes().items()}
    for tp_rank, local in enumerate(locals_):
        for piece in rule.pieces(WeightRanks(len(locals_), tp_rank)):
            hf[piece.hf][slices(piece.hf_box)] = local[slices(piece.local_box)]
    return hf


def check(rule: Rule, tp_size: int, expected: list[np.ndarray], *, replicated: bool = False) -> None:
    """Import equals the oracle, export undoes it, and each HF element is on exactly one rank (or on all)."""
    hf = numbered(rule.hf_shapes())
    locals_ = [import_rank(rule, hf, tp_size, tp_rank) for tp_rank in range(tp_size)]
    for local, wanted in zip(locals_, expected, strict=True):
        np.testing.assert_array_equal(local, wanted)
    for name, value in export_all(rule, locals_).items():
        np.testing.assert_array_equal(value, hf[name])
    uses = {name: np.zeros(shape, dtype=int) for name, shape in rule.hf_shapes().items()}
    for tp_rank in range(tp_size):
        filled = np.zeros(rule.local_shape(WeightRanks(tp_size)), dtype=int)
        for piece in rule.pieces(WeightRanks(tp_size, tp_rank)):
            uses[piece.hf][slices(piece.hf_box)] += 1
            filled[slices(piece.local_box)] += 1
        assert filled.max() == 1  # no element of the parameter is written twice
    for count in uses.values():
        assert (count == (tp_size if replicated else 1)).all()


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "tp_size"),
    [
        (heads, groups, head_dim, tp_size)
        for heads, groups in itertools.product((4, 8, 9, 12), (1, 2, 3, 4, 8, 9))
        for head_dim, tp_size in itertools.product((2, 4), (1, 2, 3, 4, 8))
        if heads % groups == heads % tp_size == 0
        and (groups % tp_size == 0 or (tp_size % groups == 0 and 2 * groups * head_dim % tp_size == 0))
    ],
)
@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_qkv(heads: int, groups: int, head_dim: int, tp_size: int, columns: tuple[int, ...]) -> None:
    rule = QKV("qkv", "q", "k", "v", heads=heads, groups=groups, head_dim=head_dim, columns=columns)
    hf = numbered(rule.hf_shapes())
    q, k, v = (hf[name].reshape(-1, head_dim, *columns) for name in "qkv")
    rows: list[np.ndarray] = []
    for group in range(groups):  # Megatron's order, one head at a time
        rows += [q[head] for head in range(heads) if head // (heads // groups) == group]
        rows += [k[group], v[group]]
    check(rule, tp_size, np.split(np.concatenate(rows), tp_size))


@pytest.mark.parametrize(("heads", "groups", "tp_size"), [(8, 8, 4), (8, 2, 1), (8, 2, 2), (8, 2, 4), (12, 1, 3)])
def test_query_key_and_value_in_one_matrix(heads: int, groups: int, tp_size: int) -> None:
    """As Phi-3 has them: all queries, all keys, all values; the parameter is the same as of three matrices."""
    one, apart = (QKV("qkv", *names, heads, groups, 6, (HIDDEN,)) for names in (("o", "o", "o"), ("q", "k", "v")))
    whole = numbered(one.hf_shapes())["o"]
    q, k, v = np.split(whole, [heads * 6, (heads + groups) * 6])
    check(one, tp_size, [import_rank(apart, {"q": q, "k": k, "v": v}, tp_size, rank) for rank in range(tp_size)])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_gate_and_up_in_one_matrix(tp_size: int) -> None:
    rule = GateUp("fc1", "both", "both", (12, HIDDEN))
    gate, up = np.split(numbered(rule.hf_shapes())["both"], 2)
    check(rule, tp_size, [np.concatenate(p) for p in zip(np.split(gate, tp_size), np.split(up, tp_size), strict=True)])


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_columns_are_split_in_order(tp_size: int) -> None:
    rule = ColumnParallel("wqkv", "wqkv", (12, HIDDEN))
    check(rule, tp_size, np.split(numbered(rule.hf_shapes())["wqkv"], tp_size))


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 6])
def test_gate_up_halves_are_split_apart(tp_size: int) -> None:
    rule = GateUp("fc1", "gate", "up", (12, HIDDEN))
    hf = numbered(rule.hf_shapes())
    gates, ups = (np.split(hf[name], tp_size) for name in ("gate", "up"))
    check(rule, tp_size, [np.concatenate(pair) for pair in zip(gates, ups, strict=True)])


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_row_splits_columns(tp_size: int) -> None:
    rule = RowParallel("fc2", "down", (5, 12))
    check(rule, tp_size, np.split(numbered(rule.hf_shapes())["down"], tp_size, axis=1))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_same_is_on_every_rank(tp_size: int) -> None:
    rule = Replicated("norm", "norm", (7,))
    check(rule, tp_size, [numbered(rule.hf_shapes())["norm"]] * tp_size, replicated=True)


@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 8, 9, 31])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
def test_vocabulary_padding_is_zero_and_at_the_end(vocab: int, tp_size: int) -> None:
    rule = VocabRows("embedding", "embed", (vocab, HIDDEN))
    hf = numbered(rule.hf_shapes())["embed"]
    padded = np.zeros((padded_vocab_size(vocab, tp_size), HIDDEN), dtype=np.int64)
    padded[:vocab] = hf
    locals_ = np.split(padded, tp_size)
    for tp_rank in range(tp_size):
        np.testing.assert_array_equal(import_rank(rule, {"embed": hf}, tp_size, tp_rank), locals_[tp_rank])
    np.testing.assert_array_equal(export_all(rule, locals_)["embed"], hf)


@pytest.mark.parametrize(("vocab", "tp_size", "padded"), [(49152, 3, 49152), (259, 2, 260), (5, 4, 8), (7, 1, 7)])
def test_padded_size_is_the_next_multiple(vocab: int, tp_size: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tp_size) == padded
