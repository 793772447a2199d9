"""Values that jump: compared with the median of the last ones, which a jump does not move."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_WINDOW, _LEAST = 100, 20  # values that are remembered, and those that are needed


class Spikes:
    """Watches one quantity. A spike is said once, however many steps it lasts.

    A value is a spike when it lies above the median of the last 100 values by more than `factor` usual deviations: the
    median distance from the median, as a standard deviation, and at least a part of the median.

    Args:
        name: what is watched, for the line.
        factor: how many deviations.
        least: the least deviation, as a part of the median.

    Example:
        >>> loss = Spikes("lm loss", 10)
        >>> [loss.see(i, value) for i, value in enumerate([2.0] * 30 + [9.0, 9.0, 2.0])][29:]
        [None, 'lm loss 9 at iteration 30, after a median of 2: a spike', None, None]
    """

    def __init__(self, name: str, factor: float, least: float = 0.02) -> None:
        self._name, self._factor, self._part = name, factor, least
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._inside = False

    def see(self, iteration: int, value: float) -> str | None:
        """What is to be said of this value, if anything."""
        line = None
        if len(self._last) >= _LEAST:
            middle = median(self._last)
            usual = max(1.4826 * median(abs(x - middle) for x in self._last), self._part * abs(middle))
            is_spike = not math.isfinite(value) or value > middle + self._factor * usual
            if is_spike and not self._inside:
                line = f"{self._name} {value:.4g} at iteration {iteration}, after a median of {middle:.4g}: a spike"
            self._inside = is_spike
        if math.isfinite(value):
            self._last.append(value)
        return line
