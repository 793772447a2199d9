"""Draws from a teacher against a dense cumulative sum, and what they are drawn for: unbiased targets and gradients."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from fusemega.logits import _head, sampled
from fusemega.logits.sampled import count_draws, sample_ids, uniforms
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss
from tests.logits.loops import make_head

VOCAB, TOKENS = 141, 4


def exact_draws(p: list[float], uniforms: list[float]) -> list[int]:
    """For each u the first id at which the masses of the ids so far exceed u times the mass of all.

    In rational numbers: a sum of rounded probabilities may end below a u that is almost 1, on one machine or another.
    """
    cumulated = list(accumulate(map(Fraction, p)))
    return [bisect_right(cumulated, Fraction(u) * cumulated[-1]) for u in uniforms]


def test_the_oracle_when_probabilities_do_not_add_up_to_one() -> None:
    last = 1 - 2.0**-53
    assert sum([0.1] * 10) <= last  # so no sum of floats here would exceed the draw
    assert exact_draws([0.1] * 10, [0.0, 0.15, last]) == [0, 1, 9]
    assert exact_draws([0.5, 0.0, 0.5, 0.0], [0.5, last]) == [2, 2]


@pytest.mark.parametrize(("temperature", "softcap", "chunk"), [(1.0, None, None), (2.0, None, 3), (0.5, 2.0, 1)])
def test_equals_a_dense_cumulative_sum(
    temperature: float, softcap: float | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(sampled, "_CUMULATED_BYTES", 8 * 200 * 2)  # two tokens at once
    hidden_TH, weight_VH = make_head()
    with torch.no_grad():
        weight_VH[VOCAB:] = torch.nan
    uniforms_TS = torch.from_numpy(uniforms(7, b"key", TOKENS, 40))
    uniforms_TS[0, :2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    labels_T = torch.tensor([0, VOCAB - 1, 70, 0])
    ids_TS, label_logp_T = sample_ids(
        hidden_TH,
        weight_VH,
        uniforms_TS,
        labels_T,
        temperature=temperature,
        vocab_size=VOCAB,
        softcap=softcap,
        chunk_tokens=chunk,
    )
    logits_TV = (hidden_TH @ weight_VH[:VOCAB].t()).detach()
    logits_TV = logits_TV if softcap is None else softcap * (logits_TV / softcap).tanh()
    p_TV = (logits_TV / temperature).softmax(1)
    for t in range(TOKENS):
        assert ids_TS[t].tolist() == exact_draws(p_TV[t].tolist(), uniforms_TS[t].tolist())
    expected = logits_TV.log_softmax(1).gather(1, labels_T[:, None])[:, 0]
    torch.testing.assert_close(label_logp_T, expected, rtol=0, atol=1e-12)


def test_an_id_without_probability_is_never_drawn() -> None:
    hidden_TH, weight_VH = torch.ones(1, 1), torch.full((9, 1), -torch.inf)
    weight_VH[[2, 5]] = 1.0
    for u, wanted in ((0.0, 2), (0.4999, 2), (0.5, 5), (1 - 2.0**-53, 5)):
        ids_TS, _ = sample_ids(
            hidden_TH, weight_VH, torch.tensor([[u]], dtype=torch.float64), torch.tensor([2]), vocab_size=9
        )
        assert ids_TS.tolist() == [[wanted]]


def test_uniforms_are_of_seed_sample_and_place() -> None:
    found = uniforms(3, b"a key", 5, 4)
    assert found.shape == (5, 4) and found.dtype == np.float64 and (found >= 0).all() and (found < 1).all()
    assert np.array_equal(found, uniforms(3, b"a key", 5, 4))
    for seed, key in ((4, b"a key"), (3, b"another")):
        assert not np.isclose(found, uniforms(seed, key, 5, 4)).any()
    key = int.from_bytes(hashlib.blake2b(b"3:a key", digest_size=16).digest(), "little")
    np.testing.assert_array_equal(found.reshape(-1), np.random.Generator(np.random.Philox(key=key)).random(20))
    many = uniforms(0, b"", 100, 1000)
    assert abs(many.mean() - 0.5) < 5 / np.sqrt(12 * many.size)
    counts = np.bincount((many * 20).astype(int).reshape(-1), minlength=20)
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared of 19: mean 19, 1e-4 above 51


def test_count_draws() -> None:
    ids_PS, counts_PS = count_draws(np.array([[5, 3, 5, 9, 3, 5], [7, 7, 7, 7, 7, 7], [4, 3, 2, 1, 0, 6]]))
    assert ids_PS.tolist() == [[5, 3, 9, -1, -1, -1], [7, -1, -1, -1, -1, -1], [0, 1, 2, 3, 4, 6]]
    assert counts_PS.tolist() == [[3, 2, 1, 0, 0, 0], [6, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


def test_the_target_and_the_gradient_are_unbiased() -> None:
    """Over many teachings with other seeds, the mean lies within its own standard error of the dense teacher's."""
    trials, draws = 400, 10
    hidden_TH, weight_VH = make_head(seed=1)
    teacher_TH, teacher_VH = make_head(seed=2)
    labels_T = torch.zeros(TOKENS, dtype=torch.int64)
    p_TV = (teacher_TH @ teacher_VH[:VOCAB].t()).detach().softmax(1)

    def gradient(ids_TK: Tensor, p_TK: Tensor) -> Tensor:
        def loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            ce_C = -(p_TK[rows] * results[0].logp_TK).sum(1)
            return ce_C, ce_C[:, None]

        total, _ = fused_token_loss(hidden_TH, weight_VH, [Query(ids_TK)], loss, vocab_size=VOCAB)
        return torch.autograd.grad(total, hidden_TH)[0]

    dense = gradient(torch.arange(VOCAB).repeat(TOKENS, 1), p_TV)
    targets, gradients = [], []
    for trial in range(trials):
        uniforms_TS = torch.from_numpy(uniforms(trial, b"key", TOKENS, draws))
        drawn_TS, _ = sample_ids(teacher_TH, teacher_VH, uniforms_TS, labels_T, vocab_size=VOCAB)
        ids_TS, counts_TS = map(torch.from_numpy, count_draws(drawn_TS.numpy()))
        p_TS = counts_TS.double() / draws
        target_TV = torch.zeros(TOKENS, VOCAB + 1, dtype=torch.float64).scatter_add(
            1, ids_TS.long() % (VOCAB + 1), p_TS
        )
        targets.append(target_TV[:, :VOCAB])
        gradients.append(gradient(ids_TS.long(), p_TS))
    often_TV = p_TV * trials * draws > 20
    gaps = (torch.stack(targets).mean(0) - p_TV) / (p_TV * (1 - p_TV) / (trials * draws)).sqrt()
    slopes = torch.stack(gradients)
    for scores in (gaps[often_TV], (slopes.mean(0) - dense) / (slopes.std(0) / trials**0.5)):
        assert scores.abs().max() < 5 and 0.4 < float((scores**2).mean()) < 1.8
    assert (torch.stack(gradients).mean(0) - dense).norm() < 0.1 * dense.norm()


def test_bad_arguments() -> None:
    hidden_TH, weight_VH = make_head()
    good, labels_T = torch.zeros(TOKENS, 3, dtype=torch.float64), torch.zeros(TOKENS, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature"):
        sample_ids(hidden_TH, weight_VH, good, labels_T, temperature=0.0, vocab_size=VOCAB)
    for bad in (good.float(), good[:-1], good[0], good + 1, good - 1):
        with pytest.raises(ValueError, match="uniforms"):
            sample_ids(hidden_TH, weight_VH, bad, labels_T, vocab_size=VOCAB)
    ids_TS, label_logp_T = sample_ids(hidden_TH[:0], weight_VH, good[:0], labels_T[:0], vocab_size=VOCAB)
    assert ids_TS.shape == (0, 3) and label_logp_T.shape == (0,)
