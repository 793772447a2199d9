"""What a masked model's final hidden states cost: the cross-entropy on the calibration tokens.

Shape suffixes: N supervised positions of a row, H hidden size.
"""

from __future__ import annotations

import math

import torch

from fusemega.logits.bf16_reference import bf16_cross_entropy
from fusemega.logits.vocab import Query, sparse_log_probs
from fusemega.models.build import GPT
from fusemega.passes.forward import hidden_states
from fusemega.prune.masked_runs import Cost
from fusemega.prune.run_file import CrossEntropy
from fusemega.prune.stage import CalibrationRow
from fusemega.runtime.parallel import World


def cross_entropy(gpt: GPT, world: World, ce: CrossEntropy) -> Cost:
    """The sum of a row's cross-entropies, nats."""

    def fp32(hidden_NH: torch.Tensor, row: CalibrationRow, _: int) -> torch.Tensor:
        own = hidden_states(gpt, hidden_NH, world)
        found = sparse_log_probs(own.hidden_NH, own.weight_VH, Query(row.batch.labels[:, None]), **own.head)
        return -found.logp_TK.double().sum()

    def bf16(hidden_NH: torch.Tensor, row: CalibrationRow, _: int) -> torch.Tensor:
        weight_VH = gpt.head.weight[: gpt.vocab_size]
        return bf16_cross_entropy(hidden_NH, weight_VH, row.batch.labels, gpt.head.softcap)

    return fp32 if ce == "fp32" else bf16


def perplexity(cost: float, tokens: int) -> float:
    """exp of the mean cross-entropy; windows of one length, as in the authors' code, weigh alike."""
    return math.exp(min(cost / tokens, 700.0))  # math.exp raises OverflowError above 709
