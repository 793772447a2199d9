"""The training loop: one objective, one model, Megatron's schedule and optimizer, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fusemega.checkpoint.output import disk_errors
from fusemega.checkpoint.training_state import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from fusemega.errors import UserError
from fusemega.losses.registry import Objective
from fusemega.models.build import GPT
from fusemega.runtime.console import say
from fusemega.runtime.parallel import World
from fusemega.training.batches import TrainingData
from fusemega.training.forward import Batch, head_settings, run_schedule, total_over_ranks
from fusemega.training.metrics import MetricsWriter, with_costs
from fusemega.training.optimizer import schedule, wrap
from fusemega.training.run import IDENTITY_FIELDS, TrainRun
from fusemega.training.wandb_run import WandbRun

CHECKPOINTS = "checkpoints"


@dataclass
class Trainer:
    """What one process holds while it trains."""

    run: TrainRun
    world: World
    gpt: GPT
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective: Objective
    data: TrainingData
    train_iters: int
    iteration: int = 0

    @classmethod
    def create(cls, run: TrainRun, world: World, gpt: GPT, objective: Objective, data: TrainingData) -> Trainer:
        """Wrap the model; start from the newest checkpoint of `run.output_dir`, if there is one.

        Raises:
            UserError: the checkpoint belongs to other data, another layout or other settings.
        """
        train_iters = run.training.iterations(len(data.dataset))
        ddp, optimizer = wrap(gpt, run.optimizer)
        scheduler = schedule(optimizer, run.optimizer, train_iters)
        trainer = cls(run, world, gpt, ddp, optimizer, scheduler, objective, data, train_iters)
        folder = latest_checkpoint(Path(run.output_dir) / CHECKPOINTS)
        if folder is not None:
            trainer._resume(folder)
        return trainer

    def fit(self) -> None:
        """Train to the last iteration, with checkpoints on the way and at the end.

        Raises:
            UserError: a loss or gradient that is not finite (names the step and the sample keys); a full disk.
        """
        interval = self.run.training.save_interval
        with disk_errors(Path(self.run.output_dir)), self._metrics_writer() as writer:
            while self.iteration < self.train_iters:
                values = with_costs(self.step(), self.world)
                if writer is not None:
                    writer.write(self.iteration, values)
                if self.iteration == self.train_iters or (interval and self.iteration % interval == 0):
                    self.save()

    def step(self) -> dict[str, float]:
        """One update. Returns its metrics under Megatron's names, the same on every rank."""
        started = time.monotonic()
        self.ddp.train()
        batches = self.data.step(self.iteration)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        denominators = self._denominators(batches.micro_batches)
        unsound: list[str] = []

        def loss_function(hidden_NH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            loss, sums = self.objective.loss(
                hidden_NH, self.gpt.head_weight(), batch, denominators, head_settings(self.gpt, self.world)
            )
            if not torch.isfinite(loss.detach()):
                unsound.extend(key.hex() for key in batch["keys"])
            return loss, torch.stack([loss.detach().double(), *(sums[term].double() for term in self.objective.terms)])

        collected = run_schedule(
            self.ddp,
            batches.micro_batches,
            loss_function,
            self.world,
            forward_only=False,
        )
        loss, *sums = total_over_ranks(collected, 1 + len(self.objective.terms), self.world).tolist()
        if not math.isfinite(loss):
            self._refuse_unsound(unsound)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise UserError(
                f"iteration {self.iteration + 1}: the gradient norm is {grad_norm}, though the loss is {loss:.4g}; "
                f"samples: {_listed([key.hex() for batch in batches.micro_batches for key in batch['keys']])}"
            )
        self.scheduler.step(increment=1)
        self.iteration += 1
        means = {
            f"{term} loss": value / float(denominators[term])
            for term, value in zip(self.objective.terms, sums, strict=True)
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
        """A checkpoint of this iteration. Collective."""
        root = Path(self.run.output_dir) / CHECKPOINTS
        return save_checkpoint(root, self.iteration, self.ddp, self.optimizer, self._identity(), self.world)

    def _denominators(self, micro_batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Global count of each term of the loss, at least 1: this rank's samples, summed over data parallelism."""
        counts = [self.objective.counts(batch) for batch in micro_batches]
        totals = torch.stack(
            [sum((count[term] for count in counts), torch.zeros(())).double() for term in self.objective.terms]
        ).to(self.world.device)
        dist.all_reduce(totals, group=self.world.dp_group)
        return dict(zip(self.objective.terms, totals.clamp(min=1), strict=True))

    def _refuse_unsound(self, keys: list[str]) -> None:
        gathered: list[list[str]] = [[] for _ in range(self.world.world_size)]
        dist.all_gather_object(gathered, keys)
        found = sorted({key for part in gathered for key in part})
        raise UserError(
            f"iteration {self.iteration + 1}: the loss is not finite; stopped before the update; "
            f"sample keys of the micro-batches concerned: {_listed(found)}"
        )

    def _identity(self) -> dict[str, object]:
        """What must not change between a checkpoint and the run that resumes it."""
        return {
            "consumed_samples": self.data.consumed_samples(self.iteration),
            "train_iters": self.train_iters,
            "world_size": self.world.world_size,
            "parallel": self.run.parallel.model_dump(),
            "fp8": self.run.model.fp8_settings() or None,
            "data": self.data.dataset.folder.name,
            "objective": self.run.objective.model_dump(mode="json"),
            "optimizer": self.run.optimizer.model_dump(),
            "training": self.run.training.model_dump(include=set(IDENTITY_FIELDS)),
        }

    def _resume(self, folder: Path) -> None:
        saved = read_state(folder)
        iteration = saved.pop("iteration")
        self.iteration = iteration
        for name, value in json.loads(json.dumps(self._identity())).items():
            if saved.get(name) != value:
                raise UserError(
                    f"{folder}: cannot resume: the checkpoint has {name} = {saved.get(name)}, this run {value}; "
                    "use the same settings, or another output_dir"
                )
        load_checkpoint(folder, self.ddp, self.optimizer, self.world)
        self.scheduler.step(increment=iteration)

    def _metrics_writer(self) -> AbstractContextManager[MetricsWriter | None]:
        if not self.world.is_main:
            return nullcontext()
        folder, training = Path(self.run.output_dir), self.run.training
        wandb_run = None
        if training.wandb_project is not None:
            wandb_run = WandbRun(training.wandb_project, folder, self.run.model_dump(mode="json"))
        return closing(
            MetricsWriter(folder, self.iteration, self.train_iters, training.log_interval, say, wandb_run)
        )


def _listed(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
