"""A reward model from pairs (Bradley and Terry, 1952; as in Ouyang et al., 2022, arXiv:2203.02155, section 3.5).

    L = 1/B_global sum_b w_b (- log sigmoid(r(x, y_w) - r(x, y_l) - m_b) + c (r(x, y_w) + r(x, y_l))^2)

with m the margin (Touvron et al., 2023, arXiv:2307.09288, section 3.2.2), c the coefficient that centres the rewards
around 0 (Eisenstein et al., 2023, arXiv:2312.09244, section 2.2), and w the row's weight, 1 if it has none. B counts
the pairs. Options and metrics have TRL's names; metrics are means without the weights.

Shape suffixes: C pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusemega.errors import UserError
from fusemega.losses.preference import Preference, total
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.losses.responses import ResponseComparison, pair_of
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import Sample

if TYPE_CHECKING:
    from fusemega.text.tokenizer import Tokenizer


@register("reward")
class Reward(Preference):
    """A reward model: -log sigmoid of the difference of a pair's scores (Bradley-Terry), mean over the pairs.

    Of scored responses the best and the worst are the pair. The model has a scalar head; a language model's folder gets
    a new one, drawn from `training.seed`.
    """

    class Settings(ObjectiveSettings):
        name: Literal["reward"] = "reward"
        margin: float | Literal["rows"] | None = Field(
            None, description="difference that is asked of a pair's rewards: a number, or rows: each row's own `margin`"
        )
        center_rewards_coefficient: float = Field(
            0.0, ge=0, description="weight of the squared sum of a pair's rewards, which keeps them around 0"
        )

    wants = "score"
    numbers = ("margin",)
    reads_margin = True

    def __init__(self, settings: Reward.Settings) -> None:
        super().__init__(None)
        self.settings = settings
        self.terms = ("reward", "center") if settings.center_rewards_coefficient else ("reward",)
        self.statistics = ("accuracy", "margin", "mean_reward")

    @classmethod
    def build(cls, settings: Reward.Settings, tokenizer: Tokenizer, vocab_size: int) -> Reward:
        return cls(settings)

    def compare(self, samples: Sequence[Sample]) -> list[ResponseComparison]:
        """The pair with its margin."""
        given, asked = samples[0].scalars.get("margin"), self.settings.margin
        if asked == "rows" and given is None:
            raise UserError(f"{samples[0].source}: the row has no margin, and objective.margin is rows")
        if asked is None and given is not None:
            raise UserError(
                f"{samples[0].source}: the row has a margin, and objective.margin is not set; allowed: rows, or a "
                "number, which takes the place of the rows' margins (0: none)"
            )
        margin = given if asked == "rows" else asked
        return [replace(pair, numbers={"margin": margin or 0.0}) for pair in pair_of(samples)]

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen_C, rejected_C = output[batch.members].unbind(1)
        difference_C, both_C = chosen_C - rejected_C, chosen_C + rejected_C
        margin_C = batch.comparison_fields["margin"].to(output.dtype)
        loss, summed = total(batch, -logsigmoid(difference_C - margin_C), denominators["reward"])
        sums = {"reward": summed}
        if "center" in self.terms:
            center, sums["center"] = total(batch, both_C.square(), denominators["center"])
            loss = loss + self.settings.center_rewards_coefficient * center
        told = ((difference_C > 0).double().sum(), difference_C.detach().sum(), both_C.detach().sum() / 2)
        return loss, sums | dict(zip(self.statistics, told, strict=True))
