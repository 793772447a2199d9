"""What the proxy decides for one request: the mode, by the user's own choice, the model's suffix, or the switcher.

NAME              the switcher, with its threshold
NAME:tau=0.1      the switcher, with this threshold
NAME:short, NAME:long    this mode
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusemega.runtime.console import warn
from fusemega.switch.families import LONG, MODES, users_choice
from fusemega.switch.modes import Modes
from fusemega.switch.prefill import Prefill
from fusemega.switch.switcher import Switcher

BY_SWITCHER, BY_REQUEST, BY_MODEL, BY_FAILURE, BY_OTHER = "switcher", "request", "model", "failure", "other_model"
DECIDERS = (BY_SWITCHER, BY_REQUEST, BY_MODEL, BY_FAILURE, BY_OTHER)


class BadRequest(Exception):
    """A request that the proxy refuses.

    Attributes:
        param: the field that is wrong.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        mode: `short` or `long`; "request": what the request says itself.
        by: one of `DECIDERS`.
        score: by how much more often the long mode is expected to be right; None: nobody asked the switcher.
        threshold: that the score was compared with.
        body: the request to be sent.
    """

    mode: str
    by: str
    score: float | None
    threshold: float | None
    body: Mapping[str, Any]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer tells of it."""
        told = [(b"x-fusemega-mode", self.mode.encode())]
        if self.score is not None and self.threshold is not None:
            told.append((b"x-fusemega-score", f"{self.score:.4f}".encode()))
            told.append((b"x-fusemega-threshold", f"{self.threshold:g}".encode()))
        return told


class Decider:
    """Decides requests.

    Args:
        switcher, modes, prefill: of the model.
        model: its name on the upstream.
        threshold: in place of the switcher's.
        seconds: after which a decision is given up.
    """

    def __init__(
        self,
        switcher: Switcher,
        modes: Modes,
        prefill: Prefill,
        model: str,
        threshold: float | None = None,
        seconds: float = 5.0,
    ) -> None:
        self._switcher, self._modes, self._prefill, self._model = switcher, modes, prefill, model
        self._threshold = switcher.config.threshold if threshold is None else threshold
        self._seconds = seconds
        self._told: set[str] = set()

    async def decide(self, body: Mapping[str, Any]) -> Decision:
        """The decision for a chat completion request.

        Raises:
            BadRequest: the model's suffix is none.
        """
        name, mode, threshold = self._named(body.get("model"))
        if name != self._model:
            return Decision("request", BY_OTHER, None, None, body)
        body = {**body, "model": name}
        if users_choice(body, self._modes.family) is not None:
            return Decision("request", BY_REQUEST, None, None, body)
        if mode is not None:
            return Decision(mode, BY_MODEL, None, None, self._modes.request(body, mode))
        try:
            scores = await asyncio.wait_for(self._scores(body["messages"]), self._seconds)
        except Exception as error:  # the answer matters more than its cost
            self._tell(error)
            return Decision(LONG, BY_FAILURE, None, None, self._modes.request(body, LONG))
        gain = float(scores[1] - scores[0])
        chosen = self._switcher.mode(scores, threshold)
        return Decision(chosen, BY_SWITCHER, gain, threshold, self._modes.request(body, chosen))

    async def _scores(self, messages: Any) -> np.ndarray:
        """[M]: what the switcher expects of both modes."""
        # Rendering asks another process, so it is not done in the loop's thread.
        ids = await asyncio.to_thread(self._modes.prefill, messages, "of a request")
        found: np.ndarray = self._switcher.scores((await self._prefill.features(ids))[None])[0]
        return found

    def _named(self, given: Any) -> tuple[str, str | None, float]:
        """The model's own name, a mode, and a threshold."""
        name = given if isinstance(given, str) and given else self._model
        base, colon, suffix = name.rpartition(":")
        if name == self._model or not colon or base != self._model:
            return name, None, self._threshold
        if suffix in MODES:
            return base, suffix, self._threshold
        word, _, value = suffix.partition("=")
        try:
            threshold = float(value) if word == "tau" else None
        except ValueError:
            threshold = None
        if threshold is None or not -1 <= threshold <= 1:
            raise BadRequest(
                f"model: {base} with the suffix {suffix!r}; allowed: {base}, {base}:short, {base}:long, and "
                f"{base}:tau=X with X from -1 (always long) to 1 (always short)",
                "model",
            )
        return base, None, threshold

    def _tell(self, error: Exception) -> None:
        """Says each kind of failure once; all are counted."""
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            warn(f"the switcher failed ({kind}: {reason}); the long mode is taken. More of this kind are only counted")
