"""Combines several teachers' distributions of one sample into one.

A teacher's reward on a sample is exp(-CE), where CE is its cross-entropy on the sample's supervised tokens.

* `min_ce` (FuseLLM, arXiv:2401.10491; FuseChat, arXiv:2402.16107): the targets of the teacher with the largest reward,
  so the smallest cross-entropy; ties go to the first.
* `avg_ce` (FuseLLM, src/utils/trainer.py): sum_j w_j P_j, where w is the softmax of the rewards over the teachers; one
  set of weights for each sample.
* `blend`: sum_j w_jt P_jt, where w_jt is proportional to the probability P_jt(y_t) that teacher j gives to the label
  y_t of position t: by Bayes' rule, the evidence of the label for each teacher. This project's own method.

Both papers divide cross-entropies by the number of tokens of each model's own tokenizer. This favours tokenizers with
shorter tokens, which are more for the same text and easier to predict. A byte is the same for all tokenizers. Both
papers compare in bf16, whose 8 bits distinguish rewards that differ by 0.4 % or more.

Shape suffixes: J teachers, P positions, K listed ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fusemega.fusion.evidence import probability_of
from fusemega.fusion.targets import Targets, mixture

FusionFunction = Callable[[Sequence[Targets], np.ndarray, np.ndarray], Targets]


def rewards(ce_J: np.ndarray, bf16: bool) -> np.ndarray:
    """exp(-CE), fp64 [J], of cross-entropies in nats; `bf16`: with the rounding of the published code.

    In bf16, two close cross-entropies become a tie:

    >>> ce = np.array([1.0, 0.999])
    >>> int(rewards(ce, bf16=False).argmax()), int(rewards(ce, bf16=True).argmax())
    (1, 0)
    """
    if not bf16:
        return np.exp(-np.asarray(ce_J, dtype=np.float64))
    return torch.exp(-torch.as_tensor(ce_J).bfloat16()).double().numpy()


def min_ce(parts: Sequence[Targets], rewards_J: np.ndarray, labels_P: np.ndarray) -> Targets:
    """The targets of the teacher with the largest reward."""
    return parts[int(np.argmax(rewards_J))]


def avg_ce(parts: Sequence[Targets], rewards_J: np.ndarray, labels_P: np.ndarray) -> Targets:
    """The mixture with weights softmax(rewards)."""
    weights_J = np.exp(rewards_J) / np.exp(rewards_J).sum()
    return mixture(parts, np.repeat(weights_J[:, None], len(labels_P), axis=1))


def blend(parts: Sequence[Targets], rewards_J: np.ndarray, labels_P: np.ndarray) -> Targets:
    """The mixture with weights P_j(label), `labels_P` int64. If no teacher lists the label, all weights are equal."""
    listed_JP = np.stack([probability_of(part, labels_P) for part in parts])
    return mixture(parts, np.where(listed_JP.sum(0) > 0, listed_JP, 1.0))


FUNCTIONS: dict[str, FusionFunction] = {"min_ce": min_ce, "avg_ce": avg_ce, "blend": blend}
