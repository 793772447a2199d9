"""Fused targets against plain loops over dictionaries, in float64; each setting; what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusemega.errors import UserError
from fusemega.fusion.functions import FUNCTIONS, rewards
from fusemega.fusion.targets import Targets, mixture, renormalised
from fusemega.losses.fuse import Fuse
from fusemega.losses.registry import build_objective, parse_objective
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample

VOCAB, P, OTHER = 40, 7, "other ids"
TOKENIZER: Any = SimpleNamespace(content_hash="tok", template_hash=None, eos_id=None)


def random_targets(k: int, seed: int, without: tuple[int, ...] = ()) -> Targets:
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(VOCAB)[:k] for _ in range(P)]).astype(np.int64)
    p = generator.dirichlet(np.ones(k + 1), size=P)
    p = np.concatenate([-np.sort(-p[:, :k], axis=1), p[:, k:]], axis=1)
    mask = np.isin(np.arange(P), without, invert=True)
    return Targets(ids, np.log(p[:, :k]).astype(np.float32), np.log(p[:, k]).astype(np.float32), mask)


def as_dicts(targets: Targets) -> list[dict[Any, float] | None]:
    """Each position's distribution, id -> probability, and that of the rest; None where there is nothing."""
    dicts: list[dict[Any, float] | None] = []
    for p in range(len(targets.mask_P)):
        if not targets.mask_P[p]:
            dicts.append(None)
            continue
        row: dict[Any, float] = {OTHER: math.exp(targets.log_residual_P[p])}
        for token, logp in zip(targets.ids_PK[p].tolist(), targets.logp_PK[p].tolist(), strict=True):
            if token >= 0:
                assert token not in row
                row[token] = math.exp(logp)
        dicts.append(row)
    return dicts


def mixed_by_hand(parts: list[Targets], weights: np.ndarray) -> list[dict[Any, float] | None]:
    rows: list[dict[Any, float] | None] = []
    for p in range(P):
        here = [(as_dicts(part)[p], weights[j][p]) for j, part in enumerate(parts)]
        total = sum(weight for row, weight in here if row is not None)
        if total == 0:
            rows.append(None)
            continue
        mixed: dict[Any, float] = {OTHER: 0.0}
        for row, weight in here:
            for token, probability in (row or {}).items():
                mixed[token] = mixed.get(token, 0.0) + weight / total * probability
        rows.append(mixed)
    return rows


def assert_same(got: Targets, wanted: list[dict[Any, float] | None]) -> None:
    for p, (mine, row) in enumerate(zip(as_dicts(got), wanted, strict=True)):
        assert (mine is None) == (row is None), p
        for token in (mine or {}).keys() | (row or {}).keys():
            assert (mine or {}).get(token, 0.0) == pytest.approx((row or {}).get(token, 0.0), abs=1e-6), (p, token)
    listed = np.where(got.ids_PK >= 0, got.logp_PK, -1e9)
    assert (np.diff(listed, axis=1) <= 0).all(), "not by falling probability, then the empty places"


def test_mixtures_equal_plain_sums() -> None:
    parts = [random_targets(5, 1), random_targets(3, 2, without=(0, 4)), random_targets(4, 3, without=(4,))]
    weights = np.random.default_rng(4).random((3, P))
    weights[0, 2] = 0.0
    weights[:, 6] = 0.0
    weights[1, 0] = 5.0  # of a teacher that has nothing there
    parts[0].mask_P[4] = False  # nobody has anything at 4
    assert_same(mixture(parts, weights), mixed_by_hand(parts, weights))


def test_renormalising_drops_the_residual() -> None:
    targets = random_targets(4, 5, without=(3,))
    targets.ids_PK[1], targets.logp_PK[1] = -1, -np.inf  # a row that lists nothing teaches nothing
    got = renormalised(targets)
    assert got.mask_P.tolist() == [True, False, True, False, True, True, True]
    assert np.isneginf(got.log_residual_P).all()
    for p in np.flatnonzero(got.mask_P):
        row = np.exp(targets.logp_PK[p].astype(np.float64))
        np.testing.assert_allclose(np.exp(got.logp_PK[p]), row / row.sum(), rtol=1e-6)


def test_functions_equal_their_formulas() -> None:
    parts = [random_targets(5, 1), random_targets(5, 2, without=(2,)), random_targets(5, 3)]
    labels = np.array([int(parts[j].ids_PK[p, 1]) for p, j in enumerate((0, 1, 1, 2, 2, 0, 1))])
    labels[3] = next(i for i in range(VOCAB) if all(i not in part.ids_PK[3] for part in parts))
    ce = np.array([2.0, 1.2, 1.9])
    assert FUNCTIONS["min_ce"](parts, rewards(ce, False), labels) is parts[1]
    exponents = [math.exp(math.exp(-c)) for c in ce]
    weights = np.array([[e / sum(exponents)] * P for e in exponents])
    assert_same(FUNCTIONS["avg_ce"](parts, rewards(ce, False), labels), mixed_by_hand(parts, weights))
    weights = np.array([[(as_dicts(part)[p] or {}).get(labels[p], 0.0) for p in range(P)] for part in parts])
    weights[:, weights.sum(0) == 0] = 1.0
    assert_same(FUNCTIONS["blend"](parts, rewards(ce, False), labels), mixed_by_hand(parts, weights))


def test_bf16_rewards_cannot_tell_near_ties_apart() -> None:
    ce = np.array([1.001, 1.000])
    parts = [random_targets(5, 1), random_targets(5, 2)]
    labels = np.zeros(P, dtype=np.int64)
    assert FUNCTIONS["min_ce"](parts, rewards(ce, False), labels) is parts[1]
    assert FUNCTIONS["min_ce"](parts, rewards(ce, True), labels) is parts[0]
    by_torch = torch.exp(-torch.tensor(ce).to(torch.bfloat16))
    assert rewards(ce, True).tolist() == by_torch.tolist()


SAMPLE = Sample(
    key=bytes(range(16)),
    ids=np.arange(P + 1, dtype=np.int32),
    supervised=np.array([False] + [True] * P),
    end_bytes=np.arange(P + 1, dtype=np.int32),
    num_bytes=20,
    source="chat.jsonl:3",
)
MISSING = Sample(**(vars(SAMPLE) | {"key": bytes(16)}))


def write_store(folder: Path, targets: Targets, sum_logp: float, num_bytes: int, **changes: Any) -> str:
    k = targets.ids_PK.shape[1]
    manifest = {"weights": folder.name, "tokenizer": "tok", "template": None, "mask_policy": MASK_POLICY}
    manifest |= {"truncation": 16, "temperature": 1.0, "top_k": k, "vocab_size": VOCAB, **changes}
    row = Row(
        ids_hash=SAMPLE.ids_hash,
        end_bytes=SAMPLE.end_bytes[SAMPLE.positions],
        ids_PK=targets.ids_PK.astype(np.int32),
        logp_PK=targets.logp_PK,
        log_residual_P=targets.log_residual_P,
        sum_logp=sum_logp,
        num_bytes=num_bytes,
    )
    with StoreWriter(folder, Manifest(**manifest)) as writer:
        writer.add(SAMPLE.key, row)
    return str(folder)


def two_stores(folder: Path) -> list[dict[str, Any]]:
    """The first is better a token (more tokens count the same here, so by its sum), the second a byte."""
    first = write_store(folder / "a", random_targets(4, 1), sum_logp=-7.0, num_bytes=10)
    second = write_store(folder / "b", random_targets(6, 2), sum_logp=-8.0, num_bytes=20)
    return [{"store": first}, {"store": second}]


def fuse(section: dict[str, Any]) -> Fuse:
    objective = build_objective(parse_objective({"name": "fuse", **section}), TOKENIZER, VOCAB)
    assert isinstance(objective, Fuse)
    return objective


@pytest.mark.parametrize(("fusion", "chosen"), [({}, 1), ({"ce_per": "byte"}, 1), ({"ce_per": "token"}, 0)], ids=str)
def test_min_ce_takes_one_teacher_a_sample(fusion: dict[str, Any], chosen: int, tmp_path: Path) -> None:
    objective = fuse({"teachers": two_stores(tmp_path), "fusion": fusion})
    fields = objective.position_fields(SAMPLE)
    assert fields["teacher_ids"].shape == (P, 6)
    wanted = random_targets((4, 6)[chosen], chosen + 1)
    assert fields["teacher_ids"][:, : wanted.ids_PK.shape[1]].tolist() == wanted.ids_PK.tolist()
    assert (fields["teacher_ids"][:, wanted.ids_PK.shape[1] :] == -1).all()


def test_near_ties_are_decided_in_fp32(tmp_path: Path) -> None:
    stores = [
        {"store": write_store(tmp_path / "a", random_targets(4, 1), -7.001, 7)},
        {"store": write_store(tmp_path / "b", random_targets(4, 2), -7.0, 7)},
    ]
    for decide_in, seed in (("fp32", 2), ("bf16", 1)):
        fields = fuse({"teachers": stores, "fusion": {"decide_in": decide_in}}).position_fields(SAMPLE)
        assert fields["teacher_ids"].tolist() == random_targets(4, seed).ids_PK.tolist()


@pytest.mark.parametrize("function", ["avg_ce", "blend"])
@pytest.mark.parametrize("tail", ["residual", "renormalise"])
def test_mixtures_reach_the_batch(function: str, tail: str, tmp_path: Path) -> None:
    objective = fuse({"teachers": two_stores(tmp_path), "fusion": {"function": function}, "tail": tail})
    fields = objective.position_fields(SAMPLE)
    assert fields["teacher_ids"].shape == (P, 10) and fields["teacher_mask"].all()
    parts = [objective.teachers[j].targets(objective.teachers[j].store.get(SAMPLE.key), SAMPLE) for j in (0, 1)]
    ce = np.array([0.7, 0.4])
    wanted = FUNCTIONS[function](parts, rewards(ce, False), SAMPLE.ids[1:].astype(np.int64))
    np.testing.assert_array_equal(fields["teacher_ids"], wanted.ids_PK)
    np.testing.assert_array_equal(fields["teacher_logp"], wanted.logp_PK)
    mass = np.exp(fields["teacher_logp"]).sum(1) + np.exp(fields["teacher_log_residual"])
    np.testing.assert_allclose(mass, 1.0, atol=0.01)
    assert np.isneginf(fields["teacher_log_residual"]).all() == (tail == "renormalise")


def test_a_sample_that_some_teacher_never_saw(tmp_path: Path) -> None:
    stores = two_stores(tmp_path)
    with pytest.raises(UserError, match=r"chat.jsonl:3: no row in the store .*/a"):
        fuse({"teachers": stores}).position_fields(MISSING)
    nothing = fuse({"teachers": stores, "on_missing": "skip"}).position_fields(MISSING)
    assert not nothing["teacher_mask"].any() and nothing["teacher_ids"].shape == (P, 6)
    with StoreWriter(tmp_path / "b", fuse({"teachers": stores}).teachers[1].store.manifest) as writer:
        row = fuse({"teachers": stores}).teachers[1].store.get(SAMPLE.key)
        assert row is not None
        writer.add(MISSING.key, row)
    fields = fuse({"teachers": stores, "on_missing": "skip", "fusion": {"function": "avg_ce"}}).position_fields(MISSING)
    # As sets: near ties are stored as ties.
    assert np.array_equal(np.sort(fields["teacher_ids"][:, :6]), np.sort(random_targets(6, 2).ids_PK))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "objective.teachers: required"),
        ({"teachers": []}, "objective.teachers: .*at least 1"),
        ({"teachers": [{"store": "a"}, {"store": "a"}]}, "objective.teachers: .*the store a is given twice"),
        ({"teachers": [{"stores": "a"}]}, "objective.teachers.0.stores: unknown key .*'store'"),
        ({"teachers": [{"store": "a"}], "fusion": {"function": "min"}}, "fusion.function: .*min_ce"),
        ({"teachers": [{"store": "a"}], "fusion": {"function": "blend", "ce_per": "byte"}}, "ce_per has no effect"),
        ({"teachers": [{"store": "nowhere"}]}, "nowhere: not a sample store"),
    ],
)
def test_wrong_settings_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuse(section)
