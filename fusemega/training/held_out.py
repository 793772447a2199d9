"""Held-out data, scored while a run trains: before the first update, every so often, and after the last.

Remembers the best evaluation, which ends a run that no longer improves (patience) and picks the checkpoint to keep.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from fusemega.checkpoint.series import STATE
from fusemega.errors import UserError
from fusemega.losses.registry import Objective
from fusemega.runtime.activity import EVALUATION, doing
from fusemega.runtime.console import phase, warn
from fusemega.scoring.evaluation import Evaluation, EvaluationSection, evaluate_model
from fusemega.scoring.preferences import GroupEvaluation, evaluate_groups
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.callbacks import Callback
from fusemega.training.optimizer import complete_parameters
from fusemega.training.trainer import Trainer


@dataclass(frozen=True)
class Best:
    """The evaluation of lowest loss so far.

    Attributes:
        data: which held-out text, by the name of its tokenized form.
        loss: its loss; None before the first evaluation.
        iteration: updates done when it was found.
        evaluations_since: how many evaluations were no better.
    """

    data: str = ""
    loss: float | None = None
    iteration: int = 0
    evaluations_since: int = 0


class HeldOut(Callback):
    """Scores held-out data when it is due.

    Args:
        section: `evaluation` of the run file; None: nothing is ever scored.
        dataset: the data it names.
        content: hash of that data.
        objective: for groups of responses: it has seen the data (`Objective.for_data`). None: text.

    Attributes:
        best: the best evaluation so far.
    """

    def __init__(
        self,
        section: EvaluationSection | None,
        dataset: TokenizedDataset | None,
        content: str,
        objective: Objective[Any] | None = None,
    ) -> None:
        self._section, self._dataset, self._content, self._objective = section, dataset, content, objective
        self.best = Best()

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is kept, and exported at the end."""
        return self._section is not None and self._section.keep_best

    def on_start(self, trainer: Trainer) -> None:
        if trainer.iteration == 0 and self.best.loss is None:
            self._evaluate(trainer)

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        if self._section is not None and trainer.is_due(self._section.interval):
            self._evaluate(trainer)

    def wants_save(self, trainer: Trainer) -> bool:
        return self.keeps_best and self.best.loss is not None and self.best.iteration == trainer.iteration

    def wants_end(self, trainer: Trainer) -> bool:
        patience = None if self._section is None else self._section.patience
        return patience is not None and self.best.evaluations_since >= patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores of it."""
        return asdict(self.best)

    def resume(self, folder: Path, saved: Any, is_main: bool) -> None:
        """Go on from what the checkpoint `folder` stored, if it was about the same text.

        Raises:
            UserError: the state is not one that a run writes.
        """
        best = _best(folder, saved)
        if self._dataset is not None and best.data == self._content:
            self.best = best
        elif self._dataset is not None and best.loss is not None and is_main:
            warn(
                f"{folder.name} was scored on other held-out text, so its losses are not comparable: "
                "the best evaluation and the patience start again"
            )

    def _evaluate(self, trainer: Trainer) -> None:
        if self._dataset is None or self._section is None:
            return
        complete_parameters(trainer.ddp)
        shape = replace(trainer.data.shape, seq_length=self._section.data.seq_length, packing=True)
        found: Evaluation | GroupEvaluation
        with doing(EVALUATION), phase(f"the held-out data are scored after iteration {trainer.iteration}"):
            if self._objective is None:
                found = evaluate_model(trainer.gpt, self._dataset, shape, trainer.world)
            else:
                self._objective.begin_step(trainer.iteration, trainer.train_iters)
                found = evaluate_groups(
                    trainer.gpt, self._dataset, shape, trainer.world, self._objective, trainer.frozen
                )
        for callback in trainer.callbacks:
            callback.on_evaluate(trainer, found)
        if self.best.loss is None or found.loss < self.best.loss:
            self.best = Best(self._content, found.loss, trainer.iteration)
        else:
            self.best = replace(self.best, evaluations_since=self.best.evaluations_since + 1)


def _best(folder: Path, found: Any) -> Best:
    """What a checkpoint says of the best evaluation."""
    kinds = {"data": (str,), "loss": (float, int, NoneType), "iteration": (int,), "evaluations_since": (int,)}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise UserError(f"{folder / STATE}: its best is {found!r}; expected {', '.join(kinds)}")
    for name, allowed in kinds.items():
        if type(found[name]) not in allowed:
            raise UserError(f"{folder / STATE}: best.{name} is {found[name]!r}, which is not a value that a run writes")
    return Best(**found)
