"""Batches built one step ahead: the same, in the same order, errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from fusemega.errors import UserError
from fusemega.passes.prefetch import Prefetch
from fusemega.training.assembly import open_trainer
from fusemega.training.checkpoints import Checkpoints
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer

CPU = torch.device("cpu")
MakeRun = Callable[..., TrainRun]


def ahead(trainer: Trainer) -> Trainer:
    """The trainer, as it would be with a GPU: its batches come from a thread."""
    trainer.batches = Prefetch(lambda i: trainer.data.step(i), CPU, trainer.train_iters, ahead=True)
    return trainer


def test_one_is_built_ahead_and_none_past_the_end() -> None:
    built: list[int] = []
    there = [threading.Event() for _ in range(3)]

    def build(number: int) -> int:
        assert threading.current_thread().name.startswith("batches")
        built.append(number)
        there[number].set()
        return number * 10

    with Prefetch(build, CPU, 3, ahead=True) as batches:
        assert batches.take(0) == 0
        assert there[1].wait(60), "1 is built before it is asked for"
        batches.settle()
        assert built == [0, 1]
        assert [batches.take(1), batches.take(2)] == [10, 20]
        assert batches.take(1) == 10, "whoever goes back gets what was asked for"
    assert built[:3] == [0, 1, 2] and max(built) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_on_a_cpu_nothing_runs_beside_the_step() -> None:
    with Prefetch(lambda number: threading.current_thread(), CPU, 9) as batches:
        assert batches.take(4) is threading.main_thread()


def test_an_error_is_raised_at_its_own_number() -> None:
    def build(number: int) -> int:
        if number == 2:
            raise UserError("row 7: no row in the store")
        return number

    with Prefetch(build, CPU, 9, ahead=True) as batches:
        assert [batches.take(0), batches.take(1)] == [0, 1]
        batches.settle()
        with pytest.raises(UserError, match="^row 7: no row in the store$"):
            batches.take(2)
    # Whoever stops before never hears of it, and an exception in between leaves no thread.
    with pytest.raises(ZeroDivisionError), Prefetch(build, CPU, 9, ahead=True) as batches:
        batches.take(1)
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_run_and_its_resumption_do_not_depend_on_it(make_run: MakeRun) -> None:
    def losses(trainer: Trainer, steps: int) -> list[float]:
        return [trainer.step()["lm loss"] for _ in range(steps)]

    plain = losses(open_trainer(make_run())[0], 4)
    run = make_run(training={"save_interval": 2})
    first = ahead(open_trainer(run)[0])
    with first.callback(Checkpoints).saver, first.batches:
        assert losses(first, 2) == plain[:2]
        first.save()
    second = ahead(open_trainer(run)[0])
    with second.batches:
        assert second.iteration == 2 and losses(second, 2) == plain[2:]
