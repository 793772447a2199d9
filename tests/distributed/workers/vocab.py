"""Worker of test_vocab.py: the kernels over a plain gloo group against dense heads, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits import _head
from fusemega.logits.divergence import DIVERGENCES, fused_divergence_loss
from fusemega.logits.sampled import sample_ids, uniforms
from fusemega.logits.topk import top_k_log_probs
from fusemega.logits.vocab import Groups, Query, SparseLogProbs, fused_token_loss, sparse_log_probs
from tests.distributed.launch import report
from tests.logits.dense_divergence import dense_logits, dense_sums

TOKENS, HIDDEN, ROWS = 9, 6, 400  # rows over all ranks, padding included
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"chunk_tokens": 2},
    "temperature and softcap": {"temperature": 2.0, "softcap": 3.0, "chunk_tokens": 4},
    "ids on other ranks": {"low": 300},
    "a rank without real rows": {"vocab_size": 150},
    "every id listed": {"vocab_size": 5, "listed": 5},
    "one token": {"tokens": 1},
    "no tokens": {"tokens": 0},
    "extreme": {"scale": 3000.0},
    "groups": {"groups": True, "temperature": 2.0, "softcap": 3.0, "chunk_tokens": 4},
    "groups of weighted ids": {"groups": True, "weights": True, "chunk_tokens": 1},
    "groups, a rank without real rows": {"groups": True, "weights": True, "vocab_size": 150},
    "groups, no tokens": {"groups": True, "tokens": 0},
}


def some_groups(vocab_size: int, weights: bool, generator: torch.Generator) -> Groups:
    """One within a rank, others over all ranks, one of them of almost half the vocabulary; an id may be in two."""
    order = torch.randperm(vocab_size, generator=generator)
    sizes = [1, 5, 9, vocab_size // 2 - 15]
    members_E = torch.cat([torch.arange(4), order[: sum(sizes)]])
    group_E = torch.arange(5).repeat_interleave(torch.tensor([4, *sizes]))
    weight_E = torch.rand(len(members_E), generator=generator).double() / 3 + 0.1 if weights else None
    return Groups(members_E, group_E, 5, weight_E)


def entry_weights(groups: Groups | None, vocab_size: int) -> Tensor:
    """Weight of each id in each entry that a query can list: ids, groups, and last, for -1, everything."""
    table = torch.eye(vocab_size, dtype=torch.float64)
    if groups is not None:
        group_E = torch.arange(groups.num_groups).repeat_interleave(groups.count_J)
        sums = torch.zeros(groups.num_groups, vocab_size, dtype=torch.float64)
        sums[group_E, groups.members_E] = 1.0 if groups.weight_E is None else groups.weight_E
        table = torch.cat([table, sums])
    return torch.cat([table, torch.ones(1, vocab_size, dtype=torch.float64)])


def check(case: dict[str, Any]) -> float:
    """Largest error of values, d_hidden summed over ranks, and this rank's d_weight, of both entry points."""
    group = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens, vocab_size, listed = case.get("tokens", TOKENS), case.get("vocab_size", 391), case.get("listed", 7)
    temperature, softcap = case.get("temperature", 1.0), case.get("softcap")
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator) * case.get("scale", 1.0)
    weight_VH = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH[vocab_size:] = 100.0
    ids_TK = torch.randint(case.get("low", 0), vocab_size, (tokens, listed), generator=generator)
    if listed == vocab_size:
        ids_TK = torch.arange(vocab_size).repeat(tokens, 1)
    elif tokens > 1:
        ids_TK[0, 0], ids_TK[1, 3] = ids_TK[0, 1], -1
    groups = some_groups(vocab_size, case.get("weights", False), generator) if case.get("groups") else None
    if groups is not None:
        ids_TK[:, 4:] = vocab_size + torch.rand(tokens, groups.num_groups, generator=generator).argsort(1)[:, :3]
    queries = [Query(ids_TK, temperature, residual=True, groups=groups), Query(ids_TK[:, 2:3], groups=groups)]

    def f(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        one, two = results
        assert one.log_residual_T is not None
        residual_T = torch.where(one.log_residual_T.isinf(), 0.0, one.log_residual_T)
        loss_T = one.logp_TK.sin().sum(1) + one.lse_T.cos() + residual_T.sin() + two.logp_TK[:, 0]
        return loss_T, one.logp_TK

    def dense(hidden: Tensor, weight: Tensor, query: Query) -> SparseLogProbs:
        logits = hidden @ weight[:vocab_size].t()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logp = (logits / query.temperature).log_softmax(1)
        weight_TKV = entry_weights(query.groups, vocab_size)[query.ids_TK]
        real_TK = query.ids_TK >= 0
        logp_TK = torch.where(real_TK, (logp[:, None] + weight_TKV.log()).logsumexp(2), 0.0)
        left = 1.0 - weight_TKV.mul(real_TK[..., None]).sum(1)
        residual = (logp + left.clamp(min=1e-9).log()).masked_fill(left <= 1e-9, -torch.inf).logsumexp(1)
        return SparseLogProbs(logp_TK, (logits / query.temperature).logsumexp(1), residual)

    full = [hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
    oracle = [dense(full[0], full[1], query) for query in queries]
    reference_T, reference_aux = f(oracle, slice(None))
    reference = [*torch.autograd.grad(reference_T.sum() * 2, full), reference_T.sum().detach(), reference_aux.sum(0)]
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    reference[1] = reference[1][mine]
    local = [hidden_TH.clone().requires_grad_(), weight_VH[mine].clone().requires_grad_()]
    options: dict[str, Any] = {"group": group, "vocab_size": vocab_size, "softcap": softcap}
    options["chunk_tokens"] = case.get("chunk_tokens")

    worst = 0.0
    fused, fused_aux = fused_token_loss(local[0], local[1], queries, f, **options)
    sparse = [sparse_log_probs(local[0], local[1], query, **options) for query in queries]
    sparse_T, sparse_aux = f(sparse, slice(None))
    for loss, aux in ((fused, fused_aux), (sparse_T.sum(), sparse_aux.sum(0))):
        d_hidden, d_weight = torch.autograd.grad(loss * 2, local)
        dist.all_reduce(d_hidden)
        for got, wanted in zip((d_hidden, d_weight, loss, aux), reference, strict=True):
            assert got.shape == wanted.shape
            if got.numel():
                error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
                worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


TEACHER_HIDDEN = 4
DIVERGENCE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked, softcaps": {"temperature": 2.0, "softcap": 3.0, "teacher_softcap": 2.0, "chunk_tokens": 4},
    "a rank without real rows": {"vocab_size": 150},
    "no tokens": {"tokens": 0},
}


def check_divergence(name: str, case: dict[str, Any]) -> float:
    """As `check`, of `fused_divergence_loss`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    options = {"vocab_size": 391, "temperature": 1.0} | case
    tokens, vocab_size = options.pop("tokens", TOKENS), options["vocab_size"]
    generator = torch.Generator().manual_seed(4)
    shapes = ((tokens, HIDDEN), (ROWS, HIDDEN), (tokens, TEACHER_HIDDEN), (ROWS, TEACHER_HIDDEN))
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    tensors[1][vocab_size:] = tensors[3][vocab_size:] = 100.0
    labels_T = torch.randint(vocab_size, (tokens,), generator=generator)
    full = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
    own = dense_logits(full[0], full[1][:vocab_size], case.get("softcap"))
    taught = dense_logits(tensors[2], tensors[3][:vocab_size], case.get("teacher_softcap"))
    sums = dense_sums(own, taught, labels_T, name, options["temperature"])
    oracle = 0.3 * sums[0] + 1.7 * sums[1]
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    r_hidden, r_weight = torch.autograd.grad(oracle * 2, full)
    local = [tensors[0].clone().requires_grad_(), tensors[1][mine].clone().requires_grad_()]
    loss, sums_M = fused_divergence_loss(
        *local,
        tensors[2],
        tensors[3][mine],
        labels_T,
        name,
        label_weight=0.3,
        divergence_weight=1.7,
        group=dist.group.WORLD,
        **options,
    )
    d_hidden, d_weight = torch.autograd.grad(loss * 2, local)
    dist.all_reduce(d_hidden)
    pairs = ((d_hidden, r_hidden), (d_weight, r_weight[mine]), (loss, oracle), (sums_M, torch.stack(sums)))
    return max(float((got - wanted).abs().max().nan_to_num(nan=1.0)) for got, wanted in pairs if got.numel())


def collectives() -> int:
    """All-reduces of one `fused_divergence_loss` over three chunks."""
    calls = []
    plain = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(None), plain(*args, **kwargs))[1]
    inputs = [torch.zeros(shape, requires_grad=True) for shape in ((9, 2), (100, 2), (9, 3), (100, 3))]
    fused_divergence_loss(
        *inputs, torch.zeros(9, dtype=torch.int64), "jsd", temperature=2.0, label_weight=1.0, divergence_weight=1.0,
        group=dist.group.WORLD, vocab_size=100 * dist.get_world_size(), chunk_tokens=3,
    )  # fmt: skip
    dist.all_reduce = plain
    return len(calls)


def top_k() -> list[dict[str, Any]]:
    """Rows of a head with ties within and across ranks, at k below and above a rank's real rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weight_VH = torch.zeros(400, 1)
    weight_VH[[350, 10, 120, 230]] = 2.0
    weight_VH[[399, 5]] = 1.0
    local = weight_VH[rank * 400 // ranks : (rank + 1) * 400 // ranks]
    hidden_TH = torch.ones(3, 1)
    labels_T = torch.tensor([5, 10, 7])  # logits 1, 2, 0
    found = []
    for k, vocab_size in ((3, 400), (6, 400), (9, 400), (6, 360), (10, 105)):
        ids, logp, residual, label_logp = top_k_log_probs(
            hidden_TH, local, k, labels_T, group=dist.group.WORLD, vocab_size=vocab_size, chunk_tokens=2
        )
        mass = logp.double().exp().sum(1) + residual.double().exp()
        gaps = (label_logp - label_logp[2]).tolist()
        found.append({"ids": ids.tolist(), "mass": mass.tolist(), "label_gaps": gaps})
    return found


def draws(group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
    """Drawn ids and labels' log-probs of two heads, the second without real rows on the last ranks; also run alone."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator)
    local = weight_VH[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
    uniforms_TS = torch.from_numpy(uniforms(1, b"key", TOKENS, 300))
    found = []
    for vocab_size, temperature in ((391, 1.0), (90, 3.0)):
        ids_TS, label_logp_T = sample_ids(
            hidden_TH,
            local,
            uniforms_TS,
            torch.arange(TOKENS) * 11 % vocab_size,
            temperature=temperature,
            group=group,
            vocab_size=vocab_size,
            chunk_tokens=4,
        )
        found.append({"ids": ids_TS.tolist(), "label_logp": label_logp_T.tolist()})
    return found


def main() -> None:
    dist.init_process_group("gloo")
    _head.BLOCK_BYTES["cpu"] = 1  # blocks of 64 rows: several a rank
    errors = {name: check(case) for name, case in CASES.items()}
    for name in DIVERGENCES:
        errors |= {f"{name}, {case}": check_divergence(name, settings) for case, settings in DIVERGENCE_CASES.items()}
    report({"collectives": collectives(), "errors": errors, "top_k": top_k(), "draws": draws(dist.group.WORLD)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
