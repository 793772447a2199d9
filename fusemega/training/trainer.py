"""The training loop: an objective, a model, Megatron's schedule and optimizer; all else around a step is in callbacks.

Shape suffixes: N tokens whose hidden states the objective reads, H hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fusemega.errors import UserError
from fusemega.files.output import disk_errors
from fusemega.losses.apply import objective_loss, rows_read
from fusemega.losses.registry import Objective
from fusemega.models.build import GPT
from fusemega.passes.batches import GlobalBatch, TrainingData
from fusemega.passes.forward import run_schedule, total_over_ranks
from fusemega.passes.frozen import FrozenModel, ask_all
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.prefetch import Prefetch
from fusemega.runtime.activity import COMPUTE, DATA, OPTIMIZER, SAVE, STEP, doing, reached
from fusemega.runtime.forward_clock import ForwardClock
from fusemega.runtime.parallel import World
from fusemega.runtime.signals import StopSignals
from fusemega.training.balancing import TERM, Balancing
from fusemega.training.callbacks import Callback
from fusemega.training.optimizer import schedule, wrap
from fusemega.training.run_file import TrainRun

C = TypeVar("C", bound=Callback)


@dataclass
class Trainer:
    """What one process holds while it trains.

    Attributes:
        train_iters: updates of the whole run.
        balancing: the loss that balances experts; None: there is none.
        iteration: updates done.
        callbacks: told of each step's events, in this order.
        batches: gives the batches of the steps to come.
        clock: adds up this rank's forward passes.
        waited: seconds for which this rank has waited for its batches; whoever reads it sets it to 0.
    """

    run: TrainRun
    world: World
    gpt: GPT
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective: Objective[Any]
    data: TrainingData
    train_iters: int
    frozen: Mapping[str, FrozenModel] = field(default_factory=dict)
    balancing: Balancing | None = None
    iteration: int = 0
    callbacks: list[Callback] = field(default_factory=list)
    batches: Prefetch[GlobalBatch] = field(init=False, repr=False)
    clock: ForwardClock = field(init=False, repr=False)
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.clock = ForwardClock(self.world.device)
        # `self.data` is looked up at each call, so that it may be replaced.
        self.batches = Prefetch(lambda iteration: self.data.step(iteration), self.world.device, self.train_iters)

    @classmethod
    def create(
        cls,
        run: TrainRun,
        world: World,
        gpt: GPT,
        objective: Objective[Any],
        data: TrainingData,
        frozen: Mapping[str, FrozenModel] = MappingProxyType({}),
    ) -> Trainer:
        """Wrap the model; there are no callbacks yet."""
        train_iters = run.training.iterations(data.dataset.num_units)
        ddp, optimizer = wrap(gpt, run.optimizer)
        scheduler = schedule(optimizer, run.optimizer, train_iters)
        balancing = Balancing.of(run, gpt, world)
        return cls(run, world, gpt, ddp, optimizer, scheduler, objective, data, train_iters, frozen, balancing)

    def fit(self) -> int:
        """Train to the last iteration, or until a callback ends the run, with checkpoints on the way and at the end.

        Returns:
            0; or the number of the signal that stopped the run, after a checkpoint, before its end.

        Raises:
            UserError: a loss or gradient that is not finite (names the step and the rows of data); a full disk.
        """
        reached(self.iteration, self.train_iters)
        with (
            doing(STEP),
            disk_errors(Path(self.run.output_dir)),
            StopSignals(self.world) as signals,
            self._started(),
            self.batches,
        ):
            while not self.finished:
                for callback in self.callbacks:
                    callback.on_step_begin(self)
                values = self.step()
                for callback in self.callbacks:
                    callback.on_step_end(self, values)
                stop = signals.requested(max((callback.wants_stop(self) for callback in self.callbacks), default=0))
                if stop or self.finished or any(callback.wants_save(self) for callback in self.callbacks):
                    self.save(last=bool(stop) or self.finished)
                if stop and not self.finished:
                    return stop
        return 0

    @property
    def finished(self) -> bool:
        """The last iteration is done, or a callback has ended the run."""
        return self.iteration == self.train_iters or any(callback.wants_end(self) for callback in self.callbacks)

    def save(self, last: bool = False) -> None:
        """Lets the callbacks save this iteration. Collective."""
        with doing(SAVE):
            for callback in self.callbacks:
                callback.on_save(self, last)

    def is_due(self, interval: int | None) -> bool:
        """Whether something done every `interval` iterations, and after the last, is due after this one."""
        return interval is not None and (self.iteration % interval == 0 or self.iteration == self.train_iters)

    def callback(self, kind: type[C]) -> C:
        """The callback of that class."""
        (found,) = [callback for callback in self.callbacks if isinstance(callback, kind)]
        return found

    def step(self) -> dict[str, float]:
        """One update. Returns its metrics under Megatron's names, the same on every rank."""
        started = time.monotonic()
        with doing(DATA):
            taken = self.batches.take(self.iteration)
        self.waited += time.monotonic() - started
        with doing(COMPUTE):
            return self._update(taken, started)

    def _update(self, taken: GlobalBatch, started: float) -> dict[str, float]:
        """The rest of `step`.

        Args:
            taken: the batch, in host memory.
            started: when the step began (`time.monotonic`).
        """
        self.objective.begin_step(self.iteration, self.train_iters)
        summed = (*self.objective.terms, *self.objective.statistics)
        # Counted before the batches go to the device, where the host would wait for the counts.
        denominators, measured = self._counted(taken.micro_batches)
        if self.balancing is not None:
            self.balancing.begin(taken.micro_batches)
        batches = taken.on(self.world.device)
        for chunk in self.ddp:
            chunk.train()  # an evaluation leaves the model in evaluation mode
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro_batches = ask_all(self.frozen, batches.micro_batches)

        def loss_function(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            loss, sums = objective_loss(self.objective, self.gpt, hidden_NH, batch, denominators, self.world)
            return loss, torch.stack([loss.detach().double(), *(sums[name].double() for name in summed)])

        collected = run_schedule(
            self.ddp,
            micro_batches,
            loss_function,
            self.world,
            forward_only=False,
            rows=rows_read(self.objective),
            clock=self.clock,
        )
        totals = total_over_ranks(collected, 1 + len(summed), self.world, self._adding_ranks)
        balanced = totals[:0] if self.balancing is None else self.balancing.mean()[None]
        # The one place where the host waits for the numbers of a step, before the update.
        loss, *read = torch.cat([totals, torch.stack(list(denominators.values())), measured, balanced]).tolist()
        self.clock.settle()
        terms, both = len(self.objective.terms), len(summed) + len(self.objective.terms)
        sums, counts, told = read[: len(summed)], read[len(summed) : both], read[both:]
        if not math.isfinite(loss):
            self._refuse_unsound(micro_batches, collected)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with doing(OPTIMIZER):
            _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise UserError(
                f"iteration {self.iteration + 1}: the gradient norm is {grad_norm}, though the loss is {loss:.4g}; "
                f"samples: {_listed([place for batch in micro_batches for place in batch.sources])}"
            )
        self.scheduler.step(increment=1)
        self.iteration += 1
        reached(self.iteration, self.train_iters)
        means = {
            f"{term} loss": value / count
            for term, value, count in zip(self.objective.terms, sums[:terms], counts, strict=True)
        }
        if self.balancing is not None:
            means[f"{TERM} loss"] = told.pop()
            loss += self.balancing.coefficient * means[f"{TERM} loss"]
        return {
            **means,
            **({"loss": loss} if len(means) > 1 else {}),
            **{name: value / counts[0] for name, value in zip(self.objective.statistics, sums[terms:], strict=True)},
            **{
                name: value / count
                for name, value, count in zip(self.objective.measures, told[::2], told[1::2], strict=True)
                if count
            },
            "grad-norm": float(grad_norm),
            "learning-rate": learning_rate,
            "consumed-samples": self.data.consumed_samples(self.iteration),
            "tokens": batches.num_tokens,
            "iteration-time": time.monotonic() - started,
        }

    @property
    def _adding_ranks(self) -> dist.ProcessGroup:
        """The ranks whose parts of the loss add up: context-parallel ranks have other tokens, but the same samples."""
        return self.world.dp_cp_group if self.objective.unit == "token" else self.world.dp_group

    def _counted(self, micro_batches: Sequence[MicroBatch]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Global count of each term of the loss, at least 1, and sum and count of each of the objective's measures.

        They are what this rank has, summed over the ranks.

        Args:
            micro_batches: in host memory, where they are counted.
        """
        counts = [self.objective.counts(batch) for batch in micro_batches]
        mine: list[float] = [sum(count[term] for count in counts) for term in self.objective.terms]
        measured = [self.objective.measured(batch) for batch in micro_batches]
        for name in self.objective.measures:
            mine += [sum(each[name][part] for each in measured) for part in (0, 1)]
        # Filled on the device, rather than copied there, for which the host would wait.
        totals = torch.stack([torch.full((), n, dtype=torch.float64, device=self.world.device) for n in mine])
        dist.all_reduce(totals, group=self._adding_ranks)
        # A term that counts nothing in this step sums to 0, so dividing by 1 leaves 0.
        terms = len(self.objective.terms)
        return dict(zip(self.objective.terms, totals[:terms].clamp(min=1), strict=True)), totals[terms:]

    def _refuse_unsound(self, micro_batches: Sequence[MicroBatch], collected: Sequence[torch.Tensor]) -> None:
        """Ends the run and names the samples whose loss is not finite. Collective.

        Args:
            collected: what the schedule collected of each micro-batch, the loss first; empty except on the last stage.
        """
        found = zip(micro_batches, collected, strict=False)
        places = [place for batch, values in found if not math.isfinite(float(values[0])) for place in batch.sources]
        unsound = [place for part in self.world.from_all(places) for place in part]
        raise UserError(
            f"iteration {self.iteration + 1}: the loss is not finite; stopped before the update; "
            f"the micro-batches concerned hold the samples: {_listed(unsound)}"
        )

    @contextmanager
    def _started(self) -> Iterator[None]:
        """All callbacks, from their `on_start` to their `on_end`."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                callback.on_start(self)

                def end(
                    kind: type[BaseException] | None,
                    error: BaseException | None,
                    trace: TracebackType | None,
                    ended: Callback = callback,
                ) -> None:
                    ended.on_end(self, error)

                stack.push(end)
            yield


def _listed(places: Sequence[str], most: int = 8) -> str:
    """The first few, each once: a row of data may be several samples."""
    distinct = list(dict.fromkeys(places))
    return ", ".join(distinct[:most]) + (f" and {len(distinct) - most} more" if len(distinct) > most else "")
