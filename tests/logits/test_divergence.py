"""The chunked divergence on one rank, against whole logits and plain autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusemega.logits import _head
from fusemega.logits.divergence import DIVERGENCES, fused_divergence_loss
from tests.logits.dense_divergence import dense_logits, dense_sums
from tests.logits.loops import make_head
from tests.logits.test_vocab import LargestTensor

VOCAB = 141  # of the 150 rows that make_head gives: the others are padding
TOKENS = 5
WEIGHTS: dict[str, Any] = {"label_weight": 0.3, "divergence_weight": torch.tensor(1.7, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks in the small vocabulary of these tests, the last one short."""
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)


def inputs(tokens: int = TOKENS) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(student, which wants gradients; a teacher of another hidden size; labels)."""
    teacher = [tensor.detach() for tensor in make_head(tokens, hidden=3, seed=1)]
    return list(make_head(tokens)), teacher, torch.arange(3, 3 + tokens)


def grads(value: Tensor, student: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value * 3, student))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("temperature", "softcap", "teacher_softcap", "chunk_tokens"),
    [(1.0, None, None, None), (1.0, 2.0, None, 1), (2.5, None, 3.0, 2), (0.5, 2.0, 1.0, 3)],
)
def test_equals_whole_logits(
    name: str, temperature: float, softcap: float | None, teacher_softcap: float | None, chunk_tokens: int | None
) -> None:
    student, teacher, labels_T = inputs()
    options: dict[str, Any] = {"softcap": softcap, "teacher_softcap": teacher_softcap, "chunk_tokens": chunk_tokens}
    loss, sums_M = fused_divergence_loss(
        *student, *teacher, labels_T, name, temperature=temperature, vocab_size=VOCAB, **WEIGHTS, **options
    )
    own = dense_logits(student[0], student[1][:VOCAB], softcap)
    taught = dense_logits(teacher[0], teacher[1][:VOCAB], teacher_softcap)
    ce, divergence = dense_sums(own, taught, labels_T, name, temperature)
    oracle = 0.3 * ce + 1.7 * divergence
    torch.testing.assert_close(loss, oracle, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums_M, torch.stack([ce, divergence]).detach(), rtol=0, atol=1e-12)
    assert not sums_M.requires_grad
    torch.testing.assert_close(grads(loss, student), grads(oracle, student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_equal_finite_differences(name: str) -> None:
    student, teacher, labels_T = (
        list(make_head(3, 2, 70)),
        [x.detach() for x in make_head(3, 4, 70, 2)],
        torch.arange(3),
    )

    def value(*student: Tensor) -> Tensor:
        return fused_divergence_loss(
            *student, *teacher, labels_T, name, temperature=1.5, vocab_size=68, softcap=2.0, **WEIGHTS
        )[0]

    gradient = torch.autograd.grad(value(*student), student)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = [1e-6 * torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in student]
        up, down = ([x.detach() + sign * d for x, d in zip(student, step, strict=True)] for sign in (1, -1))
        slope = float(sum((g * d).sum() for g, d in zip(gradient, step, strict=True)))
        assert (value(*up) - value(*down)).item() / 2 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_learn_from_oneself(name: str, dtype: torch.dtype) -> None:
    student, _, labels_T = inputs()
    student = [tensor.detach().to(dtype).requires_grad_() for tensor in student]
    oneself = [tensor.detach().clone() for tensor in student]
    loss, _ = fused_divergence_loss(
        *student, *oneself, labels_T, name, temperature=2.0, vocab_size=VOCAB, label_weight=0.0, divergence_weight=1.0
    )
    tolerance = 50 * torch.finfo(dtype).eps
    assert abs(loss.item()) <= tolerance
    assert all(float(grad.abs().max()) <= tolerance for grad in grads(loss, student))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_of_hundreds(name: str) -> None:
    """Where p and q round to 0, as most of a vocabulary does; the oracle from log-probabilities."""
    student, teacher, labels_T = inputs()
    student = [(tensor.detach() * 12).requires_grad_() for tensor in student]
    teacher = [tensor * 12 for tensor in teacher]
    loss, sums_M = fused_divergence_loss(*student, *teacher, labels_T, name, vocab_size=VOCAB, **WEIGHTS)
    logq = dense_logits(student[0], student[1][:VOCAB]).log_softmax(1)
    logp = dense_logits(teacher[0], teacher[1][:VOCAB]).log_softmax(1)
    assert logq.min() < -700 and logp.min() < -700
    logm = torch.logsumexp(torch.stack([logp, logq]), 0) - torch.tensor(2.0).log()
    divergence = {
        "forward_kl": (logp.exp() * (logp - logq)).sum(),
        "reverse_kl": (logq.exp() * (logq - logp)).sum(),
        "jsd": (logp.exp() * (logp - logm)).sum() / 2 + (logq.exp() * (logq - logm)).sum() / 2,
    }[name]
    oracle = -0.3 * logq[torch.arange(TOKENS), labels_T].sum() + 1.7 * divergence
    torch.testing.assert_close(loss, oracle, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads(loss, student), grads(oracle, student), rtol=1e-6, atol=1e-6)


def test_padding_rows_count_nothing() -> None:
    student, teacher, labels_T = inputs()
    with torch.no_grad():
        student[1][VOCAB:] = torch.nan
        teacher[1][VOCAB:] = torch.nan
    for name in DIVERGENCES:
        loss, _ = fused_divergence_loss(*student, *teacher, labels_T, name, vocab_size=VOCAB, **WEIGHTS)
        d_hidden, d_weight = grads(loss, student)
        assert d_hidden.isfinite().all() and d_weight.isfinite().all()
        assert (d_weight[VOCAB:] == 0).all() and (d_weight[:VOCAB] != 0).any()


def test_no_tokens() -> None:
    student, teacher, labels_T = inputs(tokens=0)
    loss, sums_M = fused_divergence_loss(*student, *teacher, labels_T, "jsd", vocab_size=VOCAB, **WEIGHTS)
    assert loss.item() == 0 and sums_M.tolist() == [0.0, 0.0]
    d_hidden, d_weight = grads(loss, student)
    assert d_hidden.shape == student[0].shape and d_weight.shape == student[1].shape and (d_weight == 0).all()


def test_without_gradients_the_same_values_and_backward_once() -> None:
    student, teacher, labels_T = inputs()
    loss, sums_M = fused_divergence_loss(*student, *teacher, labels_T, "jsd", vocab_size=VOCAB, **WEIGHTS)
    with torch.no_grad():
        value, value_sums_M = fused_divergence_loss(*student, *teacher, labels_T, "jsd", vocab_size=VOCAB, **WEIGHTS)
    assert not value.requires_grad and torch.equal(value, loss.detach()) and torch.equal(value_sums_M, sums_M)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bf16_is_as_good_as_its_inputs(name: str) -> None:
    """fp32 arithmetic on bf16 inputs; gradients are summed in fp32 and rounded once. The teacher's dtype is its own."""
    student, teacher, labels_T = inputs()
    student = [tensor.detach().bfloat16().requires_grad_() for tensor in student]
    teacher = [tensor.float() for tensor in teacher]
    loss, _ = fused_divergence_loss(*student, *teacher, labels_T, name, vocab_size=VOCAB, chunk_tokens=2, **WEIGHTS)
    exact = [tensor.detach().double().requires_grad_() for tensor in student]
    taught = dense_logits(teacher[0].double(), teacher[1][:VOCAB].double())
    ce, divergence = dense_sums(dense_logits(exact[0], exact[1][:VOCAB]), taught, labels_T, name, 1.0)
    oracle = 0.3 * ce + 1.7 * divergence
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-6, atol=0)
    for grad, wanted in zip(grads(loss, student), grads(oracle, exact), strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), wanted, rtol=2**-8, atol=1e-5)


def test_logits_exist_one_chunk_at_a_time() -> None:
    student, teacher, labels_T = inputs(tokens=128)
    with LargestTensor() as seen:
        loss, _ = fused_divergence_loss(
            *student, *teacher, labels_T, "jsd", vocab_size=VOCAB + 9, chunk_tokens=32, **WEIGHTS
        )
        grads(loss, student)
    assert seen.numel == 32 * (VOCAB + 9)


def test_both_models_share_the_default_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", 2 * 70 * 150 * 8)
    student, teacher, labels_T = inputs(tokens=100)
    with LargestTensor() as seen:
        fused_divergence_loss(*student, *teacher, labels_T, "jsd", vocab_size=150, **WEIGHTS)
    assert seen.numel == 64 * 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"labels": torch.full((TOKENS,), VOCAB)}, "ids from 141"),
        ({"teacher": [torch.zeros(4, 3), torch.zeros(150, 3)]}, "expected 5 tokens and 150 vocabulary rows"),
        ({"teacher": [torch.zeros(5, 3), torch.zeros(149, 3)]}, "expected 5 tokens and 150 vocabulary rows"),
        ({"teacher": [torch.zeros(5, 3), torch.zeros(150, 4)]}, "expected .T, H., .V, H."),
        ({"teacher": [torch.zeros(5, 3), torch.zeros(150, 3).bfloat16()]}, "one floating dtype"),
    ],
)
def test_misuse_is_refused(change: dict[str, Any], message: str) -> None:
    student, teacher, labels_T = inputs()
    teacher, labels_T = change.pop("teacher", teacher), change.pop("labels", labels_T)
    with pytest.raises(ValueError, match=message):
        fused_divergence_loss(*student, *teacher, labels_T, "jsd", vocab_size=VOCAB, **WEIGHTS, **change)
