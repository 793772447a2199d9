"""The training loop: one objective, one model, Megatron's schedule and optimizer, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fusemega.checkpoint.saver import CheckpointSaver
from fusemega.checkpoint.series import CHECKPOINTS, STATE, checkpoint_folder, find_checkpoint, read_state
from fusemega.checkpoint.training_state import load_checkpoint, training_state
from fusemega.errors import UserError
from fusemega.files.output import disk_errors
from fusemega.losses.registry import Objective
from fusemega.models.build import GPT
from fusemega.passes.batches import GlobalBatch, TrainingData
from fusemega.passes.forward import Batch, objective_loss, run_schedule, total_over_ranks
from fusemega.passes.frozen import OnlineTeacher
from fusemega.passes.prefetch import Prefetch
from fusemega.runtime.console import say
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World
from fusemega.runtime.signals import StopSignals
from fusemega.scoring.evaluation import evaluate_model
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.metrics import MetricsWriter, most_memory
from fusemega.training.optimizer import complete_parameters, schedule, wrap
from fusemega.training.records import THROUGHPUT, TIME
from fusemega.training.run import FREE_OPTIMIZER_FIELDS, IDENTITY_FIELDS, TrainRun
from fusemega.training.wandb_run import WandbRun

_SHARDED = "use_distributed_optimizer"


@dataclass(frozen=True)
class Best:
    """The evaluation of lowest loss so far.

    Attributes:
        data: which held-out text, by the name of its tokenized form.
        loss: its loss; None before the first evaluation.
        iteration: when.
        evaluations_since: how many evaluations were no better.
    """

    data: str = ""
    loss: float | None = None
    iteration: int = 0
    evaluations_since: int = 0


@dataclass
class Trainer:
    """What one process holds while it trains."""

    run: TrainRun
    world: World
    gpt: GPT
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective: Objective
    data: TrainingData
    train_iters: int
    saver: CheckpointSaver
    content: Mapping[str, Any]
    describe: Callable[[Path], None]
    held_out: TokenizedDataset | None = None
    teacher: OnlineTeacher | None = None
    iteration: int = 0
    best: Best = Best()
    batches: Prefetch[GlobalBatch] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # By name of `self.data`: who replaces it is obeyed.
        self.batches = Prefetch(lambda iteration: self.data.step(iteration), self.world.device, self.train_iters)

    @classmethod
    def create(
        cls,
        run: TrainRun,
        world: World,
        gpt: GPT,
        objective: Objective,
        data: TrainingData,
        held_out: TokenizedDataset | None = None,
        teacher: OnlineTeacher | None = None,
        *,
        content: Mapping[str, Any],
        describe: Callable[[Path], None],
    ) -> Trainer:
        """Wrap the model; start from the newest checkpoint of `run.output_dir`, if there is one.

        Args:
            content: hashes of what the run is made from (`identity.content_of`).
            describe: writes into a checkpoint's folder what its weights are loaded with elsewhere.

        Raises:
            UserError: the checkpoint belongs to other data or other settings; there are checkpoints, and none is whole.
        """
        train_iters = run.training.iterations(len(data.dataset))
        ddp, optimizer = wrap(gpt, run.optimizer)
        scheduler = schedule(optimizer, run.optimizer, train_iters)
        root = Path(run.output_dir) / CHECKPOINTS
        saver = CheckpointSaver(root, world, run.training.async_save, run.training.keep_checkpoints)
        trainer = cls(
            *(run, world, gpt, ddp, optimizer, scheduler, objective, data, train_iters, saver, content, describe),
            *(held_out, teacher),
        )
        folder = find_checkpoint(root, world)
        if folder is not None:
            trainer._resume(folder)
        return trainer

    def fit(self) -> int:
        """Train to the last iteration, or until evaluations stop improving, with checkpoints on the way and at the end.

        Returns:
            0; or the number of the signal that stopped the run, after a checkpoint, before its end.

        Raises:
            UserError: a loss or gradient that is not finite (names the step and the sample keys); a full disk.
        """
        output = Path(self.run.output_dir)
        writing, stopping = self._metrics_writer(), StopSignals(self.world)
        with disk_errors(output), writing as writer, stopping as signals, self.saver, self.batches:
            if self.iteration == 0 and self.best.loss is None:
                self._evaluate(writer)
            while not self.finished:
                values = self.step()
                values |= {THROUGHPUT: values["tokens"] / values[TIME]}
                values |= most_memory(self.world, self.saver.writers_bytes)
                self.saver.poll()
                if writer is not None:
                    writer.write(self.iteration, values)
                stop = signals.requested()
                is_best = self._is_due(self._evaluation_interval) and self._evaluate(writer)
                if self._is_due(self.run.training.save_interval) or self.finished or stop or is_best:
                    self.save()
                    if self.finished or stop:
                        self.saver.wait()
                    memory = most_memory(self.world, self.saver.writers_bytes)  # a save may need more than an update
                    if writer is not None:
                        writer.amend(self.iteration, memory)
                if stop and not self.finished:
                    return stop
        return 0

    @property
    def finished(self) -> bool:
        """The last iteration is done, or patience has run out."""
        section = self.run.evaluation
        patience = None if section is None else section.patience
        return self.iteration == self.train_iters or (patience is not None and self.best.evaluations_since >= patience)

    def best_checkpoint(self) -> Path | None:
        """The checkpoint of lowest evaluation loss, where the run keeps one."""
        if not self._keeps_best or self.best.iteration == 0:
            return None
        return checkpoint_folder(self._checkpoints, self.best.iteration)

    def result(self) -> Path | None:
        """The checkpoint whose weights a finished run gives; None: no update was any good, so those it started from."""
        if self._keeps_best and self.best.loss is not None:
            return self.best_checkpoint()
        return checkpoint_folder(self._checkpoints, self.iteration)

    @property
    def _keeps_best(self) -> bool:
        return self.run.evaluation is not None and self.run.evaluation.keep_best

    def step(self) -> dict[str, float]:
        """One update. Returns its metrics under Megatron's names, the same on every rank."""
        started = time.monotonic()
        taken = self.batches.take(self.iteration)
        denominators = self._denominators(taken.micro_batches)
        batches = taken.on(self.world.device)
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro_batches = batches.micro_batches
        if self.teacher is not None:
            micro_batches = self.teacher.teach(micro_batches)

        def loss_function(hidden_NH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            loss, sums = objective_loss(self.objective, self.gpt, hidden_NH, batch, denominators, self.world)
            return loss, torch.stack([loss.detach().double(), *(sums[term].double() for term in self.objective.terms)])

        collected = run_schedule(
            self.ddp,
            micro_batches,
            loss_function,
            self.world,
            forward_only=False,
        )
        totals = total_over_ranks(collected, 1 + len(self.objective.terms), self.world, self._adding_ranks)
        # The one place where the host waits for the numbers of a step, before the update.
        loss, *read = torch.cat([totals, torch.stack(list(denominators.values()))]).tolist()
        sums, counts = read[: len(self.objective.terms)], read[len(self.objective.terms) :]
        if not math.isfinite(loss):
            self._refuse_unsound(micro_batches, collected)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise UserError(
                f"iteration {self.iteration + 1}: the gradient norm is {grad_norm}, though the loss is {loss:.4g}; "
                f"samples: {_listed([key.hex() for batch in micro_batches for key in batch['keys']])}"
            )
        self.scheduler.step(increment=1)
        self.iteration += 1
        means = {
            f"{term} loss": value / count for term, value, count in zip(self.objective.terms, sums, counts, strict=True)
        }
        return {
            **means,
            **({"loss": loss} if len(means) > 1 else {}),
            "grad-norm": float(grad_norm),
            "learning-rate": learning_rate,
            "consumed-samples": self.data.consumed_samples(self.iteration),
            "tokens": batches.num_tokens,
            "iteration-time": time.monotonic() - started,
        }

    def save(self) -> Path:
        """A checkpoint of this iteration; older ones go, as far as the run file says so. Collective."""
        complete_parameters(self.ddp)
        self.batches.settle()  # writers are forked
        contents = training_state(self.gpt, self.optimizer, self.world)
        state = {**self._identity(), "layout": self._layout(), "best": asdict(self.best)}
        return self.saver.save(self.iteration, contents, state, self.best_checkpoint(), self.describe)

    @property
    def _checkpoints(self) -> Path:
        return Path(self.run.output_dir) / CHECKPOINTS

    @property
    def _evaluation_interval(self) -> int | None:
        return None if self.run.evaluation is None else self.run.evaluation.interval

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and (self.iteration % interval == 0 or self.iteration == self.train_iters)

    def _evaluate(self, writer: MetricsWriter | None) -> bool:
        """Scores the held-out text. Returns whether a checkpoint of this iteration is to be kept as the best."""
        section = self.run.evaluation
        if self.held_out is None or section is None:
            return False
        complete_parameters(self.ddp)
        shape = replace(self.data.shape, seq_length=section.data.seq_length, packing=True)
        found = evaluate_model(self.gpt, self.held_out, shape, self.world)
        if writer is not None:
            writer.write_evaluation(self.iteration, found)
        if self.best.loss is None or found.loss < self.best.loss:
            self.best = Best(str(self.content["held_out"]), found.loss, self.iteration)
            return section.keep_best
        self.best = replace(self.best, evaluations_since=self.best.evaluations_since + 1)
        return False

    @property
    def _adding_ranks(self) -> dist.ProcessGroup:
        """Those whose parts of the loss add up: context-parallel ranks have other tokens, but the same samples."""
        return self.world.dp_cp_group if self.objective.unit == "token" else self.world.dp_group

    def _denominators(self, micro_batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Global count of each term of the loss, at least 1: what this rank has, summed over the ranks.

        Args:
            micro_batches: in host memory, where they are counted.
        """
        counts = [self.objective.counts(batch) for batch in micro_batches]
        mine = [sum(count[term] for count in counts) for term in self.objective.terms]
        # Filled where they are needed, rather than copied there.
        totals = torch.stack([torch.full((), n, dtype=torch.float64, device=self.world.device) for n in mine])
        dist.all_reduce(totals, group=self._adding_ranks)
        return dict(zip(self.objective.terms, totals.clamp(min=1), strict=True))

    def _refuse_unsound(self, micro_batches: Sequence[Batch], collected: Sequence[torch.Tensor]) -> None:
        """`collected`: the schedule's, loss first; of each micro-batch on the last stage, and empty elsewhere."""
        found = zip(micro_batches, collected, strict=False)
        keys = [key.hex() for batch, values in found if not math.isfinite(float(values[0])) for key in batch["keys"]]
        unsound = sorted({key for part in self.world.from_all(keys) for key in part})
        raise UserError(
            f"iteration {self.iteration + 1}: the loss is not finite; stopped before the update; "
            f"sample keys of the micro-batches concerned: {_listed(unsound)}"
        )

    def _identity(self) -> dict[str, object]:
        """What must not change between a checkpoint and the run that resumes it."""
        return {
            "consumed_samples": self.data.consumed_samples(self.iteration),
            "train_iters": self.train_iters,
            "dtype": self.run.model.dtype,
            "fp8": self.run.model.fp8_settings() or None,
            "model": self.content["model"],
            "data": self.content["data"],
            "objective": self.run.objective.model_dump(mode="json") | self.content["objective"],
            "optimizer": self.run.optimizer.model_dump(exclude=set(FREE_OPTIMIZER_FIELDS)),
            "training": self.run.training.model_dump(include=set(IDENTITY_FIELDS)),
        }

    def _layout(self) -> dict[str, object]:
        """What may change: optimizer state is stored in a form that any layout loads."""
        return {"world_size": self.world.world_size, "parallel": self.run.parallel.model_dump()}

    def _resume(self, folder: Path) -> None:
        saved = read_state(folder)
        iteration = saved.pop("iteration")
        self.iteration = iteration
        best = _best(folder, saved.pop("best", None))
        if self.held_out is not None and best.data == self.content["held_out"]:
            self.best = best
        elif self.held_out is not None and best.loss is not None and self.world.is_main:
            say(
                f"warning: {folder.name} was scored on other held-out text, with which losses do not compare: "
                "the best evaluation and patience begin anew"
            )
        for name, value in json.loads(json.dumps(self._identity())).items():
            if name not in saved:
                raise UserError(
                    f"{folder / STATE}: has no {name}: an earlier version wrote it, which did not record what a run is "
                    "made from; finish the run with that version, or use another output_dir"
                )
            if (was := saved[name]) != value:
                why = " (hashes of what was read, wherever it lies)" if name in ("model", "data") else ""
                if name == "objective" and isinstance(was, dict):
                    other = [key for key in (value | was) if was.get(key) != value.get(key)]
                    why = f" (they differ in {', '.join(other)}; of files, by their contents, wherever they lie)"
                if name == "optimizer" and was == {**value, _SHARDED: not value[_SHARDED]}:
                    why = f" (with and without {_SHARDED}, Megatron stores the state under other names)"
                raise UserError(
                    f"{folder}: cannot resume: the checkpoint has {name} = {was}, this run {value}{why}; "
                    "use the same settings, or another output_dir"
                )
        same_layout = saved.get("layout") == self._layout()
        if not same_layout and self.world.is_main:
            before, usual = saved.get("layout"), ParallelConfig().model_dump()
            parallel = before.get("parallel") if isinstance(before, dict) else None
            if not isinstance(before, dict) or not isinstance(parallel, dict):
                raise UserError(f"{folder / STATE}: its layout is {before!r}, which no run writes")
            told = {key: size for key, size in parallel.items() if size != usual.get(key)}
            say(
                f"{folder.name} was saved in another layout ({before.get('world_size')} process(es), "
                f"{told or 'data parallel'}); it is loaded into this one"
            )
        load_checkpoint(folder, self.gpt, self.optimizer, self.world, same_layout)
        self.scheduler.step(increment=iteration)

    def _metrics_writer(self) -> AbstractContextManager[MetricsWriter | None]:
        if not self.world.is_main:
            return nullcontext()
        folder, training = Path(self.run.output_dir), self.run.training
        wandb_run = None
        if training.wandb_project is not None:
            wandb_run = WandbRun(training.wandb_project, folder, self.run.model_dump(mode="json"))
        return closing(MetricsWriter(folder, self.iteration, self.train_iters, training.log_interval, say, wandb_run))


def _best(folder: Path, found: Any) -> Best:
    """What a checkpoint says of the best evaluation."""
    kinds = {"data": (str,), "loss": (float, int, NoneType), "iteration": (int,), "evaluations_since": (int,)}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise UserError(f"{folder / STATE}: its best is {found!r}; expected {', '.join(kinds)}")
    for name, allowed in kinds.items():
        if type(found[name]) not in allowed:
            raise UserError(f"{folder / STATE}: best.{name} is {found[name]!r}, which no run writes")
    return Best(**found)


def _listed(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
