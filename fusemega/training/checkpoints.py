"""A run's checkpoints: when one is written, what it holds, and how a run resumes from the newest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from fusemega.checkpoint.loading import loading
from fusemega.checkpoint.saver import CheckpointSaver
from fusemega.checkpoint.series import CHECKPOINTS, TRACKER, checkpoint_folder, find_checkpoint, read_state
from fusemega.checkpoint.training_state import load_checkpoint, training_state
from fusemega.runtime.console import phase
from fusemega.runtime.parallel import World
from fusemega.training.callbacks import Callback
from fusemega.training.held_out import HeldOut
from fusemega.training.identity import check_identity, is_same_layout, layout_of, run_identity
from fusemega.training.optimizer import complete_parameters
from fusemega.training.records import SAVE_TIME, SAVES_FILE, TIME
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer


class Checkpoints(Callback):
    """Saves every `save_interval` iterations and at the end of a run, and removes older ones as the run file says.

    Args:
        run: the run file.
        world: this process's place.
        held_out: knows the best evaluation, whose checkpoint is kept.
        content: hashes of what the run is made from (`identity.content_of`).
        describe: writes into a checkpoint's folder what is needed to load its weights elsewhere.

    Attributes:
        saver: writes the checkpoints.
        content: as given.
    """

    def __init__(
        self,
        run: TrainRun,
        world: World,
        held_out: HeldOut,
        *,
        content: Mapping[str, Any],
        describe: Callable[[Path], None],
    ) -> None:
        self._root = Path(run.output_dir) / CHECKPOINTS
        self._held_out, self.content, self._describe = held_out, content, describe
        self.saver = CheckpointSaver(
            self._root, world, run.training.async_save, run.training.keep_checkpoints, self._note
        )
        self._notes, self._slowest = Path(run.output_dir) / SAVES_FILE, 0.0

    def resume(self, trainer: Trainer) -> None:
        """Go on from the newest checkpoint, if there is one. Collective.

        Raises:
            UserError: the checkpoint belongs to other data or other settings; there are checkpoints, and none is whole.
        """
        folder = find_checkpoint(self._root, trainer.world)
        if folder is None:
            return
        saved = read_state(folder)
        trainer.iteration = saved.pop("iteration")
        self._held_out.resume(folder, saved.pop("best", None), trainer.world.is_main)
        check_identity(folder, saved, self._identity(trainer))
        same_layout = is_same_layout(folder, saved.get("layout"), trainer.run, trainer.world)
        with phase(f"{folder} is loaded"), loading(folder, TRACKER, trainer.world):
            load_checkpoint(folder, trainer.gpt, trainer.optimizer, trainer.world, same_layout)
        # The schedule depends on the number of updates alone, so checkpoints do not store it.
        trainer.scheduler.step(increment=trainer.iteration)

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        self._slowest = max(self._slowest, values[TIME])
        self.saver.poll()

    def wants_save(self, trainer: Trainer) -> bool:
        return trainer.is_due(trainer.run.training.save_interval)

    def on_save(self, trainer: Trainer, last: bool) -> None:
        with phase(f"the checkpoint of iteration {trainer.iteration} is taken"):
            self.save(trainer)
        if last:
            with phase("what is still being written is waited for"):
                self.saver.wait()

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.saver.__exit__(None if error is None else type(error))

    def save(self, trainer: Trainer) -> Path:
        """Saves this iteration. Returns the checkpoint's folder, which may not be there yet with `async_save`."""
        complete_parameters(trainer.ddp)
        trainer.batches.settle()  # writers are forked, and must not inherit a lock that the batches' thread holds
        contents = training_state(trainer.gpt, trainer.optimizer, trainer.world)
        state = {
            **self._identity(trainer),
            "layout": layout_of(trainer.run, trainer.world),
            "best": self._held_out.state(),
        }
        return self.saver.save(trainer.iteration, contents, state, self.best(), self._describe)

    def best(self) -> Path | None:
        """The checkpoint of lowest evaluation loss, where the run keeps one."""
        best = self._held_out.best
        if not self._held_out.keeps_best or best.iteration == 0:
            return None
        return checkpoint_folder(self._root, best.iteration)

    def result(self, iteration: int) -> Path | None:
        """The checkpoint with the final weights of a run that finished after `iteration`; None: no update improved the
        evaluation, so they are those that the run started from."""
        if self._held_out.keeps_best and self._held_out.best.loss is not None:
            return self.best()
        return checkpoint_folder(self._root, iteration)

    def _note(self, iteration: int, seconds: float) -> None:
        """Notes how long a save took and the slowest update before it: a signal is followed by one of each."""
        row = {"iteration": iteration, SAVE_TIME: round(seconds, 3), TIME: round(self._slowest, 3)}
        with open(self._notes, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._slowest = 0.0

    def _identity(self, trainer: Trainer) -> dict[str, object]:
        consumed = trainer.data.consumed_samples(trainer.iteration)
        return run_identity(trainer.run, self.content, consumed, trainer.train_iters)
