"""A teacher's rows against a dense sort."""

from __future__ import annotations

import pytest
import torch

from fusemega.logits import _head
from fusemega.logits.topk import top_ids, top_k_log_probs
from fusemega.logits.vocab import Query
from tests.logits.loops import loops, make_head

VOCAB = 141


@pytest.mark.parametrize(
    ("k", "temperature", "softcap", "chunk"), [(1, 1.0, None, 1), (7, 2.0, None, 3), (7, 0.5, 2.0, None)]
)
def test_equals_a_dense_sort(
    k: int, temperature: float, softcap: float | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)
    hidden_TH, weight_VH = make_head()
    with torch.no_grad():
        weight_VH[VOCAB:] = torch.nan
    labels_T = torch.tensor([0, VOCAB - 1, 70, 0])
    ids_TK, logp_TK, log_residual_T, label_logp_T = top_k_log_probs(
        hidden_TH,
        weight_VH,
        k,
        labels_T,
        temperature=temperature,
        vocab_size=VOCAB,
        softcap=softcap,
        chunk_tokens=chunk,
    )
    logits_TV = (hidden_TH @ weight_VH[:VOCAB].t()).detach()
    for t in range(4):
        ranked = sorted(range(VOCAB), key=lambda v: -float(logits_TV[t, v]))
        assert ids_TK[t].tolist() == ranked[:k]
    labels = loops(hidden_TH, weight_VH[:VOCAB], Query(labels_T[:, None]), softcap).logp_TK[:, 0].detach()
    torch.testing.assert_close(label_logp_T, labels, rtol=0, atol=1e-12)
    oracle = loops(hidden_TH, weight_VH[:VOCAB], Query(ids_TK, temperature, True), softcap)
    torch.testing.assert_close(logp_TK, oracle.logp_TK.detach(), rtol=0, atol=1e-12)
    assert oracle.log_residual_T is not None and not logp_TK.requires_grad
    torch.testing.assert_close(log_residual_T, oracle.log_residual_T.detach(), rtol=0, atol=1e-12)


def test_ties_go_to_the_lowest_id() -> None:
    hidden_TH = torch.ones(2, 1)
    weight_VH = torch.zeros(VOCAB, 1)
    weight_VH[[100, 40, 7]] = 2.0
    weight_VH[90] = 3.0
    weight_VH[[5, 60]] = 1.0
    for k, wanted in ((2, [90, 7]), (3, [90, 7, 40]), (5, [90, 7, 40, 100, 5]), (8, [90, 7, 40, 100, 5, 60, 0, 1])):
        ids_TK, *_ = top_k_log_probs(hidden_TH, weight_VH, k, torch.tensor([0, 1]), vocab_size=VOCAB)
        assert ids_TK.tolist() == [wanted, wanted]


def test_the_whole_vocabulary() -> None:
    hidden_TH, weight_VH = make_head(rows=12)
    ids_TK, logp_TK, log_residual_T, _ = top_k_log_probs(hidden_TH, weight_VH, 12, torch.arange(4), vocab_size=12)
    assert ids_TK.sort(dim=1).values.tolist() == [list(range(12))] * 4
    torch.testing.assert_close(logp_TK.exp().sum(1), torch.ones(4, dtype=torch.float64))
    assert (log_residual_T == -torch.inf).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_most_probable_of_some_ids(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)
    hidden_TH, weight_VH = make_head()
    with torch.no_grad():
        weight_VH[VOCAB:] = torch.nan
    logits_TV = (hidden_TH @ weight_VH[:VOCAB].t()).detach()
    for allowed in (range(0, VOCAB, 2), [3, 140], []):
        excluded = torch.ones(VOCAB, dtype=torch.bool)
        excluded[list(allowed)] = False
        found = top_ids(hidden_TH, weight_VH, 5, excluded, vocab_size=VOCAB, softcap=softcap, chunk_tokens=3)
        for t in range(4):
            ranked = sorted(allowed, key=lambda v: -float(logits_TV[t, v]))[:5]
            assert found[t].tolist() == ranked + [-1] * (5 - len(ranked))


def test_no_tokens_and_bad_arguments() -> None:
    hidden_TH, weight_VH = make_head(tokens=0)
    none_T = torch.empty(0, dtype=torch.int64)
    ids_TK, logp_TK, *columns_T = top_k_log_probs(hidden_TH, weight_VH, 3, none_T, vocab_size=VOCAB)
    assert ids_TK.shape == logp_TK.shape == (0, 3) and [column_T.shape for column_T in columns_T] == [(0,), (0,)]
    for k in (0, VOCAB + 1):
        with pytest.raises(ValueError, match=f"k {k}"):
            top_k_log_probs(hidden_TH, weight_VH, k, none_T, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="temperature"):
        top_k_log_probs(hidden_TH, weight_VH, 3, none_T, temperature=0.0, vocab_size=VOCAB)
