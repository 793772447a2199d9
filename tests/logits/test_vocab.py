"""The kernel on one rank, against plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusemega.logits import _head
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss, sparse_log_probs
from tests.logits.loops import loops, make_head, make_ids

VOCAB = 141  # of the 150 rows that make_head gives: the others are padding


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows: three in the small vocabulary of these tests, the last one short; three panels a block."""
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)
    monkeypatch.setitem(_head.PANEL_COLUMNS, "cpu", 24)


def functional(result: SparseLogProbs, rows: slice = slice(None)) -> Tensor:
    """A loss of each token that depends on everything in `result`, [C]."""
    count = 4
    weight_TK = torch.linspace(-1, 2, count * result.logp_TK.shape[1], dtype=torch.float64).reshape(count, -1)[rows]
    loss_T = (weight_TK * result.logp_TK).sum(1) + 0.3 * result.lse_T.square()
    if result.log_residual_T is not None:
        loss_T = loss_T + 0.7 * result.log_residual_T.square()
    return loss_T


def both(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
    loss_T = functional(results[0], rows) + results[1].logp_TK[:, 0].square()
    return loss_T, torch.stack([results[1].logp_TK[:, 0], results[0].lse_T], dim=1)


CASES = pytest.mark.parametrize(
    ("temperature", "residual", "softcap", "chunk_tokens"),
    [(1.0, False, None, None), (1.0, True, None, 3), (2.5, True, None, 1), (0.5, True, 2.0, 2), (1.0, False, 3.0, 4)],
)


@CASES
def test_sparse_log_probs_equal_loops(
    temperature: float, residual: bool, softcap: float | None, chunk_tokens: int | None
) -> None:
    hidden_TH, weight_VH = make_head()
    query = Query(make_ids(), temperature, residual)
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB, softcap=softcap, chunk_tokens=chunk_tokens)
    oracle = loops(hidden_TH, weight_VH[:VOCAB], query, softcap)
    torch.testing.assert_close(result.logp_TK, oracle.logp_TK, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.lse_T, oracle.lse_T, rtol=0, atol=1e-12)
    assert (result.log_residual_T is not None) == residual
    if residual:
        torch.testing.assert_close(result.log_residual_T, oracle.log_residual_T, rtol=0, atol=1e-12)
    assert (result.logp_TK[1, 2:4] == 0).all(), "padding reads 0"
    got = torch.autograd.grad(functional(result).sum() * 3, (hidden_TH, weight_VH))
    wanted = torch.autograd.grad(functional(oracle).sum() * 3, (hidden_TH, weight_VH))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@CASES
def test_fused_token_loss_equals_loops(
    temperature: float, residual: bool, softcap: float | None, chunk_tokens: int | None
) -> None:
    hidden_TH, weight_VH = make_head()
    queries = [Query(make_ids(), temperature, residual), Query(make_ids(listed=1, seed=3))]
    loss, aux_M = fused_token_loss(
        hidden_TH, weight_VH, queries, both, vocab_size=VOCAB, softcap=softcap, chunk_tokens=chunk_tokens
    )
    oracle_T, oracle_aux_TM = both(
        [loops(hidden_TH, weight_VH[:VOCAB], query, softcap) for query in queries], slice(None)
    )
    torch.testing.assert_close(loss, oracle_T.sum(), rtol=0, atol=1e-11)
    torch.testing.assert_close(aux_M, oracle_aux_TM.detach().sum(0), rtol=0, atol=1e-11)
    assert not aux_M.requires_grad
    got = torch.autograd.grad(loss * 3, (hidden_TH, weight_VH))
    wanted = torch.autograd.grad(oracle_T.sum() * 3, (hidden_TH, weight_VH))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_gradients_equal_finite_differences() -> None:
    hidden_TH, weight_VH = make_head(tokens=3, hidden=2, rows=70)
    query = Query(make_ids(tokens=3, listed=4, vocab_size=68), 1.5, residual=True)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        result = sparse_log_probs(hidden, weight, query, vocab_size=68, softcap=2.0, chunk_tokens=2)
        assert result.log_residual_T is not None
        return result.logp_TK, result.lse_T, result.log_residual_T

    assert torch.autograd.gradcheck(outputs, (hidden_TH, weight_VH))


def test_two_queries_at_one_temperature_and_two_residuals() -> None:
    hidden_TH, weight_VH = make_head()
    queries = [Query(make_ids(), 2.0, True), Query(make_ids(seed=8), 2.0, True), Query(make_ids(seed=9), 2.0)]

    def f(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        return sum(functional(result, rows) for result in results), results[0].logp_TK[:, :0]  # type: ignore[return-value]

    loss, _ = fused_token_loss(hidden_TH, weight_VH, queries, f, vocab_size=VOCAB, chunk_tokens=3)
    oracle = f([loops(hidden_TH, weight_VH[:VOCAB], query) for query in queries], slice(None))[0].sum()
    got = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    torch.testing.assert_close(got, torch.autograd.grad(oracle, (hidden_TH, weight_VH)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_of_1e_minus_12(dtype: torch.dtype) -> None:
    """Summed over the ids not listed: 1 - sum would read 0 in fp32, and has four digits in float64."""
    hidden_TH = torch.ones(1, 1, dtype=dtype)
    weight_VH = torch.zeros(150, 1, dtype=dtype)
    ids_TK = torch.tensor([[3, 77]])
    weight_VH[ids_TK[0]] = 32.5
    result = sparse_log_probs(hidden_TH, weight_VH, Query(ids_TK, residual=True), vocab_size=150)
    oracle = loops(hidden_TH.double(), weight_VH.double(), Query(ids_TK, residual=True))
    assert result.log_residual_T is not None and oracle.log_residual_T is not None
    assert float(oracle.log_residual_T.exp()) < 1e-12
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.log_residual_T.double(), oracle.log_residual_T, rtol=tolerance, atol=0)
    if dtype == torch.float32:
        assert float(1 - result.logp_TK.exp().sum()) <= 0, "the naive form has nothing left"


def test_every_id_listed_leaves_no_residual_and_no_gradient() -> None:
    hidden_TH, weight_VH = make_head(tokens=2, rows=9)
    query = Query(torch.arange(9).repeat(2, 1), residual=True)
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=9)
    assert result.log_residual_T is not None
    assert (result.log_residual_T == -torch.inf).all()
    grads = torch.autograd.grad(result.log_residual_T.sum(), (hidden_TH, weight_VH))
    assert all((grad == 0).all() for grad in grads)


def test_extreme_logits() -> None:
    hidden_TH, weight_VH = make_head()
    scale = 1e4 / float((hidden_TH @ weight_VH.t()).detach().abs().max())
    hidden_TH = (hidden_TH.detach() * scale).requires_grad_()
    query = Query(make_ids(), residual=True)
    oracle = loops(hidden_TH, weight_VH[:VOCAB], query)
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB)
    assert result.log_residual_T is not None and oracle.log_residual_T is not None
    torch.testing.assert_close(result.logp_TK, oracle.logp_TK, rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(result.log_residual_T, oracle.log_residual_T, rtol=1e-13, atol=1e-11)
    got = torch.autograd.grad(result.logp_TK.sum() + result.log_residual_T.sum(), (hidden_TH, weight_VH))
    wanted = torch.autograd.grad(oracle.logp_TK.sum() + oracle.log_residual_T.sum(), (hidden_TH, weight_VH))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def label_loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
    return -results[0].logp_TK[:, 0], -results[0].logp_TK


def test_padding_rows_never_enter() -> None:
    hidden_TH, weight_VH = make_head()
    with torch.no_grad():
        weight_VH[VOCAB:] = torch.nan
    query = Query(make_ids(), residual=True)
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB)
    loss, _ = fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB)
    for value in (functional(result).sum(), loss):
        d_hidden, d_weight = torch.autograd.grad(value, (hidden_TH, weight_VH))
        assert d_hidden.isfinite().all() and d_weight.isfinite().all()
        assert (d_weight[VOCAB:] == 0).all() and (d_weight[:VOCAB] != 0).any()


def test_no_tokens() -> None:
    hidden_TH, weight_VH = make_head(tokens=0)
    query = Query(torch.empty(0, 6, dtype=torch.int64), residual=True)
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB)
    assert result.logp_TK.shape == (0, 6) and result.lse_T.shape == (0,)
    loss, aux_M = fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB)
    assert float(loss) == 0 and aux_M.tolist() == [0.0] * 6
    for value in (result.logp_TK.sum(), loss):
        d_hidden, d_weight = torch.autograd.grad(value, (hidden_TH, weight_VH))
        assert d_hidden.shape == hidden_TH.shape
        assert d_weight.shape == weight_VH.shape and (d_weight == 0).all()


def test_without_gradients_the_same_values() -> None:
    hidden_TH, weight_VH = make_head()
    query = Query(make_ids(), residual=True)
    loss, aux_M = fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB)
    with torch.no_grad():
        value, value_aux_M = fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB)
    assert not value.requires_grad
    assert torch.equal(value, loss.detach()) and torch.equal(value_aux_M, aux_M)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(frozen: str) -> None:
    hidden_TH, weight_VH = make_head()
    query = Query(make_ids())
    full = torch.autograd.grad(
        fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB)[0], (hidden_TH, weight_VH)
    )
    (hidden_TH if frozen == "hidden" else weight_VH).requires_grad_(False)
    trained, wanted = (weight_VH, full[1]) if frozen == "hidden" else (hidden_TH, full[0])
    fused = fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB)[0]
    sparse = -sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB).logp_TK[:, 0].sum()
    for loss in (fused, sparse):
        torch.testing.assert_close(torch.autograd.grad(loss, trained)[0], wanted)


def test_fused_backward_runs_once() -> None:
    hidden_TH, weight_VH = make_head()
    loss, _ = fused_token_loss(hidden_TH, weight_VH, [Query(make_ids())], label_loss, vocab_size=VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("entry", ["fused", "recompute"])
def test_bf16_is_as_good_as_its_inputs(entry: str) -> None:
    """fp32 arithmetic on bf16 inputs; gradients are summed in fp32 and rounded once."""
    double = make_head(tokens=40)
    hidden_TH, weight_VH = (tensor.detach().bfloat16().requires_grad_() for tensor in double)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    query = Query(make_ids(tokens=40))

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        if entry == "fused":
            return fused_token_loss(hidden, weight, [query], label_loss, vocab_size=VOCAB, chunk_tokens=3)[0]
        return -sparse_log_probs(hidden, weight, query, vocab_size=VOCAB, chunk_tokens=3).logp_TK[:, 0].sum()

    loss, reference = value(hidden_TH, weight_VH), value(exact[0], exact[1])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    got = torch.autograd.grad(loss * 2, (hidden_TH, weight_VH))
    wanted = torch.autograd.grad(reference * 2, exact)
    for grad, exact_grad in zip(got, wanted, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-8, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("entry", ["fused", "recompute"])
def test_logits_exist_one_chunk_at_a_time(entry: str) -> None:
    hidden_TH, weight_VH = make_head(tokens=256, hidden=2)
    query = Query(make_ids(tokens=256), residual=True)
    with LargestTensor() as seen:
        if entry == "fused":
            loss = fused_token_loss(hidden_TH, weight_VH, [query], label_loss, vocab_size=VOCAB, chunk_tokens=32)[0]
        else:
            loss = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB, chunk_tokens=32).logp_TK.sum()
        torch.autograd.grad(loss, (hidden_TH, weight_VH))
    assert seen.numel == 32 * VOCAB


def test_default_chunk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", 70 * 150 * 8)
    hidden_TH, weight_VH = make_head(tokens=200)
    sizes: list[int] = []

    def f(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        sizes.append(rows.stop - rows.start)
        return label_loss(results, rows)

    fused_token_loss(hidden_TH, weight_VH, [Query(make_ids(tokens=200))], f, vocab_size=VOCAB)
    assert sizes == [64, 64, 64, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 151}, "vocab_size 151"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"softcap": 0.0}, "softcap"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"query": Query(torch.full((4, 1), VOCAB))}, "ids from 141"),
        ({"query": Query(torch.full((4, 1), -2))}, "ids from -2"),
        ({"query": Query(torch.zeros(3, 1, dtype=torch.int64))}, "expected int64"),
        ({"query": Query(torch.zeros(4, 1, dtype=torch.int32))}, "expected int64"),
        ({"query": Query(torch.zeros(4, 1, dtype=torch.int64), 0.0)}, "temperature 0.0"),
        ({"weight": torch.zeros(150, 5)}, "one floating dtype"),
        ({"weight": torch.zeros(150, 4, dtype=torch.float64)}, "expected .T, H., .V, H."),
    ],
)
def test_misuse_is_refused(change: dict[str, Any], message: str) -> None:
    hidden_TH, weight_VH = make_head()
    arguments: dict[str, Any] = {"weight": weight_VH, "query": Query(make_ids()), "vocab_size": VOCAB} | change
    with pytest.raises(ValueError, match=message):
        sparse_log_probs(hidden_TH, arguments.pop("weight"), arguments.pop("query"), **arguments)
