"""The cases of `benchmarks/head.py` in float64: the vocabulary kernel against full logits and autograd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits import _head
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss, sparse_log_probs

TOLERANCE = 1e-10
DIFFERENCE_TOLERANCE = 1e-6
VOCAB, HIDDEN, ROWS = 1003, 24, 320  # ROWS a rank at TP 4; 277 rows are padding
CASES: list[dict[str, Any]] = [
    {"name": f"chunk {chunk}", "chunk_tokens": chunk, "residual": True} for chunk in (1, 3, 8, 13, None)
] + [
    {"name": "plain"},
    {"name": "temperature", "temperature": 2.5, "residual": True},
    {"name": "softcap", "softcap": 5.0, "residual": True},
    {"name": "softcap and temperature", "softcap": 5.0, "temperature": 0.5, "residual": True},
    {"name": "one token", "tokens": 1, "residual": True},
    {"name": "no tokens", "tokens": 0, "residual": True},
    {"name": "logits of 1e4", "scale": 1e4, "chunk_tokens": 5},
    {"name": "logits of 1e4, residual", "scale": 1e4, "residual": True},
    {"name": "residual of 1e-12", "gap": 47.0, "residual": True},
    {"name": "every id listed", "ids": VOCAB, "residual": True},
    {"name": "duplicates", "pool": 5, "residual": True},
    {"name": "mostly padding", "padding": 0.8, "residual": True},
]


def check_case(case: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Largest errors of one case on this rank, relative to max(1, largest reference entry)."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    generator = torch.Generator().manual_seed(7)
    tokens, listed = case.get("tokens", 13), case.get("ids", 9)
    temperature, softcap = case.get("temperature", 1.0), case.get("softcap")
    hidden_TH = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(ROWS * 4, HIDDEN, dtype=torch.float64, generator=generator)
    if "scale" in case and tokens:
        hidden_TH *= case["scale"] / (hidden_TH @ weight_VH[:VOCAB].t()).abs().max()
    ids_TK = torch.rand(tokens, VOCAB, generator=generator).argsort(1)[:, :listed]
    if "gap" in case:  # one hidden channel lifts the listed ids of all tokens far above the others
        ids_TK[:] = torch.arange(listed) * (VOCAB // listed)
        hidden_TH[:, 0], weight_VH[:, 0] = 1.0, 0.0
        weight_VH[ids_TK[0], 0] = case["gap"]
    if "pool" in case:
        ids_TK = ids_TK % case["pool"] * (VOCAB // case["pool"])
    if "padding" in case:
        ids_TK[torch.rand(tokens, listed, generator=generator) < case["padding"]] = -1
    labels_T1 = torch.randint(VOCAB, (tokens, 1), generator=generator)
    shapes = ((tokens, listed), (tokens,), (tokens,))
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    queries = [Query(ids_TK, temperature, case.get("residual", False)), Query(labels_T1)]
    weight_VH[VOCAB:] = 1e3  # padding rows: must not enter the softmax

    def functional(result: SparseLogProbs, rows: slice) -> Tensor:
        loss_T = (result.logp_TK * weights[0][rows]).sum(1) + result.lse_T.tanh() * weights[1][rows]
        if result.log_residual_T is not None:
            finite_T = torch.where(result.log_residual_T.isinf(), 0.0, result.log_residual_T)
            loss_T = loss_T + finite_T.tanh() * weights[2][rows]
        return loss_T

    def both(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        loss_T = functional(results[0], rows) + results[1].logp_TK[:, 0].square()
        return loss_T, torch.stack([results[1].logp_TK[:, 0], results[0].lse_T], dim=1)

    everything = slice(0, tokens)
    full = [x.clone().requires_grad_() for x in (hidden_TH, weight_VH)]
    oracle = [_dense(full[0], full[1][:VOCAB], query, softcap) for query in queries]
    mine = slice(rank * ROWS * 4 // ranks, (rank + 1) * ROWS * 4 // ranks)
    local = [hidden_TH.clone().requires_grad_(), weight_VH[mine].clone().requires_grad_()]
    options: dict[str, Any] = {
        "group": group,
        "vocab_size": VOCAB,
        "softcap": softcap,
        "chunk_tokens": case.get("chunk_tokens"),
    }
    errors: dict[str, float] = {}

    def compare(entry: str, loss: Tensor, reference: Tensor) -> None:
        d_hidden, d_weight = torch.autograd.grad(loss * 3.0, local)
        if group is not None:
            dist.all_reduce(d_hidden, group=group)
        r_hidden, r_weight = torch.autograd.grad(reference * 3.0, full, retain_graph=True)
        errors[f"{entry} loss"] = _error(loss.detach(), reference.detach())
        errors[f"{entry} d_hidden"] = _error(d_hidden, r_hidden)
        errors[f"{entry} d_weight"] = _error(d_weight, r_weight[mine])

    sparse = sparse_log_probs(local[0], local[1], queries[0], **options)
    errors["logp"] = _error(sparse.logp_TK.detach(), oracle[0].logp_TK.detach())
    errors["lse"] = _error(sparse.lse_T.detach(), oracle[0].lse_T.detach())
    if sparse.log_residual_T is not None and oracle[0].log_residual_T is not None:
        got, wanted = sparse.log_residual_T.detach(), oracle[0].log_residual_T.detach()
        same = torch.where(got == wanted, 0.0, got - wanted)  # -inf where every id is listed
        errors["log_residual"] = _error(same, torch.zeros_like(same))
        if "gap" in case:
            assert wanted.max() < -27.0, "the case is meant to reach 1e-12"
    compare("recompute", functional(sparse, everything).sum(), functional(oracle[0], everything).sum())
    loss, aux_M = fused_token_loss(local[0], local[1], queries, both, **options)
    reference_T, reference_aux_TM = both(oracle, everything)
    errors["aux"] = _error(aux_M, reference_aux_TM.detach().sum(0))
    compare("fused", loss, reference_T.sum())
    return errors


def check_differences() -> float:
    """Largest relative error of d_hidden and d_weight of both entry points along random directions."""
    generator = torch.Generator().manual_seed(11)
    hidden_TH = torch.randn(6, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator) * 0.3
    query = Query(torch.randint(VOCAB, (6, 4), generator=generator), 1.5, residual=True)

    def value(result: SparseLogProbs) -> Tensor:
        assert result.log_residual_T is not None
        return result.logp_TK.square().sum(1) + result.lse_T.sin() + result.log_residual_T.exp()

    def recompute(hidden: Tensor, weight: Tensor) -> Tensor:
        return value(sparse_log_probs(hidden, weight, query, vocab_size=VOCAB, softcap=4.0, chunk_tokens=4)).sum()

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_token_loss(
            hidden, weight, [query], lambda results, _: (value(results[0]), results[0].logp_TK[:, :0]),
            vocab_size=VOCAB, softcap=4.0, chunk_tokens=4,
        )[0]  # fmt: skip

    worst = 0.0
    for entry in (recompute, fused):
        inputs = [hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
        grads = torch.autograd.grad(entry(*inputs), inputs)
        for which in (0, 1):
            for _ in range(4):
                step = torch.randn(inputs[which].shape, dtype=torch.float64, generator=generator)
                step *= 1e-5 / step.norm()
                up, down = [x.detach() for x in inputs], [x.detach() for x in inputs]
                up[which], down[which] = up[which] + step, down[which] - step
                slope = (entry(*up) - entry(*down)) / 2
                exact = (grads[which] * step).sum()
                worst = max(worst, float((slope - exact).abs() / max(exact.abs(), step.norm())))
    return worst


def _dense(hidden_TH: Tensor, weight_VH: Tensor, query: Query, softcap: float | None) -> SparseLogProbs:
    logits_TV = hidden_TH @ weight_VH.t()
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logp_TV = (logits_TV / query.temperature).log_softmax(1)
    listed = torch.zeros(len(logits_TV), len(weight_VH) + 1, dtype=torch.bool)
    listed = listed.scatter(1, torch.where(query.ids_TK >= 0, query.ids_TK, len(weight_VH)), True)[:, :-1]
    logp_TK = torch.where(query.ids_TK >= 0, logp_TV.gather(1, query.ids_TK.clamp(min=0)), 0.0)
    residual_T = logp_TV.masked_fill(listed, -torch.inf).logsumexp(1) if query.residual else None
    return SparseLogProbs(logp_TK, (logits_TV / query.temperature).logsumexp(1), residual_T)


def _error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or not (got.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max()))) if got.numel() else 0.0


def run_cases(out: Path) -> None:
    """Worker under torchrun: all cases on this rank."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    _head.BLOCK_BYTES["cpu"] = 128 * HIDDEN * 8  # several blocks a rank, at this small vocabulary too
    errors = {case["name"]: check_case(case, group) for case in CASES}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


def exactness(ranks: int) -> dict[str, float]:
    """Worst error of each case over ranks and quantities."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, __file__, folder], check=True, env=environment)
        reports = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {name: max(max(report[name].values()) for report in reports) for name in reports[0]}


if __name__ == "__main__":  # a rank of `exactness`
    run_cases(Path(sys.argv[1]))
