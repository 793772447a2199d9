"""A model's log-probabilities of held-out pairs: how often that of the chosen response is the higher one.

Two answers for each pair: by the sum over a response's tokens, which is the probability of the whole response and
favours short ones, and by the mean of a token.

Shape suffixes: S sequences of a micro-batch, C pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fusemega.losses.preference import Preference, tokens_of
from fusemega.losses.registry import ObjectiveSettings
from fusemega.models.build import GPT
from fusemega.passes.batches import RowShape
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.parallel import World
from fusemega.scoring.evaluation import Evaluation, evaluation_of
from fusemega.scoring.preferences import evaluate_groups
from fusemega.text.dataset import TokenizedDataset


class PairsEvaluation(Evaluation):
    """What an evaluation of pairs found; loss, perplexity and bits per byte are over all of their responses.

    Attributes:
        pairs: how many were compared.
        accuracy_sum: share of the pairs whose chosen response has the higher log-probability.
        accuracy_mean: the same by the log-probability of a mean token.
        margin_sum, margin_mean: mean difference, chosen minus rejected, nats.
    """

    pairs: int
    accuracy_sum: float
    accuracy_mean: float
    margin_sum: float
    margin_mean: float


def are_pairs(dataset: TokenizedDataset) -> bool:
    """Whether every row is a pair of a chosen and a rejected response."""
    return all("chosen" in dataset[dataset.unit(i)[0]].scalars for i in range(dataset.num_units))


def evaluate_pairs(gpt: GPT, dataset: TokenizedDataset, shape: RowShape, world: World) -> PairsEvaluation:
    """Score every pair. Leaves the model in evaluation mode. Collective; every rank gets the result."""
    found = evaluate_groups(gpt, dataset, shape, world, _PairScores(None))
    whole = evaluation_of(
        logp=found.metrics["logp"] * found.groups,
        tokens=sum(len(sample.positions) for sample in map(dataset.__getitem__, range(len(dataset)))),
        num_bytes=sum(sample.num_bytes for sample in map(dataset.__getitem__, range(len(dataset)))),
        samples=len(dataset),
    )
    figures = {name: found.metrics[name] for name in _PairScores.statistics if name != "logp"}
    return PairsEvaluation(**whole.model_dump(), pairs=found.groups, **figures)


class _PairSettings(ObjectiveSettings):
    name: Literal["pairs"] = "pairs"


class _PairScores(Preference):
    """No loss to train with: it only counts, in the passes in which held-out groups are scored."""

    Settings = _PairSettings
    terms = ("pairs",)
    statistics = ("logp", *(f"{what}_{by}" for what in ("accuracy", "margin") for by in ("sum", "mean")))

    def __init__(self, reference: None) -> None:
        super().__init__(reference)
        self.statistics = _PairScores.statistics

    @classmethod
    def build(cls, settings: Any, tokenizer: Any, vocab_size: int) -> _PairScores:
        return cls(None)

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logp_S = output.double()
        told = {"logp": logp_S[batch.members].sum()}
        for name, score_S in (("sum", logp_S), ("mean", logp_S / tokens_of(batch, logp_S))):
            chosen_C, rejected_C = score_S[batch.members].unbind(1)
            told[f"accuracy_{name}"] = (chosen_C > rejected_C).double().sum()
            told[f"margin_{name}"] = (chosen_C - rejected_C).sum()
        none = torch.zeros((), dtype=torch.float64, device=output.device)
        return none, {"pairs": none, **told}
