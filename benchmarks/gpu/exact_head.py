"""The vocabulary head on the card against full logits in float64 on the CPU: nats, gradients, chunk sizes, top ids.

The reference has the inputs as the head gets them (rounded to bf16), so an error is that of the head's own arithmetic.

Shape suffixes: T tokens, H hidden size, V vocabulary, K ids of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusemega.logits.divergence import fused_divergence_loss
from fusemega.logits.topk import top_k_log_probs
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss, sparse_log_probs
from gpu.job import Job
from gpu.report import Report

NATS = {torch.float32: 2e-5, torch.bfloat16: 2e-4}
GRADIENTS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative; those of bf16 inputs are rounded to bf16
TOP_K = 10


class Inputs(NamedTuple):
    """Of one head, and of a teacher's beside it, on one device and of one dtype."""

    hidden_TH: Tensor
    weight_VH: Tensor
    teacher_TH: Tensor
    teacher_VH: Tensor
    labels_T: Tensor
    ids_TK: Tensor
    p_TK: Tensor

    def on(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Copies there; hidden states and weight are leaves."""
        wide = [tensor.to(device, dtype) for tensor in self[:4]]
        for leaf in wide[:2]:
            leaf.requires_grad_()
        return Inputs(
            wide[0],
            wide[1],
            wide[2],
            wide[3],
            self.labels_T.to(device),
            self.ids_TK.to(device),
            self.p_TK.to(device, dtype),
        )


def make(tokens: int, vocab: int, hidden: int, device: torch.device) -> Inputs:
    """Logits with a spread of about 3, as those of trained models."""
    source: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **source)

    weights = [normal(vocab, hidden) * 3 / hidden**0.5 for _ in range(2)]
    ids = torch.rand(tokens, vocab, **source).topk(TOP_K).indices
    p_TK = torch.rand(tokens, TOP_K, **source).softmax(1) * 0.9
    labels_T = torch.randint(vocab, (tokens,), **source)
    return Inputs(normal(tokens, hidden), weights[0], normal(tokens, hidden), weights[1], labels_T, ids, p_TK)


def plain(inputs: Inputs) -> dict[str, Tensor]:
    """Log-probabilities of labels and ids, and the three losses, by whole logits."""
    logq_TV = (inputs.hidden_TH @ inputs.weight_VH.t()).log_softmax(1)
    logp_TV = (inputs.teacher_TH @ inputs.teacher_VH.t()).log_softmax(1)
    label_T = logq_TV.gather(1, inputs.labels_T[:, None])[:, 0]
    listed_TK = logq_TV.gather(1, inputs.ids_TK)
    return {
        "logp": torch.cat([label_T[:, None], listed_TK], 1),
        "token loss": -(0.5 * label_T + 0.5 * (inputs.p_TK * listed_TK).sum(1)).sum(),
        "divergence": -0.5 * label_T.sum() + 0.5 * (logp_TV.exp() * (logp_TV - logq_TV)).sum(),
    }


def ours(inputs: Inputs, chunk: int | None) -> dict[str, Tensor]:
    """The same by the head."""
    options: dict[str, Any] = {"vocab_size": len(inputs.weight_VH), "chunk_tokens": chunk}
    query = Query(torch.cat([inputs.labels_T[:, None], inputs.ids_TK], dim=1))
    logp_TK = sparse_log_probs(inputs.hidden_TH, inputs.weight_VH, query, **options).logp_TK

    def loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        label_T, listed_TK = results[0].logp_TK[:, 0], results[1].logp_TK
        return -0.5 * label_T - 0.5 * (inputs.p_TK[rows].float() * listed_TK).sum(1), label_T[:, None]

    queries = [Query(inputs.labels_T[:, None]), Query(inputs.ids_TK)]
    whole = (inputs.hidden_TH, inputs.weight_VH, inputs.teacher_TH, inputs.teacher_VH, inputs.labels_T)
    return {
        "logp": logp_TK,
        "token loss": fused_token_loss(*whole[:2], queries, loss, **options)[0],
        "divergence": fused_divergence_loss(*whole, "forward_kl", label_weight=0.5, divergence_weight=0.5, **options)[
            0
        ],
    }


def gradients(results: dict[str, Tensor], inputs: Inputs, upstream_TK: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """Of the losses, and of the log-probabilities with `upstream_TK`: those of hidden states and weight."""
    return {
        name: torch.autograd.grad(
            value if value.dim() == 0 else (value * upstream_TK.to(value)).sum(),
            inputs[:2],
            retain_graph=True,
        )
        for name, value in results.items()
    }


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance in float64, on the second one's device."""
    wanted = theirs.detach().double()
    return ((ours.detach().to(wanted) - wanted).norm() / wanted.norm()).item()


def measure(report: Report, job: Job) -> None:
    shapes: dict[str, tuple[tuple[int, int, int], tuple[int | None, ...], torch.device]] = {
        "tiny": ((33, 1003, 48), (1, 7, 33, None), torch.device("cpu")),
        # Its reference is on the card too: a CPU would need minutes.
        "V 151,936, H 4,096": (job.size((128, 151_936, 4096), (8, 503, 48)), (32, None), job.card.device),
    }
    for label, (sizes, chunks, device) in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{label}, {str(dtype).removeprefix('torch.')}"
            if label != "tiny" and not job.real:
                report.not_measured(name, job.why_not)
                continue
            with report.case(name):
                compare(report, job, name, make(*sizes, device), dtype, chunks, device)
            job.card.free()


def compare(
    report: Report,
    job: Job,
    name: str,
    given: Inputs,
    dtype: torch.dtype,
    chunks: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Every chunk size of one shape and dtype. The row is of the worst."""
    mine = given.on(job.card.device, dtype)
    reference = Inputs(*(tensor.detach() for tensor in mine)).on(device, torch.float64)
    upstream_TK = torch.randn(len(given.labels_T), 1 + TOP_K, generator=torch.Generator().manual_seed(1))
    wanted = plain(reference)
    slopes = gradients(wanted, reference, upstream_TK.to(device))
    nats, losses, slants = 0.0, 0.0, 0.0
    for chunk in chunks:
        found = ours(mine, chunk)
        nats = max(nats, (found["logp"].detach().to(wanted["logp"]) - wanted["logp"].detach()).abs().max().item())
        losses = max(losses, *(apart(found[loss], wanted[loss]) for loss in ("token loss", "divergence")))
        for key, pair in gradients(found, mine, upstream_TK).items():
            slants = max(slants, *(apart(a, b) for a, b in zip(pair, slopes[key], strict=True)))
    report.compare(f"{name}: log-probabilities", nats, NATS[dtype], "nats")
    report.compare(f"{name}: losses", losses, NATS[dtype], "relative")
    report.compare(f"{name}: gradients", slants, GRADIENTS[dtype], "relative")
    ids_TK = top_k_log_probs(
        mine.hidden_TH.detach(), mine.weight_VH.detach(), TOP_K, mine.labels_T, vocab_size=len(mine.weight_VH)
    )[0]
    logits_TV = (reference.hidden_TH @ reference.weight_VH.t()).detach()
    picked = logits_TV.gather(1, ids_TK.to(device)).sort(1, descending=True).values
    best = logits_TV.topk(TOP_K).values
    report.compare(f"{name}: top {TOP_K}, by their true logits", (best - picked).max().item(), NATS[dtype], "nats")
