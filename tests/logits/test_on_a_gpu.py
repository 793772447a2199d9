"""What the losses do on a GPU, as far as it can be seen without one: the meta device stands in for it
(tests/pretended_gpu.py). Whole steps: tests/training/test_on_a_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits import _head, _members, _products
from fusemega.logits.divergence import fused_divergence_loss
from fusemega.logits.topk import top_k_log_probs
from fusemega.logits.vocab import Query, fused_token_loss, sparse_log_probs
from fusemega.losses.registry import Objective, build_objective, parse_objective
from fusemega.passes.answers import HiddenStates
from fusemega.passes.batches import GlobalBatch
from fusemega.training.trainer import Trainer
from tests.logits.loops import make_head, make_ids
from tests.logits.test_groups import IDS_TK, make_groups
from tests.losses.test_objectives import TOKENIZER, VOCAB, N, row_of, sample_of, store_of
from tests.passes.bare import bare_batch
from tests.pretended_gpu import META as GPU
from tests.pretended_gpu import Watch


def objective_named(name: str, folder: Path) -> Objective[Any]:
    sample = sample_of()
    store = str(store_of(folder / "store", sample, row_of(sample)).path)
    other = str(store_of(folder / "other", sample, row_of(sample)).path)
    section: dict[str, Any] = {
        "sft": {},
        "distill": {"store": store},
        "renormalise": {"store": store, "tail": "renormalise"},
        "fuse": {"teachers": [{"store": store}, {"store": other}], "fusion": {"function": "avg_ce"}},
        "online_distill": {"teacher": {"load": "anywhere"}},
    }[name]
    name = "distill" if name == "renormalise" else name
    return build_objective(parse_objective({"name": name, **section}), TOKENIZER, VOCAB)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: None)
    return SimpleNamespace(device=GPU)


@pytest.mark.parametrize("name", ["sft", "distill", "renormalise", "fuse", "online_distill"])
def test_a_step_of_each_objective_stays_on_the_device(name: str, tmp_path: Path, alone: SimpleNamespace) -> None:
    objective = objective_named(name, tmp_path)
    fields = {name: torch.from_numpy(array.copy()) for name, array in objective.position_fields(sample_of()).items()}
    host = GlobalBatch([bare_batch(torch.arange(N), fields)], [], N)
    trainer: Any = SimpleNamespace(objective=objective, world=alone, _adding_ranks=None)
    _products.operand_dtype(torch.bfloat16, GPU)  # tries once
    with Watch() as spy:
        denominators, measured = Trainer._counted(trainer, host.micro_batches)
        (batch,) = host.on(GPU).micro_batches
        moved = {**vars(batch), **batch.position_fields}.values()
        assert {value.device for value in moved if isinstance(value, Tensor)} == {GPU}
        hidden, weight = (t.detach().bfloat16().to(GPU).requires_grad_() for t in make_head(tokens=N))
        head = {"group": None, "vocab_size": VOCAB}
        answers = {asked: HiddenStates(hidden.detach(), weight.detach(), head) for asked in objective.frozen}
        output = HiddenStates(hidden, weight, head)
        loss, sums = objective.loss(output, replace(batch, answers=answers), denominators)
        loss.backward()
    assert all(
        value.device == GPU
        for value in (loss, *sums.values(), *denominators.values(), measured, hidden.grad, weight.grad)
    )
    assert all(value.dtype == torch.float64 for value in denominators.values())
    # Scalars of the host in front of a tensor of the device are arguments, not copies.
    assert spy.mixed == []
    # bf16 operands, and every result in fp32: logits (also the teacher's) and both gradients.
    assert set(spy.products) == {(torch.bfloat16, torch.float32)}
    assert len(spy.products) == (4 if name == "online_distill" else 3)


def test_scores_stay_on_the_device() -> None:
    hidden, weight = (t.detach().bfloat16().to(GPU) for t in make_head())
    ids = make_ids().to(GPU)
    with Watch() as spy:
        rows = sparse_log_probs(hidden, weight, Query(ids, 2.0, residual=True), vocab_size=VOCAB, softcap=30.0)
    assert rows.log_residual_T is not None and rows.log_residual_T.device == GPU and spy.mixed == []


@pytest.mark.parametrize("entry", ["fused", "recompute"])
@pytest.mark.parametrize("weighted", [False, True])
def test_groups_stay_on_the_device(entry: str, weighted: bool) -> None:
    """And need no number from it, although their sizes differ: the list of members has a length known in advance."""
    groups = make_groups(weighted).to(GPU)
    hidden, weight = (t.detach().bfloat16().to(GPU).requires_grad_() for t in make_head())
    query = Query(make_ids(vocab_size=VOCAB + 7).to(GPU), 2.0, True, groups)
    with Watch() as spy:
        if entry == "fused":
            loss = fused_token_loss(
                hidden, weight, [query], lambda found, rows: (found[0].lse_T, found[0].logp_TK), vocab_size=VOCAB
            )[0]
        else:
            loss = sparse_log_probs(hidden, weight, query, vocab_size=VOCAB, chunk_tokens=3).logp_TK.sum()
        loss.backward()
    assert spy.mixed == [] and hidden.grad is not None and hidden.grad.device == GPU


@pytest.mark.parametrize("weighted", [False, True])
def test_a_list_of_members_with_room_to_spare(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: for any K groups a token, and in every block. What is not filled changes nothing."""
    query = Query(IDS_TK, 2.0, True, make_groups(weighted))
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 1)
    results = []
    for spare in (False, True):
        if spare:
            monkeypatch.setattr(_members, "may_read", lambda tensor: False)
        hidden, weight = make_head(tokens=len(IDS_TK))
        result = sparse_log_probs(hidden, weight, query, vocab_size=VOCAB, chunk_tokens=2)
        assert result.log_residual_T is not None
        value = result.logp_TK.sin().sum() + result.log_residual_T.sin().sum()
        results.append([result.logp_TK, result.log_residual_T, *torch.autograd.grad(value, (hidden, weight))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_ids_that_are_on_the_device_are_checked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading them; on a host they are refused with both ends."""
    checked: list[str] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: checked.append(message))
    hidden, weight = (t.detach().to(GPU) for t in make_head())
    query = Query(make_ids().to(GPU))
    _head._check(hidden, weight, [query, query], 1, VOCAB, None, None)
    assert checked == [f"ids of a query outside -1 (padding) to {VOCAB - 1}"] * 2


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products as a GPU makes them: of bf16 operands, summed in fp32, and not rounded."""
    monkeypatch.setattr(_head, "operand_dtype", lambda dtype, device: dtype)
    mm, addmm = torch.mm, torch.addmm

    def wide(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return mm(*(t if out_dtype is None else t.to(out_dtype) for t in (left, right)), **kwargs)

    def wide_sum(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert total is out and total.dtype == out_dtype
        return addmm(total, left.to(out_dtype), right.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "addmm", wide_sum)
    monkeypatch.setattr(torch, "mm", wide)
    yield


def test_log_probs_and_the_ten_most_probable_are_those_of_exact_products(tensor_cores: None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 48, generator=generator), torch.randn(1000, 48, generator=generator)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    labels = torch.randint(1000, (64,), generator=generator)
    exact = (hidden.double() @ weight.double().t()).log_softmax(1)
    ids, logp, _, label_logp = top_k_log_probs(hidden, weight, 10, labels, vocab_size=1000)
    assert torch.equal(ids, exact.topk(10).indices)
    torch.testing.assert_close(logp.double(), exact.gather(1, ids), rtol=0, atol=2e-5)
    torch.testing.assert_close(label_logp.double(), exact.gather(1, labels[:, None])[:, 0], rtol=0, atol=2e-5)
    # What rounding the products would do, which the tolerance above must tell apart.
    rounded = (hidden @ weight.t()).double().log_softmax(1)
    assert (rounded - exact).abs().mean() > 1e-2
    assert not torch.equal(rounded.topk(10).indices, ids)


def test_gradients_of_bf16_products_are_summed_in_fp32(tensor_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many blocks and chunks; only the factors are bf16, whose rounding is 2^-9 of each."""
    monkeypatch.setitem(_head.BLOCK_BYTES, "cpu", 64 * 32 * 4)
    double = make_head(tokens=40)
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in double)
    labels = torch.arange(40)
    args: dict[str, Any] = {
        "vocab_size": VOCAB,
        "chunk_tokens": 3,
        "temperature": 1.0,
        "label_weight": 0.3,
        "divergence_weight": 0.7,
    }
    teacher = (hidden.detach().flip(0).contiguous(), weight.detach())
    loss, _ = fused_divergence_loss(hidden, weight, *teacher, labels, "forward_kl", **args)
    got = torch.autograd.grad(loss, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wide = [t.double() for t in teacher]
    wanted = torch.autograd.grad(
        fused_divergence_loss(exact[0], exact[1], *wide, labels, "forward_kl", **args)[0], exact
    )
    for ours, theirs in zip(got, wanted, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 4e-3


def test_where_fp32_results_cannot_be_had_the_operands_are_widened_and_the_reason_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("out_dtype is not supported here\nstack")

    _products._narrow_problem.cache_clear()
    monkeypatch.setattr(torch, "mm", none)
    assert [_products.operand_dtype(torch.bfloat16, GPU) for _ in range(3)] == [torch.float32] * 3
    told = capsys.readouterr()
    assert (told.out + told.err).count("out_dtype is not supported here") == 1 and "stack" not in told.out + told.err
    _products._narrow_problem.cache_clear()
    monkeypatch.undo()
    assert _products.operand_dtype(torch.bfloat16, GPU) == torch.bfloat16
    assert _products.operand_dtype(torch.float64, GPU) == torch.float64
    assert _products.operand_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32
