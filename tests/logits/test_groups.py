"""Groups of ids in a query, on one rank, against plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusemega.logits import _head
from fusemega.logits.divergence import fused_divergence_loss
from fusemega.logits.sampled import sample_ids
from fusemega.logits.topk import top_k_log_probs
from fusemega.logits.vocab import Groups, Query, SparseLogProbs, fused_token_loss, sparse_log_probs
from tests.logits.loops import loops, make_head

VOCAB = 141  # of the 150 rows that make_head gives: the others are padding
TOKENS = 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks in the small vocabulary of these tests, the last one short."""
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)


def make_groups(weights: bool = False) -> Groups:
    """Groups of 1 to 60 ids; the last two overlap. Weighted: an id's weights in several groups sum to at most 1."""
    rising = list(range(VOCAB))
    members = [[140], [3, 64, 5], rising[60:120], [0, 139], [130, 2], [9, 11, 100], [11, 125, 50]]
    pairs = [(v, j) for j, ids in enumerate(members) for v in ids]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(5))
    pairs_E = torch.tensor(pairs)[order]
    weight_E = None
    if weights:
        weight_E = torch.rand(len(pairs), generator=torch.Generator().manual_seed(6), dtype=torch.float64) / 3 + 0.1
        weight_E[pairs_E[:, 1] == 4] = 1.0
    return Groups(pairs_E[:, 0], pairs_E[:, 1], len(members), weight_E)


# VOCAB + j is group j. The rows: only ids; several groups; the largest one; padding and an id twice; all padding.
IDS_TK = torch.tensor(
    [
        [7, 8, 9, 140, 0],
        [VOCAB + 1, 17, VOCAB + 3, VOCAB, VOCAB + 4],
        [VOCAB + 2, 2, VOCAB + 5, 1, 59],
        [-1, 20, VOCAB + 4, 20, -1],
        [-1, -1, -1, -1, -1],
    ]
)
OVERLAPPING_TK = torch.tensor([[VOCAB + 5, VOCAB + 6, 4, VOCAB + 2, 100]]).repeat(TOKENS, 1)


def functional(result: SparseLogProbs, rows: slice = slice(None)) -> Tensor:
    """A loss of each token that depends on everything in `result`, [C]."""
    factor_TK = torch.linspace(-1, 2, IDS_TK.numel(), dtype=torch.float64).reshape(IDS_TK.shape)[rows]
    loss_T = (factor_TK * result.logp_TK).sin().sum(1) + 0.3 * result.lse_T.square()
    if result.log_residual_T is not None:
        loss_T = loss_T + 0.7 * result.log_residual_T.square()
    return loss_T


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": {"residual": True, "chunk_tokens": 1},
    "weights": {"weights": True, "chunk_tokens": 3},
    "weights and residual": {"weights": True, "residual": True, "temperature": 2.5},
    "all": {"weights": True, "residual": True, "temperature": 0.5, "softcap": 2.0, "chunk_tokens": 2},
    "overlap": {"ids": OVERLAPPING_TK, "temperature": 0.5},
    "overlap of weights, residual": {"ids": OVERLAPPING_TK, "weights": True, "residual": True, "chunk_tokens": 2},
}


@pytest.mark.parametrize("entry", ["fused", "recompute"])
@pytest.mark.parametrize("name", CASES)
def test_equals_loops(entry: str, name: str) -> None:
    case = CASES[name]
    hidden_TH, weight_VH = make_head(tokens=TOKENS)
    query = Query(
        case.get("ids", IDS_TK),
        case.get("temperature", 1.0),
        case.get("residual", False),
        make_groups(case.get("weights", False)),
    )
    options = {"vocab_size": VOCAB, "softcap": case.get("softcap"), "chunk_tokens": case.get("chunk_tokens")}
    oracle_T = functional(loops(hidden_TH, weight_VH[:VOCAB], query, options["softcap"]))
    if entry == "fused":
        other = Query(OVERLAPPING_TK[:, :3], query.temperature, groups=make_groups())
        plain = Query(torch.arange(TOKENS)[:, None])

        def f(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            first, second, third = results
            loss_C = functional(first, rows) + second.logp_TK.cos().sum(1) + third.logp_TK[:, 0]
            return loss_C, first.logp_TK

        loss, aux_M = fused_token_loss(hidden_TH, weight_VH, [query, other, plain], f, **options)
        more = [loops(hidden_TH, weight_VH[:VOCAB], asked, options["softcap"]) for asked in (query, other, plain)]
        oracle_T, oracle_aux_TM = f(more, slice(None))
        torch.testing.assert_close(aux_M, oracle_aux_TM.detach().sum(0), rtol=0, atol=1e-11)
    else:
        result = sparse_log_probs(hidden_TH, weight_VH, query, **options)
        assert (result.logp_TK[query.ids_TK < 0] == 0).all(), "padding reads 0"
        loss = functional(result).sum()
    torch.testing.assert_close(loss, oracle_T.sum(), rtol=0, atol=1e-11)
    got = torch.autograd.grad(loss * 3, (hidden_TH, weight_VH))
    wanted = torch.autograd.grad(oracle_T.sum() * 3, (hidden_TH, weight_VH))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_gradients_equal_finite_differences() -> None:
    hidden_TH, weight_VH = make_head(tokens=2, hidden=2, rows=9)
    groups = Groups(
        torch.tensor([0, 3, 5, 6, 3]), torch.tensor([0, 0, 0, 1, 1]), 2, torch.tensor([1, 0.5, 1, 0.2, 0.5])
    )
    query = Query(torch.tensor([[8, 1], [9, -1]]), 1.5, True, groups)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        result = sparse_log_probs(hidden, weight, query, vocab_size=8, softcap=2.0, chunk_tokens=1)
        assert result.log_residual_T is not None
        return result.logp_TK, result.lse_T, result.log_residual_T

    assert torch.autograd.gradcheck(outputs, (hidden_TH, weight_VH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_1e_minus_60_and_a_residual_beside_a_group_of_nearly_all(dtype: torch.dtype) -> None:
    hidden_TH, weight_VH = torch.ones(1, 1, dtype=dtype), torch.zeros(150, 1, dtype=dtype)
    weight_VH[70:80] = 140.0  # nearly all
    weight_VH[[5, 6]] = torch.tensor([[1.0], [2.0]], dtype=dtype)
    groups = Groups(torch.tensor([5, 6, *range(70, 80)]), torch.tensor([0, 0] + [1] * 10), 2)
    query = Query(torch.tensor([[150, 151]]), 1.0, True, groups)
    leaves = [hidden_TH.requires_grad_(), weight_VH.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    result, oracle = sparse_log_probs(*leaves, query, vocab_size=150), loops(exact[0], exact[1], query)
    assert oracle.logp_TK[0, 0].exp() < 1e-59 and oracle.logp_TK[0, 1].exp() == 1.0
    assert oracle.log_residual_T is not None and result.log_residual_T is not None
    pairs = [(result.logp_TK[0, 0], oracle.logp_TK[0, 0]), (result.log_residual_T[0], oracle.log_residual_T[0])]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=4 * torch.finfo(dtype).eps, atol=0)
        got = torch.autograd.grad(ours, leaves, retain_graph=True)
        wanted = torch.autograd.grad(theirs, exact, retain_graph=True)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=40 * torch.finfo(dtype).eps, atol=1e-30)


def test_weights_that_sum_to_one_up_to_rounding_leave_nothing() -> None:
    """0.7 + 0.1 + 0.2 is not 1 in fp32; what is left of it would be far more than the residual of 1e-12."""
    hidden_TH, weight_VH = torch.ones(1, 1), torch.zeros(150, 1)
    weight_VH[3] = 32.5
    groups = Groups(torch.tensor([3, 3, 3]), torch.arange(3), 3, torch.tensor([0.7, 0.1, 0.2]))
    query = Query(torch.tensor([[150, 151, 152]]), 1.0, True, groups)
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=150)
    alone = sparse_log_probs(hidden_TH, weight_VH, Query(torch.tensor([[3]]), 1.0, True), vocab_size=150)
    assert result.log_residual_T is not None and alone.log_residual_T is not None
    torch.testing.assert_close(result.log_residual_T, alone.log_residual_T, rtol=1e-6, atol=0)


def test_an_id_that_is_listed_and_in_a_listed_group_is_taken_out_of_the_residual_once() -> None:
    hidden_TH, weight_VH = make_head(tokens=1)
    groups = Groups(torch.tensor([3, 9]), torch.tensor([0, 0]), 1)
    twice = sparse_log_probs(
        hidden_TH, weight_VH, Query(torch.tensor([[VOCAB, 9]]), 1.0, True, groups), vocab_size=VOCAB
    )
    once = sparse_log_probs(hidden_TH, weight_VH, Query(torch.tensor([[3, 9]]), 1.0, True), vocab_size=VOCAB)
    assert twice.log_residual_T is not None and once.log_residual_T is not None
    torch.testing.assert_close(twice.log_residual_T, once.log_residual_T, rtol=0, atol=1e-14)
    torch.testing.assert_close(twice.logp_TK[:, 0], once.logp_TK.logsumexp(1), rtol=0, atol=1e-14)


def test_a_group_of_everything() -> None:
    hidden_TH, weight_VH = make_head(tokens=2, rows=9)
    query = Query(torch.full((2, 1), 9), 1.0, True, Groups(torch.arange(9), torch.zeros(9, dtype=torch.int64), 1))
    result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=9)
    assert result.log_residual_T is not None
    assert (result.log_residual_T == -torch.inf).all()
    torch.testing.assert_close(result.logp_TK, torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-15)
    for value in (result.log_residual_T.sum(), result.logp_TK.sum()):
        grads = torch.autograd.grad(value, (hidden_TH, weight_VH), retain_graph=True)
        assert all(float(grad.abs().max()) < 1e-14 for grad in grads)


def test_ids_that_the_model_excludes() -> None:
    """Logits of -inf: a group of nothing else reads -inf and passes nothing on; beside others they count nothing."""
    hidden_TH, weight_VH = torch.ones(1, 1), torch.zeros(9, 1)
    weight_VH[[2, 3]] = -torch.inf
    hidden_TH, weight_VH = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    groups = Groups(torch.tensor([2, 3, 2, 5]), torch.tensor([0, 0, 1, 1]), 2)
    result = sparse_log_probs(hidden_TH, weight_VH, Query(torch.tensor([[9, 10]]), 1.0, True, groups), vocab_size=9)
    torch.testing.assert_close(result.logp_TK.detach().exp(), torch.tensor([[0.0, 1 / 7]]))
    (d_weight,) = torch.autograd.grad(result.logp_TK[0, 1], weight_VH)
    assert d_weight.isfinite().all() and float(d_weight[5]) == pytest.approx(6 / 7)


def test_singletons_are_their_ids_bit_for_bit() -> None:
    hidden_TH, weight_VH = make_head(tokens=TOKENS)
    ids_TK = torch.tensor([[4, 90, 17, 2, 140]]).repeat(TOKENS, 1)
    groups = Groups(torch.arange(VOCAB), torch.arange(VOCAB), VOCAB)
    results = [
        sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=VOCAB, chunk_tokens=2)
        for query in (Query(ids_TK, 2.0, True), Query(ids_TK + VOCAB, 2.0, True, groups))
    ]
    grads = [torch.autograd.grad(functional(result).sum(), (hidden_TH, weight_VH)) for result in results]
    assert torch.equal(results[0].logp_TK, results[1].logp_TK)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("entry", ["fused", "recompute"])
def test_bf16_is_as_good_as_its_inputs(entry: str) -> None:
    hidden_TH, weight_VH = (tensor.detach().bfloat16().requires_grad_() for tensor in make_head(tokens=TOKENS))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    query = Query(IDS_TK, 1.0, True, make_groups(weights=True))

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        if entry == "fused":
            return fused_token_loss(
                hidden, weight, [query], lambda r, rows: (functional(r[0], rows), r[0].logp_TK), vocab_size=VOCAB
            )[0]
        result = sparse_log_probs(hidden, weight, query, vocab_size=VOCAB, chunk_tokens=3)
        assert result.logp_TK.dtype == torch.promote_types(hidden.dtype, torch.float32)
        return functional(result).sum()

    reference = value(exact[0], exact[1])
    loss = value(hidden_TH, weight_VH)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    got = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    for grad, wanted in zip(got, torch.autograd.grad(reference, exact), strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), wanted, rtol=2**-8, atol=1e-4)


def test_no_tokens_no_entries_and_no_groups() -> None:
    for tokens, entries, num_groups in ((0, 3, 1), (2, 0, 1), (2, 3, 0)):
        hidden_TH, weight_VH = make_head(tokens=tokens, rows=9)
        members_E = torch.arange(num_groups)
        query = Query(
            torch.ones(tokens, entries, dtype=torch.int64), 1.0, True, Groups(members_E, members_E, num_groups)
        )
        result = sparse_log_probs(hidden_TH, weight_VH, query, vocab_size=9)
        assert result.logp_TK.shape == (tokens, entries)
        torch.autograd.grad(result.logp_TK.sum() + result.lse_T.sum(), (hidden_TH, weight_VH))


ONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE.int(), ONE, 1), "members .1. of torch.int32"),
        ((ONE[None], ONE, 1), "members .1, 1."),
        ((ONE, torch.zeros(2, dtype=torch.int64), 1), "group .2.*expected int64 .1."),
        ((ONE.to("meta"), ONE, 1), "on meta: expected"),
        ((ONE, ONE, -1), "num_groups -1"),
        ((ONE - 1, ONE, 1), "members from -1"),
        ((ONE, ONE + 1, 1), "group from 1 to 1: expected 0 to 0"),
        ((ONE, ONE, 2), "group 1: has no members"),
        ((torch.tensor([4, 5, 5]), torch.tensor([0, 1, 1]), 2), "group 1: id 5 twice"),
        ((ONE, ONE, 1, ONE), "weight .1. of torch.int64"),
        ((ONE, ONE, 1, torch.zeros(1)), "weight: expected numbers above 0"),
        ((ONE, ONE, 1, torch.full((1,), torch.nan)), "weight: expected numbers above 0"),
        ((ONE, ONE, 1, torch.full((1,), 1.1)), "at most 1"),
    ],
)
def test_bad_groups_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(*arguments)


@pytest.mark.parametrize(
    ("ids", "vocab_size", "groups", "message"),
    [
        ([[VOCAB + 7]], VOCAB, make_groups(), "ids from 148 to 148: expected -1 .padding. to 147"),
        ([[VOCAB]], VOCAB, None, "ids from 141 to 141: expected -1 .padding. to 140"),
        ([[VOCAB, 3, VOCAB]], VOCAB, make_groups(), "a group twice in one row"),
        ([[3]], 140, make_groups(), "a group has the id 140: expected ids up to 139"),
        ([[3]], VOCAB, make_groups().to(torch.device("meta")), "groups on meta and ids on cpu"),
    ],
)
def test_queries_that_do_not_fit_are_refused(
    ids: list[list[int]], vocab_size: int, groups: Groups | None, message: str
) -> None:
    hidden_TH, weight_VH = make_head(tokens=1)
    with pytest.raises(ValueError, match=message):
        sparse_log_probs(hidden_TH, weight_VH, Query(torch.tensor(ids), groups=groups), vocab_size=vocab_size)


def test_groups_are_refused_where_only_ids_make_sense() -> None:
    hidden_TH, weight_VH = (tensor.detach() for tensor in make_head(tokens=1))
    head: Any = (hidden_TH, weight_VH)
    labels_T = torch.tensor([VOCAB])  # the first group, if there were any
    calls = (
        lambda: top_k_log_probs(*head, 3, labels_T, vocab_size=VOCAB),
        lambda: sample_ids(*head, torch.zeros(1, 1, dtype=torch.float64), labels_T, vocab_size=VOCAB),
        lambda: fused_divergence_loss(
            *head, *head, labels_T, "jsd", label_weight=1.0, divergence_weight=1.0, vocab_size=VOCAB
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="ids from 141"):
            call()
