"""What losses over responses to one prompt share: comparisons in a batch, counts, checks, metrics by TRL's names.

    L = 1/B_global sum_b weight_b sum_c share_c l_c

over the comparisons c of group b, whose shares sum to 1. B counts the groups (prompts) that have a comparison. A row's
weight multiplies its part and is no part of B. Metrics are means over the same groups, without the rows' weights.

KL(pi, pi_ref) of a response y of |y| tokens is estimated by k3 (Schulman, "Approximating KL divergence", 2020) of the
mean token: with d = log pi(y) - log pi_ref(y),

    kl(y) = |y| (exp(-d / |y|) - 1 + d / |y|)

in nats a response. It needs only sums, is never negative, and by convexity is at most the sum of k3 over the tokens. k3
of the whole sequence, exp(-d) - 1 + d, would overflow at the d of a long response.

Shape suffixes: S sequences of a micro-batch, C comparisons, K sequences of each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import ValidationInfo
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusemega.errors import UserError
from fusemega.losses.reference import Reference
from fusemega.losses.registry import Objective
from fusemega.losses.responses import ResponseComparison, pair_of, weight_of
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.console import warn
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample

V = TypeVar("V")

OF_PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics of a pair, by TRL's names."""


class Preference(Objective[Tensor]):
    """A loss over comparisons of responses to one prompt.

    Attributes:
        size: how many responses a comparison has.
        numbers: names of the other numbers that a comparison has.
        chosen, rejected: which of its responses metrics call so; None: metrics do not tell them apart.
        needs: what a group must have to be compared, for messages.
        reads_margin: whether a row's margin is part of the loss.
        sources: names of the data's sources.
    """

    unit = "group"
    size: ClassVar[int] = 2
    numbers: ClassVar[tuple[str, ...]] = ()
    chosen: ClassVar[int | None] = 0
    rejected: ClassVar[int | None] = 1
    needs: ClassVar[str] = "two responses with different rewards"
    reads_margin: ClassVar[bool] = False
    sources: Sequence[str] = ()

    def __init__(self, reference: Reference | None) -> None:
        self.reference = reference
        if self.chosen is not None:
            self.statistics = OF_PAIRS
            self.measures = ("lengths/chosen", "lengths/rejected")
        if reference is not None:
            self.frozen = reference.frozen
            self.statistics = (*self.statistics, "kl")

    def compare(self, samples: Sequence[Sample]) -> list[ResponseComparison]:
        """The comparisons of a group; none, if the group lacks what `needs` says. Unless a subclass says otherwise, its
        pair: see `pair_of`.

        Raises:
            UserError: the row is not one that this loss can be computed on.
        """
        return pair_of(samples)

    def comparisons(self, samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        found, weight = self.compare(samples), weight_of(samples)
        share_C = np.array([each.share for each in found], dtype=np.float64)
        fields = {"share": share_C, "weight": share_C * weight}
        for name in self.numbers:
            fields[name] = np.array([each.numbers[name] for each in found], dtype=np.float64)
        return np.array([each.places for each in found], dtype=np.int64).reshape(-1, self.size), fields

    def sequence_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {} if self.reference is None else self.reference.fields(sample)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        return {} if self.reference is None else {"reference": self.reference.identity(dataset)}

    def check_data(self, dataset: TokenizedDataset) -> None:
        """Refuses rows that `compare` refuses, and, unless `data.on_bad_row` is skip, those without a comparison."""
        if self.reference is not None:
            self.reference.check(dataset)
        self.sources = dataset.sources
        name, counted, total = self.terms[0], Counter[str](), 0.0
        for unit in range(dataset.num_units):
            samples = [dataset[i] for i in dataset.unit(unit)]
            counted["margin"] += any("margin" in sample.scalars for sample in samples)
            if self.compare(samples):
                total += weight_of(samples)
                continue
            if dataset.config.on_bad_row == "error":
                raise UserError(
                    f"{samples[0].source}: objective.name {name} needs {self.needs}, and the row has none; allowed: "
                    "leave the row out, or data.on_bad_row: skip"
                )
            counted["skipped"] += 1
        if not total > 0:
            raise UserError(
                f"data.path: objective.name {name} needs {self.needs} in a row whose weight is not 0; found none in "
                f"{dataset.num_units} rows"
            )
        if counted["skipped"]:
            warn(f"{counted['skipped']} of {dataset.num_units} rows give no loss: each lacks {self.needs}")
        if counted["margin"] and not self.reads_margin:
            warn(f"{counted['margin']} rows have a margin, which objective.name {name} does not read")

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        groups = len(torch.unique(batch.groups[batch.members[:, 0]]))
        return dict.fromkeys(self.terms, groups)

    def measured(self, batch: MicroBatch) -> dict[str, tuple[float, float]]:
        if self.chosen is None or self.rejected is None:
            return {}
        tokens_CK, share_C = batch.sequence_tokens[batch.members].double(), batch.comparison_fields["share"]
        count = float(share_C.sum())
        return {
            f"lengths/{name}": (float((share_C * tokens_CK[:, place]).sum()), count)
            for name, place in (("chosen", self.chosen), ("rejected", self.rejected))
        }

    def told(self, batch: MicroBatch, score_S: Tensor, logp_S: Tensor) -> dict[str, Tensor]:
        """Sums of the metrics `OF_PAIRS`.

        Args:
            score_S: what the loss calls the reward of a sequence.
            logp_S: its log-probability, in the form in which the loss has it.
        """
        share_C = batch.comparison_fields["share"]
        score_CK, logp_CK = score_S.detach()[batch.members].double(), logp_S.detach()[batch.members].double()
        chosen_C, rejected_C = score_CK[:, self.chosen], score_CK[:, self.rejected]
        values = (
            chosen_C,
            rejected_C,
            (chosen_C > rejected_C).double(),
            chosen_C - rejected_C,
            logp_CK[:, self.chosen],
            logp_CK[:, self.rejected],
        )
        return {name: (share_C * value_C).sum() for name, value_C in zip(OF_PAIRS, values, strict=True)}

    def told_kl(self, batch: MicroBatch, kl_S: Tensor, members: int) -> dict[str, Tensor]:
        """The sum of the metric `kl`: the mean over the first `members` responses of each comparison."""
        kl_C = kl_S.detach()[batch.members[:, :members]].double().mean(1)
        return {"kl": (batch.comparison_fields["share"] * kl_C).sum()}


def tokens_of(batch: MicroBatch, logp: Tensor) -> Tensor:
    """[S], in the dtype of `logp`: supervised tokens of each sequence, at least 1."""
    return batch.sequence_tokens.clamp(min=1).to(logp.dtype)


def kl_of(difference_S: Tensor, tokens_S: Tensor) -> Tensor:
    """[S]: the estimate of this module of KL(pi, pi_ref), from log pi - log pi_ref of each sequence."""
    mean_S = difference_S / tokens_S
    return tokens_S * (torch.expm1(-mean_S) + mean_S)


def smoothed(difference: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid, with the preference reversed with probability `label_smoothing` (cDPO, Mitchell, 2023)."""
    loss = -logsigmoid(difference)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-difference)
    return loss


def only_with(value: Any, info: ValidationInfo, *types: str) -> Any:
    """For a setting's validator: refuses a value (not None, not 0) under a `loss_type` that does not read it."""
    found = info.data.get("loss_type")
    if value and found is not None and found not in types:
        raise ValueError(f"no effect with loss_type {found}; allowed: leave it out, or loss_type {', '.join(types)}")
    return value


def needed_with(value: V, info: ValidationInfo, *types: str) -> V:
    """For a setting's validator: asks for a value under these kinds of `loss_type`, and refuses it under others."""
    found = info.data.get("loss_type")
    if value is None:
        if found in types:
            raise ValueError(f"needed with loss_type {found}")
        return value
    only_with(True, info, *types)
    return value


def metric_name(source: str) -> str:
    """The name of a source as a part of a metric's name.

    >>> metric_name("org/model v1 (b*)")
    'org/model v1 (b_)'
    """
    return re.sub(r"[^\w ()./%:-]", "_", source, flags=re.ASCII)[:100]


def total(batch: MicroBatch, loss_C: Tensor, denominator: Tensor | float) -> tuple[Tensor, Tensor]:
    """The loss to differentiate, and the sum for its metric: of the comparisons, with their weights."""
    summed = (batch.comparison_fields["weight"].to(loss_C.dtype) * loss_C).sum()
    return summed / denominator, summed.detach()
