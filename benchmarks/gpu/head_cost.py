"""Time and memory of the head at a large vocabulary: dense torch, this project's entry points, Liger where it is there.

Memory is the most that is held during forward and backward beyond the inputs and the two returned gradients.

Shape suffixes: T tokens, H hidden size, V vocabulary, K ids of a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from head import ARMS, STEPS
from torch import Tensor

from gpu.job import Job
from gpu.report import Report

REAL, TINY = (8192, 151_936, 4096), (64, 1003, 48)  # T, V, H
TOP_K = 10
LOSS, GRADIENT = 2e-3, 3e-2  # relative to dense torch, whose logits are rounded to bf16
MIB = 1 << 20
Step = Callable[[Tensor, Tensor], Tensor]


def steps(tokens: int, vocab: int, hidden: int, device: torch.device) -> dict[str, Step]:
    """Arm -> loss of hidden states and weight. The arms' names end with their loss."""
    labels_T = torch.randint(vocab, (tokens,), device=device)
    row = (torch.randint(vocab, (tokens, TOP_K), device=device), torch.rand(tokens, TOP_K, device=device).softmax(1))
    teacher = _inputs(tokens, vocab, hidden, device)

    def arm(name: str) -> Step:
        beside = teacher if name.endswith("kl") else row
        return lambda hidden_TH, weight_VH: STEPS[name](hidden_TH, weight_VH, labels_T, *beside, None)

    found = {name: arm(name) for name in ARMS}
    if importlib.util.find_spec("liger_kernel") is not None and device.type == "cuda":
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-ce"] = lambda hidden_TH, weight_VH: liger(weight_VH, hidden_TH, labels_T)
    return found


def _inputs(tokens: int, vocab: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return torch.randn(tokens, hidden, **settings), torch.randn(vocab, hidden, **settings) * (2 / hidden**0.5)


def measure(report: Report, job: Job) -> None:
    card, (tokens, vocab, hidden) = job.card, job.size(REAL, TINY)
    torch.manual_seed(0)
    inputs = tuple(tensor.requires_grad_() for tensor in _inputs(tokens, vocab, hidden, card.device))
    dense: dict[str, tuple[Tensor, Tensor]] = {}  # loss -> dense torch's value and gradient of the hidden states
    costs: dict[str, tuple[float, float]] = {}
    arms = steps(tokens, vocab, hidden, card.device)
    for name, step in arms.items():
        with report.case(name):
            try:
                value, slope, mib = once(job, step, *inputs)
                if job.real:
                    costs[name] = (card.seconds(partial(forward_backward, step, *inputs), repeats=5), mib)
            except torch.OutOfMemoryError:
                if not name.startswith("dense"):
                    raise
                report.measured(name, "out of memory")
                continue
            finally:
                card.free()
            compare(report, name, (value, slope), dense)
            tell(report, job, name, costs)
    if "liger-ce" not in arms:
        report.not_measured("liger-ce", "liger_kernel is not installed" if card.is_gpu else job.why_not)


def forward_backward(step: Step, hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    hidden_TH.grad = weight_VH.grad = None
    loss = step(hidden_TH, weight_VH)
    loss.backward()
    return loss.detach()


def once(job: Job, step: Step, hidden_TH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor, float]:
    """The loss, the gradient of the hidden states, and MiB beyond what comes back."""
    hidden_TH.grad = weight_VH.grad = None
    job.card.free()
    before = job.card.held()
    loss = forward_backward(step, hidden_TH, weight_VH)
    extra = job.card.most() - before - hidden_TH.nbytes - weight_VH.nbytes
    assert hidden_TH.grad is not None
    return loss, hidden_TH.grad.clone(), extra / MIB


def compare(report: Report, name: str, found: tuple[Tensor, Tensor], dense: dict[str, tuple[Tensor, Tensor]]) -> None:
    loss = name.rsplit("-", 1)[1]
    if name.startswith("dense"):
        dense[loss] = found
    elif loss in dense:
        for what, ours, theirs, allowed in zip(("loss", "gradient"), found, dense[loss], (LOSS, GRADIENT), strict=True):
            apart = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            report.compare(f"{name}: {what} beside dense", apart.item(), allowed, "relative")


def tell(report: Report, job: Job, name: str, costs: dict[str, tuple[float, float]]) -> None:
    if name not in costs:
        report.not_measured(f"{name}: time and memory", job.why_not)
        return
    (seconds, mib), base = costs[name], costs.get("dense-" + name.rsplit("-", 1)[1])
    beside = "" if base is None else f" ({seconds / base[0]:.3f} of dense)"
    report.measured(f"{name}: time", f"{1000 * seconds:.1f} ms{beside}", details=seconds)
    beside = "" if base is None else f" ({mib / base[1]:.4f} of dense)"
    report.measured(f"{name}: memory", f"{mib:.0f} MiB{beside}", details=mib)
