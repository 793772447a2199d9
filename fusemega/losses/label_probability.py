"""Metrics of distillation: how probable the teacher makes the label, by kind of position.

They are known on the host when a batch is built, and are counted there. `label-prob KIND` is the mean over the step's
taught positions of that kind (`fusemega.align.position_kinds`), `position-share KIND` their share of all taught ones.

Shape suffixes: P supervised positions of a sample, N of a micro-batch, C kinds of positions.
"""

from __future__ import annotations

import numpy as np
import torch

from fusemega.align.position_kinds import EQUAL, POSITION_KINDS
from fusemega.fusion.evidence import kinds_taught, probability_of
from fusemega.fusion.targets import Targets
from fusemega.passes.micro_batch import MicroBatch

LABEL_PROB, POSITION_SHARE = "label-prob", "position-share"


def measures_of(mapped: bool) -> tuple[str, ...]:
    """Names of the metrics.

    Args:
        mapped: whether any teacher has another tokenizer; otherwise all positions are equal.

    >>> measures_of(False)
    ('label-prob equal',)
    """
    names = [name.replace(" ", "-") for name in (POSITION_KINDS if mapped else POSITION_KINDS[EQUAL : EQUAL + 1])]
    return tuple(f"{what} {name}" for what in (LABEL_PROB, POSITION_SHARE)[: 1 + mapped] for name in names)


def label_fields(targets: Targets, ids_P: np.ndarray) -> dict[str, np.ndarray]:
    """Position fields: teacher_kind int8 [P], -1 where no row teaches, and label_prob fp32 [P].

    Args:
        ids_P: the labels, or what stands for their cells, in the ids of `targets`.
    """
    return {
        "teacher_kind": kinds_taught(targets),
        "label_prob": probability_of(targets, ids_P).astype(np.float32),
    }


def measured(batch: MicroBatch, mapped: bool) -> dict[str, tuple[float, float]]:
    """Sum and count of each metric over a micro-batch in host memory."""
    kind_N, p_N = batch.position_fields["teacher_kind"], batch.position_fields["label_prob"].double()
    taught_N = kind_N >= 0
    kind_N, p_N = kind_N[taught_N].long(), p_N[taught_N]
    sum_C = torch.bincount(kind_N, weights=p_N, minlength=len(POSITION_KINDS)).tolist()
    count_C = torch.bincount(kind_N, minlength=len(POSITION_KINDS)).tolist()
    found = list(zip(sum_C, count_C, strict=True)) + [(count, len(kind_N)) for count in count_C]
    return dict(zip(measures_of(mapped), found if mapped else found[:1], strict=True))
