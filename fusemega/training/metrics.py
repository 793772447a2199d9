"""Where a run's numbers go: the console, `metrics.jsonl`, TensorBoard and, where asked, W&B, under Megatron's names."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fusemega.files.output import write_durably
from fusemega.losses.label_probability import POSITION_SHARE
from fusemega.runtime.console import say
from fusemega.runtime.memory import peak_memory
from fusemega.runtime.parallel import World
from fusemega.scoring.evaluation import Evaluation
from fusemega.scoring.preferences import GroupEvaluation
from fusemega.training.callbacks import Callback
from fusemega.training.checkpoints import Checkpoints
from fusemega.training.records import (
    CPU_MEMORY,
    EVALUATIONS_FILE,
    GPU_MEMORY,
    METRICS_FILE,
    MONITORED,
    THROUGHPUT,
    TIME,
    read_evaluations,
    read_metrics,
)
from fusemega.training.trainer import Trainer
from fusemega.training.wandb_run import WandbRun

_NOT_ON_THE_CONSOLE = ("consumed-samples", "tokens", GPU_MEMORY, CPU_MEMORY)


def most_memory(world: World, writers_bytes: int) -> dict[str, float]:
    """The most memory any rank has held so far, under its name. Collective.

    Args:
        writers_bytes: host memory of the processes that wrote this rank's part of a checkpoint.
    """
    on_gpu = world.device.type == "cuda"
    mine = peak_memory(world.device) + (0 if on_gpu else writers_bytes)
    return {GPU_MEMORY if on_gpu else CPU_MEMORY: world.largest(mine)}


class Costs(Callback):
    """Adds to a step's metrics what it cost: throughput, and the most memory so far."""

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        values[THROUGHPUT] = values["tokens"] / values[TIME]
        values.update(most_memory(trainer.world, trainer.callback(Checkpoints).saver.writers_bytes))


class Metrics(Callback):
    """Writes what the step and the callbacks before this one have found. Only the main process has a writer."""

    _writer: MetricsWriter | None = None

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        folder, training = Path(trainer.run.output_dir), trainer.run.training
        wandb_run = None
        if training.wandb_project is not None:
            wandb_run = WandbRun(training.wandb_project, folder, trainer.run.model_dump(mode="json"))
        self._writer = MetricsWriter(
            folder, trainer.iteration, trainer.train_iters, training.log_interval, say, wandb_run
        )

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(trainer.iteration, values)

    def on_evaluate(self, trainer: Trainer, found: Evaluation | GroupEvaluation) -> None:
        if self._writer is not None:
            self._writer.write_evaluation(trainer.iteration, found)

    def on_save(self, trainer: Trainer, last: bool) -> None:
        """A save may need more memory than an update."""
        memory = most_memory(trainer.world, trainer.callback(Checkpoints).saver.writers_bytes)
        if self._writer is not None:
            self._writer.amend(trainer.iteration, memory)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MetricsWriter:
    """One row an iteration. Only the main process holds one.

    After a resume, rows and events of iterations that will be repeated are dropped first, so that the files read as
    those of an uninterrupted run.

    Args:
        folder: the run's output folder; `metrics.jsonl`, `evaluations.jsonl` and `tensorboard/` are written there.
        iteration: the iteration the run starts or resumes from; 0 for a fresh run.
        train_iters: the last iteration, for the time left.
        log_interval: console lines are this many iterations apart.
        print_line: where console lines go.
        wandb_run: takes every row too; `close` finishes it.
    """

    def __init__(
        self,
        folder: Path,
        iteration: int,
        train_iters: int,
        log_interval: int,
        print_line: Any,
        wandb_run: WandbRun | None = None,
    ) -> None:
        self._path, self._evaluations = folder, folder / EVALUATIONS_FILE
        _keep_rows(self._evaluations, [row for row in read_evaluations(folder) if row["iteration"] <= iteration])
        _keep_rows(folder / METRICS_FILE, [row for row in read_metrics(folder) if row["iteration"] <= iteration])
        self._file = open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        # TensorBoard then hides the events of iterations that this run repeats.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        self._start_iteration, self._train_iters, self._log_interval = iteration, train_iters, log_interval
        self._print, self._wandb = print_line, wandb_run
        self._started = time.monotonic()

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record `values` of 1-based `iteration`. Flushed at once: a killed run keeps its rows."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(iteration, values)
        if iteration % self._log_interval == 0 or iteration == self._train_iters:
            self._print(self._line(iteration, values))

    def amend(self, iteration: int, values: Mapping[str, float]) -> None:
        """Replace values of the last row if it is that of `iteration`; does nothing where they are equal."""
        rows = read_metrics(self._path)
        changed = {**rows[-1], **values} if rows and rows[-1]["iteration"] == iteration else {}
        if changed and changed != rows[-1]:
            self._file.close()  # the path gets another file, to which this one would not write
            _keep_rows(self._path / METRICS_FILE, [*rows[:-1], changed])
            self._file = open(self._path / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def write_evaluation(self, iteration: int, found: Evaluation | GroupEvaluation) -> None:
        """Record an evaluation after `iteration` updates."""
        with open(self._evaluations, "a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **found.row}) + "\n")
        values = found.shown
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(iteration, values)
        shown = " | ".join(f"{name} {_number(value)}" for name, value in values.items())
        self._print(f"validation at iteration {iteration} | {shown} | {found.amount}")

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()

    def _line(self, iteration: int, values: Mapping[str, float]) -> str:
        done = iteration - self._start_iteration
        left = (time.monotonic() - self._started) / done * (self._train_iters - iteration)
        shown = [
            f"{name} {_number(value)}"
            for name, value in values.items()
            if name not in _NOT_ON_THE_CONSOLE and not name.startswith((POSITION_SHARE, *MONITORED))
        ]
        total = self._train_iters
        return f"iteration {iteration:>{len(str(total))}}/{total} | {' | '.join(shown)} | left {_clock(left)}"


def _keep_rows(path: Path, kept: Sequence[Mapping[str, float]]) -> None:
    if kept or path.exists():
        write_durably(path, "".join(json.dumps(row) + "\n" for row in kept))


def _number(value: float) -> str:
    return f"{value:.3e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
