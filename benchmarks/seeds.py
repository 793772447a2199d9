"""One measure over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> Any:
    """Of one seed its value; of several the mean, and the distance between the lowest and the highest."""
    if len(values) == 1:
        return round(values[0], 4)
    return {"mean": round(statistics.fmean(values), 4), "range": round(max(values) - min(values), 4)}
