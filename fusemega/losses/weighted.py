"""Weights over the sources of a prompt's responses (FuseRL, arXiv:2504.06562): softmax(reward / alpha).

`alpha: auto` is the mean over the prompts of the standard deviation of the rewards that are weighted. The paper does
not publish its alpha; this is the project's choice.

Shape suffixes: C comparisons of a micro-batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator

from fusemega.errors import UserError
from fusemega.losses.preference import Preference, metric_name
from fusemega.losses.reference import Reference
from fusemega.losses.responses import softmax_weights
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.console import say
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample


def _positive(alpha: float | str) -> float | str:
    if not isinstance(alpha, str) and alpha <= 0:
        raise ValueError("has to be greater than 0, or auto")
    return alpha


Alpha = Annotated[float | Literal["auto"], AfterValidator(_positive)]
"""The temperature of the weights in a run file."""


class Weighted(Preference):
    """A loss whose comparisons are weighted by softmax(reward / alpha) over the sources.

    Args:
        alpha: as in the run file.
    """

    numbers: ClassVar[tuple[str, ...]] = ("source",)

    def __init__(self, alpha: float | str, reference: Reference | None) -> None:
        super().__init__(reference)
        # `auto` is measured once, on the training data; held-out data are weighted alike.
        self._alpha = None if alpha == "auto" else float(alpha)

    def check_data(self, dataset: TokenizedDataset) -> None:
        if self._alpha is None:
            groups = ([dataset[i] for i in dataset.unit(unit)] for unit in range(dataset.num_units))
            spreads = [float(np.std(rewards)) for rewards in map(self.weighed, groups) if len(rewards)]
            self._alpha = float(np.mean(spreads)) if spreads else 0.0
            if self._alpha <= 0:
                raise UserError("objective.alpha: auto is 0, because each row's rewards are equal; allowed: a number")
            say(f"objective.alpha: auto is {self._alpha:.4g}")
        super().check_data(dataset)
        names = (f"weights/{metric_name(source)}" for source in self.sources)
        self.measures = tuple(dict.fromkeys((*self.measures, *names)))

    @abstractmethod
    def weighed(self, samples: Sequence[Sample]) -> np.ndarray:
        """The rewards of a group that the softmax is over."""

    def weights(self, rewards: np.ndarray) -> list[float]:
        """softmax(rewards / alpha)."""
        assert self._alpha is not None, "check_data comes first"
        return [float(weight) for weight in softmax_weights(rewards, self._alpha)]

    def measured(self, batch: MicroBatch) -> dict[str, tuple[float, float]]:
        """Also the mean weight of each source, over the prompts: 0 where it has no response."""
        share_C, source_C = batch.comparison_fields["share"], batch.comparison_fields["source"]
        count = float(share_C.sum())
        sums: dict[str, float] = defaultdict(float)
        for number, source in enumerate(self.sources):  # two names may be one metric
            sums[f"weights/{metric_name(source)}"] += float(share_C[source_C == number].sum())
        return super().measured(batch) | {name: (value, count) for name, value in sums.items()}
