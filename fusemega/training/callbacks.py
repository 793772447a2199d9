"""Callbacks of a training step: evaluation, checkpoints, metrics, profiling. The step itself knows none of them.

A callback is one class in one file, and one entry in the list that `Trainer.callbacks` is made of. They are told of
each event below in the order of that list.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusemega.scoring.evaluation import Evaluation
    from fusemega.scoring.preferences import GroupEvaluation
    from fusemega.training.trainer import Trainer


class Callback:
    """Is told of a run's events. This happens on every rank alike, so every method may be collective. A method that is
    not overridden does nothing.

    Example:
        >>> class Tokens(Callback):
        ...     seen = 0
        ...
        ...     def on_step_end(self, trainer, values):
        ...         self.seen += values["tokens"]
    """

    def on_start(self, trainer: Trainer) -> None:
        """`fit` begins, at `trainer.iteration`."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """The update after `trainer.iteration` begins."""

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        """Update number `trainer.iteration` is done.

        Args:
            values: its metrics, the same on every rank; what is added here is seen by the callbacks after this one.
        """

    def on_evaluate(self, trainer: Trainer, found: Evaluation | GroupEvaluation) -> None:
        """The held-out data were scored after `trainer.iteration` updates."""

    def on_save(self, trainer: Trainer, last: bool) -> None:
        """A checkpoint of `trainer.iteration` is to be written.

        Args:
            last: the run ends, or stops, after it.
        """

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """`fit` ends, in the reverse order of `on_start`; `error`: what ended it, if it did not end well."""

    def wants_save(self, trainer: Trainer) -> bool:
        """Asked after `on_step_end`: whether this iteration is to have a checkpoint."""
        return False

    def wants_end(self, trainer: Trainer) -> bool:
        """Whether the run is finished before its last iteration; also asked before `fit`, of a run that resumed."""
        return False

    def wants_stop(self, trainer: Trainer) -> int:
        """Asked after `on_step_end`, of each rank alone: the number of a signal, if the run is to stop after a
        checkpoint as if that signal had come; else 0. One rank is enough."""
        return 0
