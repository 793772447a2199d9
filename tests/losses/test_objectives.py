"""The objectives' formulas against plain loops, each setting, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusemega.errors import UserError
from fusemega.logits.vocab import Query
from fusemega.losses.distill import Distill
from fusemega.losses.registry import build_objective, objective_names, parse_objective
from fusemega.losses.sft import SFT
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch
from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample
from tests.logits.loops import loops, make_head, make_ids
from tests.passes.bare import bare_batch

VOCAB, K, N = 141, 6, 4
TOKENIZER: Any = SimpleNamespace(content_hash="tok", template_hash=None, eos_id=None)
HEAD: dict[str, Any] = {"group": None, "vocab_size": VOCAB}
MANIFEST = {
    "weights": "w",
    "tokenizer": "tok",
    "template": None,
    "mask_policy": MASK_POLICY,
    "truncation": 16,
    "temperature": 1.0,
    "top_k": K,
    "vocab_size": VOCAB,
}


def sample_of(length: int = 8, supervised: int = N) -> Sample:
    mask = np.zeros(length, dtype=bool)
    mask[-supervised:] = True
    return Sample(
        key=bytes(range(16)),
        ids=np.arange(length, dtype=np.int32),
        supervised=mask,
        end_bytes=np.arange(length, dtype=np.int32),
        num_bytes=9,
        source="chat.jsonl:3",
    )


def row_of(sample: Sample, **changes: Any) -> Row:
    """A teacher's row for the sample: random ids without repetition, and 30% of the mass elsewhere."""
    generator = np.random.default_rng(5)
    positions = len(sample.positions)
    ids = np.stack([generator.permutation(VOCAB)[:K] for _ in range(positions)]).astype(np.int32)
    p = generator.dirichlet(np.ones(K), size=positions) * 0.7
    fields: dict[str, Any] = {
        "ids_hash": sample.ids_hash,
        "end_bytes": sample.end_bytes[sample.positions],
        "ids_PK": ids,
        "logp_PK": np.log(p),
        "log_residual_P": np.full(positions, math.log(0.3)),
        "sum_logp": -5.0,
        "num_bytes": 9,
    }
    return Row(**(fields | changes))


def store_of(folder: Path, sample: Sample, row: Row, **changes: Any) -> Store:
    with StoreWriter(folder, Manifest(**(MANIFEST | changes))) as writer:
        writer.add(sample.key, row)
    return Store.open(folder)


def distill(folder: Path, store_changes: dict[str, Any] | None = None, **settings: Any) -> Distill:
    sample = sample_of()
    store = store_of(folder / "store", sample, row_of(sample), **(store_changes or {}))
    return built({"name": "distill", "store": str(store.path), **settings}, VOCAB)


def built(section: dict[str, Any], vocab_size: int) -> Distill:
    objective = build_objective(parse_objective(section), TOKENIZER, vocab_size)
    assert isinstance(objective, Distill)
    return objective


def batch_of(objective: Distill, without_row: tuple[int, ...] = ()) -> MicroBatch:
    arrays = objective.position_fields(sample_of())
    fields = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    for n in without_row:
        fields["teacher_mask"][n] = False
        fields["teacher_ids"][n] = -1
        fields["teacher_logp"][n] = 0.0
        fields["teacher_log_residual"][n] = 0.0
    return bare_batch(make_ids(tokens=N, listed=1, seed=4)[:, 0].clamp(min=0), fields)


def loss_of(
    objective: Any, hidden: Tensor, weight: Tensor, batch: MicroBatch, denominators: Any, head: Any = HEAD
) -> tuple[Tensor, dict[str, Tensor]]:
    found: tuple[Tensor, dict[str, Tensor]] = objective.loss(HiddenStates(hidden, weight, head), batch, denominators)
    return found


def by_hand(objective: Distill, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sum of CE, sum of KD) from the formulas, position by position."""
    s, store = objective.settings, objective.store.store
    row = store.get(sample_of().key)
    assert row is not None
    label = loops(hidden, weight[:VOCAB], Query(batch.labels[:, None]))
    taught = loops(hidden, weight[:VOCAB], Query(batch.position_fields["teacher_ids"], s.temperature, True))
    assert taught.log_residual_T is not None
    ce = kd = torch.zeros((), dtype=torch.float64)
    rows = 0
    for n in range(N):
        ce = ce - label.logp_TK[n, 0]
        if not batch.position_fields["teacher_mask"][n]:
            continue
        rows += 1
        stored = [float(x) for x in row.logp_PK[n]]
        if s.tail == "residual":
            p = [math.exp(x) for x in stored]
            kd = kd - math.exp(float(row.log_residual_P[n])) * taught.log_residual_T[n]
        else:
            raw = [math.exp(x * store.manifest.temperature / s.temperature) for x in stored]
            p = [math.exp(np.float32(math.log(x / sum(raw)))) for x in raw]  # the batch's log-probs are fp32
        for k in range(K):
            kd = kd - p[k] * taught.logp_TK[n, k]
    loss = s.lambda_ * ce / N + (1 - s.lambda_) * s.temperature**2 * kd / max(rows, 1)
    return loss, ce.detach(), kd.detach()


DISTILL_CASES: list[dict[str, Any]] = [
    {},
    {"lambda": 0.3},
    {"lambda": 0.0},
    {"lambda": 0.3, "temperature": 2.0, "store_temperature": 2.0},
    {"lambda": 0.3, "tail": "renormalise"},
    {"lambda": 0.3, "tail": "renormalise", "temperature": 2.0},
    {"lambda": 0.3, "tail": "renormalise", "temperature": 2.0, "store_temperature": 4.0},
]


@pytest.mark.parametrize("case", DISTILL_CASES, ids=str)
@pytest.mark.parametrize("without_row", [(), (0, 2), (0, 1, 2, 3)], ids=str)
def test_distill_equals_the_formula(case: dict[str, Any], without_row: tuple[int, ...], tmp_path: Path) -> None:
    settings = dict(case)
    objective = distill(tmp_path, {"temperature": settings.pop("store_temperature", 1.0)}, **settings)
    batch = batch_of(objective, without_row)
    hidden, weight = make_head()
    counts = objective.counts(batch)
    assert counts == {"lm": N, "distill": N - len(without_row)}
    denominators = {name: torch.tensor(max(count, 1), dtype=torch.float64) for name, count in counts.items()}
    loss, sums = loss_of(objective, hidden, weight, batch, denominators, HEAD | {"chunk_tokens": 3})
    wanted, ce, kd = by_hand(objective, batch, hidden, weight)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums["lm"], ce, rtol=0, atol=1e-11)
    torch.testing.assert_close(sums["distill"], kd, rtol=0, atol=1e-11)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (hidden, weight)), rtol=0, atol=1e-11)


def test_global_denominators_make_micro_batches_add_up(tmp_path: Path) -> None:
    objective = distill(tmp_path, lambda_=0.4)
    batch = batch_of(objective, without_row=(1,))
    hidden, weight = make_head()
    denominators = {"lm": torch.tensor(float(N)), "distill": torch.tensor(3.0)}
    whole, _ = loss_of(objective, hidden, weight, batch, denominators)
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 4)):
        part = bare_batch(batch.labels[rows], {name: values[rows] for name, values in batch.position_fields.items()})
        parts = parts + loss_of(objective, hidden[rows], weight, part, denominators)[0]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    got = torch.autograd.grad(parts, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(whole, (hidden, weight)), rtol=0, atol=1e-12)


def test_every_id_listed_with_residual(tmp_path: Path) -> None:
    """k = vocabulary: teacher's and student's residuals are both probability 0, and neither makes a nan."""
    objective = distill(tmp_path, lambda_=0.0, tail="residual")
    batch = batch_of(objective)
    changed = {"teacher_ids": torch.arange(K).repeat(N, 1), "teacher_log_residual": torch.full((N,), -torch.inf)}
    batch = bare_batch(batch.labels % K, {**batch.position_fields, **changed})
    hidden, weight = make_head(rows=K)
    loss, _ = loss_of(objective, hidden, weight, batch, {"lm": N, "distill": N}, {"group": None, "vocab_size": K})
    logp = (hidden @ weight.t()).log_softmax(1)
    wanted = -(batch.position_fields["teacher_logp"].double().exp() * logp).sum() / N
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (hidden, weight)), rtol=0, atol=1e-11)


def test_sft_is_mean_cross_entropy() -> None:
    objective = build_objective(parse_objective({"name": "sft"}), SimpleNamespace(), VOCAB)  # type: ignore[arg-type]
    assert isinstance(objective, SFT) and objective.position_fields(sample_of()) == {}
    hidden, weight = make_head()
    batch = bare_batch(torch.tensor([3, 140, 0, 7]))
    assert objective.counts(batch) == {"lm": 4}
    loss, sums = loss_of(objective, hidden, weight, batch, {"lm": torch.tensor(10.0)})
    wanted = -loops(hidden, weight[:VOCAB], Query(batch.labels[:, None])).logp_TK.sum()
    torch.testing.assert_close(loss, wanted / 10, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums["lm"], wanted.detach(), rtol=0, atol=1e-12)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(wanted / 10, (hidden, weight)), rtol=0, atol=1e-12)


def test_sample_fields_are_the_stored_row(tmp_path: Path) -> None:
    objective = distill(tmp_path)
    sample, row = sample_of(), row_of(sample_of())
    fields = objective.position_fields(sample)
    assert fields["teacher_ids"].dtype == np.int64 and fields["teacher_ids"].tolist() == row.ids_PK.tolist()
    assert fields["teacher_logp"].dtype == np.float32 and fields["teacher_mask"].all()
    np.testing.assert_allclose(fields["teacher_logp"], row.logp_PK, atol=0.1)  # coded: see tests/store/test_coding
    np.testing.assert_allclose(fields["teacher_log_residual"], row.log_residual_P, atol=0.1)


def test_a_missing_row(tmp_path: Path) -> None:
    other = Sample(**(vars(sample_of()) | {"key": bytes(16)}))
    with pytest.raises(UserError, match=r"chat.jsonl:3: no row in the store .*on_missing: skip"):
        distill(tmp_path / "a").position_fields(other)
    fields = distill(tmp_path / "b", on_missing="skip").position_fields(other)
    assert not fields["teacher_mask"].any() and (fields["teacher_ids"] == -1).all()
    present = distill(tmp_path / "c").position_fields(sample_of())
    assert {n: (a.shape, a.dtype) for n, a in fields.items()} == {n: (a.shape, a.dtype) for n, a in present.items()}


def test_a_row_that_does_not_fit_the_sample(tmp_path: Path) -> None:
    sample = sample_of()
    store = store_of(tmp_path / "ids", sample, row_of(sample, ids_hash=b"12345678"))
    with pytest.raises(UserError, match="chat.jsonl:3: .*other token ids"):
        built({"name": "distill", "store": str(store.path)}, VOCAB).position_fields(sample)
    store = store_of(tmp_path / "mask", sample, row_of(sample_of(supervised=3), ids_hash=sample.ids_hash))
    with pytest.raises(UserError, match="has 3 positions, the sample 4"):
        built({"name": "distill", "store": str(store.path)}, VOCAB).position_fields(sample)
    store = store_of(tmp_path / "vocabulary", sample, row_of(sample))
    largest = int(row_of(sample).ids_PK.max())
    fields = built({"name": "distill", "store": str(store.path)}, largest + 1).position_fields(sample)
    assert fields["teacher_ids"].max() == largest
    with pytest.raises(UserError, match=f"chat.jsonl:3: .*lists id {largest}, .*a vocabulary of {largest}"):
        built({"name": "distill", "store": str(store.path)}, largest).position_fields(sample)


def test_residual_at_another_temperature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective.temperature: found 2.0, .* was stored at 1.0"):
        distill(tmp_path, tail="residual", temperature=2.0)


def sampled_store(folder: Path, temperature: float) -> Store:
    """Of 4 draws a position: one id thrice and another once, or one id four times."""
    sample = sample_of()
    ids = np.full((N, 4), -1, dtype=np.int32)
    logp = np.full((N, 4), -np.inf)
    for n in range(N):
        drawn = [[7, 3, 100, 140][n], 50]
        ids[n, : 1 + n % 2], logp[n, : 1 + n % 2] = drawn[: 1 + n % 2], np.log([[1.0], [0.75, 0.25]][n % 2])
    row = row_of(sample, ids_PK=ids, logp_PK=logp, log_residual_P=np.full(N, -np.inf))
    kind = {"rows": "sampled", "top_k": None, "num_samples": 4, "seed": 0, "temperature": temperature}
    return store_of(folder, sample, row, **kind)


def test_draws_are_the_target_as_they_are(tmp_path: Path) -> None:
    store = sampled_store(tmp_path, 2.0)
    objective = built({"name": "distill", "store": str(store.path), "lambda": 0.0, "temperature": 2.0}, VOCAB)
    hidden, weight = make_head()
    loss, _ = loss_of(objective, hidden, weight, batch_of(objective), {"lm": N, "distill": N})
    logq = (hidden @ weight[:VOCAB].t() / 2.0).log_softmax(1)
    wanted = -(logq[0, 7] + 0.75 * logq[1, 3] + 0.25 * logq[1, 50] + logq[2, 100])
    wanted = wanted - 0.75 * logq[3, 140] - 0.25 * logq[3, 50]
    torch.testing.assert_close(loss, 4.0 * wanted / N, rtol=0, atol=1e-6)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(4.0 * wanted / N, (hidden, weight)), rtol=0, atol=1e-6)


def test_settings_that_could_not_act_on_draws_are_refused(tmp_path: Path) -> None:
    section = {"name": "distill", "store": str(sampled_store(tmp_path, 2.0).path)}
    for tail in ("renormalise", "residual"):
        with pytest.raises(UserError, match="objective.tail: no effect"):
            built({**section, "temperature": 2.0, "tail": tail}, VOCAB)
    with pytest.raises(UserError, match=r"objective.temperature: found 1.0, .* was stored at 2.0; its rows are draws"):
        built(section, VOCAB)


def test_build_checks_tokenizer_and_template(tmp_path: Path) -> None:
    store = distill(tmp_path).store.store
    settings = parse_objective({"name": "distill", "store": str(store.path), "lambda": 0.25})

    def tokenizer(content_hash: str, template_hash: str | None) -> Any:
        return SimpleNamespace(content_hash=content_hash, template_hash=template_hash, eos_id=None)

    objective = build_objective(settings, tokenizer("tok", None), VOCAB)
    assert isinstance(objective, Distill) and objective.settings.lambda_ == 0.25
    with pytest.raises(UserError, match="tokenizer is 'tok', expected 'other'"):
        build_objective(settings, tokenizer("other", None), VOCAB)
    with pytest.raises(UserError, match="template is None, expected 'chatml'"):
        build_objective(settings, tokenizer("tok", "chatml"), VOCAB)
    with pytest.raises(UserError, match="nowhere: not a sample store"):
        build_objective(
            parse_objective({"name": "distill", "store": str(tmp_path / "nowhere")}), tokenizer("tok", None), VOCAB
        )
    with pytest.raises(UserError, match="mask_policy is 'everything', expected"):
        distill(tmp_path / "b", {"mask_policy": "everything"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "objective.name: required"),
        ({"name": "distil"}, "did you mean 'distill'"),
        ({"name": "distill"}, "objective.store: required"),
        ({"name": "distill", "store": "s", "lambda": 1.5}, "objective.lambda: Input should be less than or equal to 1"),
        ({"name": "distill", "store": "s", "temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"name": "distill", "store": "s", "tail": "residul"}, "did you mean 'residual'"),
        ({"name": "distill", "store": "s", "on_missing": "ignore"}, "allowed: error, skip"),
        ({"name": "distill", "store": "s", "temprature": 1.0}, "did you mean 'temperature'"),
        ({"name": "sft", "lambda": 1.0}, "lambda: unknown key"),
    ],
)
def test_wrong_sections_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_objective(section)


def test_names() -> None:
    assert {"sft", "distill"} <= set(objective_names())
