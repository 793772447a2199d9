"""WRPO: weighted-reward preference optimisation (Yang et al., arXiv:2412.03187): a source's response beside one's own.

With r(y) = beta (log pi(y|x) - log pi_ref(y|x)), summed over tokens, of the best response of any source model (ws), and
of the best (wt) and the worst (l) of the target model's own samples:

    sigmoid   - log sigmoid(alpha r(ws) + (1 - alpha) r(wt) - r(l))                                     (the paper's)
    simpo     the same with r(y) = beta log pi(y) / |y|, minus gamma = gamma_beta_ratio beta inside the sigmoid
    ipo       (alpha h(ws) + (1 - alpha) h(wt) - h(l) - 1 / (2 beta))^2  with h = r / beta

The last two are this project's reading of the paper's variants. The paper moves from the target's to the sources'
responses: with `schedule: linear`, alpha = `alpha` t / T in the update after t of T, as in the published code.

A group of responses gives the triple by source and reward: `target` names the target's own samples. Without it, a group
is the triple itself, in the order ws, wt, l.

Shape suffixes: S sequences of a micro-batch, C triples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fusemega.errors import UserError, nearest
from fusemega.losses.preference import Preference, kl_of, needed_with, only_with, smoothed, tokens_of, total
from fusemega.losses.reference import Reference, ReferenceSettings
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.losses.responses import ResponseComparison, best_and_worst, by_source, rewards_of
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer

OF_TRIPLES = ("rewards/chosen_source", "rewards/chosen_target")


class WRPOSettings(ObjectiveSettings):
    """The `objective` section of `wrpo`."""

    name: Literal["wrpo"] = "wrpo"
    loss_type: Literal["sigmoid", "simpo", "ipo"] = Field("sigmoid", description="form of the loss")
    beta: float = Field(0.01, gt=0, description="strength of the tie to the reference; of simpo the factor")
    alpha: float = Field(0.1, ge=0, le=1, description="weight of the source's response; with linear at the run's end")
    schedule: Literal["linear", "constant"] = Field("linear", description="linear: alpha rises from 0 with the updates")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a preference is reversed; for sigmoid and simpo"
    )
    gamma_beta_ratio: float | None = Field(
        None, ge=0, validate_default=True, description="for simpo: target margin over beta"
    )
    target: str | None = Field(
        None,
        description="`source` of the target's own samples; left out: each group is (best of the sources, best of the "
        "target, worst of the target)",
    )
    reference: ReferenceSettings | None = Field(None, validate_default=True)

    @field_validator("label_smoothing")
    @classmethod
    def _smoothing_of_sigmoids(cls, value: float, info: ValidationInfo) -> float:
        return float(only_with(value, info, "sigmoid", "simpo"))

    @field_validator("gamma_beta_ratio")
    @classmethod
    def _gamma_of_simpo(cls, value: float | None, info: ValidationInfo) -> float | None:
        return needed_with(value, info, "simpo")

    @field_validator("reference")
    @classmethod
    def _reference_of_ratios(cls, value: ReferenceSettings | None, info: ValidationInfo) -> ReferenceSettings | None:
        return needed_with(value, info, "sigmoid", "ipo")


@register("wrpo")
class WRPO(Preference):
    """Mean over the triples of the global batch.

    Of its metrics, `rewards/chosen` is the weighted reward, and `logps/chosen` that of the target's best response.
    """

    Settings = WRPOSettings
    terms = ("wrpo",)
    size = 3
    chosen, rejected = 1, 2
    needs = "a source's response and two of the target with different rewards"

    def __init__(self, settings: WRPOSettings, reference: Reference | None) -> None:
        super().__init__(reference)
        self.settings = settings
        self.statistics = (*self.statistics, *OF_TRIPLES)
        self.measures = (*self.measures, "alpha")
        self.alpha = 0.0 if settings.schedule == "linear" else settings.alpha
        self._target: int | None = None

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> WRPO:
        return cls(settings, None if settings.reference is None else Reference(settings.reference, tokenizer))

    def check_data(self, dataset: TokenizedDataset) -> None:
        name = self.settings.target
        if name is not None:
            if name not in dataset.sources:
                raise UserError(
                    f"{dataset[0].source.rpartition(':')[0]}: no response has the source {name!r} of objective.target"
                    f"{nearest(name, dataset.sources)}; found: {', '.join(dataset.sources) or 'none'}"
                )
            self._target = dataset.sources.index(name)
        super().check_data(dataset)

    def begin_step(self, iteration: int, train_iters: int) -> None:
        if self.settings.schedule == "linear":
            self.alpha = self.settings.alpha * iteration / train_iters

    def compare(self, samples: Sequence[Sample]) -> list[ResponseComparison]:
        if self._target is None:
            if len(samples) != 3:
                raise UserError(
                    f"{samples[0].source}: wrpo without objective.target takes groups of three responses (best of the "
                    f"sources, best of the target, worst of the target), found {len(samples)}"
                )
            return [ResponseComparison((0, 1, 2))]
        rewards, sources = rewards_of(samples), by_source(samples)
        own = sources.pop(self._target, [])
        others = [place for places in sources.values() for place in places]
        found = best_and_worst(rewards, own) if own else None
        if found is None or not others:
            return []
        return [ResponseComparison((max(sorted(others), key=lambda i: rewards[i]), *found))]

    def measured(self, batch: MicroBatch) -> dict[str, tuple[float, float]]:
        count = len(batch.members)
        return super().measured(batch) | {"alpha": (self.alpha * count, float(count))}

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, tokens_S = self.settings, tokens_of(batch, output)
        if self.reference is None:
            h_S = logp_S = output / tokens_S
            told_kl: dict[str, Tensor] = {}
        else:
            h_S, logp_S = output - self.reference.logp(batch), output
            told_kl = self.told_kl(batch, kl_of(h_S, tokens_S), 3)
        source_C, target_C, rejected_C = h_S[batch.members].unbind(1)
        chosen_C = self.alpha * source_C + (1 - self.alpha) * target_C
        difference_C = chosen_C - rejected_C
        if settings.loss_type == "ipo":
            loss_C = (difference_C - 1 / (2 * settings.beta)) ** 2
        else:
            gamma = settings.gamma_beta_ratio or 0.0
            loss_C = smoothed(settings.beta * (difference_C - gamma), settings.label_smoothing)
        loss, summed = total(batch, loss_C, denominators["wrpo"])
        told = self.told(batch, settings.beta * h_S, logp_S) | told_kl
        told["rewards/chosen"] = settings.beta * chosen_C.detach().sum()
        told["rewards/margins"] = settings.beta * difference_C.detach().sum()
        told["rewards/accuracies"] = (difference_C.detach() > 0).sum()
        of_both = (settings.beta * each_C.detach().sum() for each_C in (source_C, target_C))
        return loss, {"wrpo": summed, **told, **dict(zip(OF_TRIPLES, of_both, strict=True))}
