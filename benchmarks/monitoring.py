"""What monitoring costs: processor time of its threads, and of what it adds to a step, as a share of the step.

    python benchmarks/monitoring.py [--hidden 256] [--layers 4] [--steps 60] [--ranks 64]

A random Llama is trained in this process. Blocks of steps with and without monitoring take turns. In the blocks with
it, heartbeats and readings come ten times as often as by default, and the watch reads the files of so many ranks (the
others' lie there, and are replaced as if they ran). What costs is counted in two ways: by the processor time of the
monitoring threads and of the callback, measured where it is spent; and by the difference between the blocks, which is
noisier.
The last line is one JSON object; `ok` says whether the counted share, at the default intervals, is below 0.005.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

TIMES_AS_OFTEN = 10
SHARE = 0.005


class Used:
    """Processor time of the calls of a function, by the thread that makes them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds, self.calls = 0.0, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        started = time.thread_time()
        try:
            return self._function(*arguments, **keywords)
        finally:
            self.seconds += time.thread_time() - started
            self.calls += 1

    @property
    def mean(self) -> float:
        return self.seconds / max(1, self.calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="in all, half of them with monitoring")
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument("--ranks", type=int, default=64, help="whose heartbeats the watch reads")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusemega-monitoring-") as folder:
        found = measured(Path(folder), arguments)
    print(json.dumps(found))


def measured(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, and returns what is printed."""
    import tiny

    from fusemega.config import validate
    from fusemega.monitoring.heartbeat import Heartbeat
    from fusemega.monitoring.ranks import rank_file, read_rank
    from fusemega.monitoring.sampler import Sampler
    from fusemega.monitoring.settings import MonitoringSection
    from fusemega.monitoring.watch import Watch
    from fusemega.runtime import activity, readings
    from fusemega.training.assembly import open_trainer
    from fusemega.training.monitor import Monitor
    from fusemega.training.run_file import TrainRun

    chat = tiny.write_chat(work / "chat.jsonl", rows=64, characters=400)
    tiny.write_model(
        work / "model",
        chat,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
    )
    run = {
        "output_dir": str(work / "run"),
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 256},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-4},
        "training": {"train_iters": 2 * arguments.steps + 10, "global_batch_size": 8, "export_hf": False},
    }
    trainer, _ = open_trainer(validate(TrainRun, run, "monitoring"))
    usual = MonitoringSection()
    assert usual.heartbeat_seconds is not None and usual.sample_seconds is not None
    beat, sample = (seconds / TIMES_AS_OFTEN for seconds in (usual.heartbeat_seconds, usual.sample_seconds))

    costs: dict[str, Used] = {}
    by_block: dict[bool, list[float]] = {True: [], False: []}
    seconds: list[float] = []
    trainer.step()
    callback = Monitor(usual)
    on_step_end = Used(callback.on_step_end)
    for number in range(arguments.steps // arguments.block):
        monitored = number % 2 == 0
        threads: list[Any] = []
        if monitored:
            heartbeat = Heartbeat(work, 0, arguments.ranks, "cpu", beat)
            watch = Watch(work, range(arguments.ranks), beat, 1e9, 1e9)
            sampler = Sampler(readings.reader_of(trainer.world.device)[0], 0, "cpu", sample, heartbeat)
            _count(costs, "heartbeat", heartbeat, "_write")
            _count(costs, "watch", watch, "look")
            _count(costs, "readings", sampler._reader, "read")
            threads = [heartbeat, watch, sampler]
            heartbeat.start()
            while not rank_file(work, 0).exists():
                time.sleep(0.01)
            own = read_rank(rank_file(work, 0))
            assert own is not None
            for thread in threads[1:]:
                thread.start()
            others = Others(work, own, arguments.ranks, beat)
            others.start()
        written = others.seconds if monitored else 0.0
        used, started = time.process_time(), time.perf_counter()
        for _ in range(arguments.block):
            values = trainer.step()
            if monitored:
                on_step_end(trainer, dict(values))
        took = (time.perf_counter() - started) / arguments.block
        # The other ranks' writing is theirs, not this process's.
        written = others.seconds - written if monitored else 0.0
        by_block[monitored].append((time.process_time() - used - written) / arguments.block)
        seconds.append(took)
        if monitored:
            others.end()
            for thread in (watch, sampler):
                thread.end()
            heartbeat.end("finished")
    marks = _per_call(lambda: _mark(activity.doing))
    step_cpu = statistics.median(by_block[False])
    micro_batches = len(trainer.data.step(0).micro_batches)
    clock = _per_call(lambda: _forward(trainer.clock))
    in_step = on_step_end.mean + 3 * marks + micro_batches * clock
    a_second = costs["heartbeat"].mean / usual.heartbeat_seconds + costs["watch"].mean / usual.heartbeat_seconds
    a_second += costs["readings"].mean / usual.sample_seconds
    # On an idle machine a step takes as long as the processor time of its thread.
    share = a_second + in_step / step_cpu
    difference = statistics.median(by_block[True]) / step_cpu - 1
    return {
        "ok": share < SHARE,
        "share": share,
        "step_cpu_seconds": step_cpu,
        "step_seconds": statistics.median(seconds),
        "microseconds": {
            "heartbeat": costs["heartbeat"].mean * 1e6,
            f"watch of {arguments.ranks} ranks": costs["watch"].mean * 1e6,
            "readings": costs["readings"].mean * 1e6,
            "callback, a step": on_step_end.mean * 1e6,
            "marks of phases, a step": 3 * marks * 1e6,
            "clock, a forward pass": clock * 1e6,
        },
        "difference of blocks, ten times as often": difference,
        "steps": arguments.steps,
    }


def _count(costs: dict[str, Used], name: str, owner: Any, method: str) -> None:
    """Measures a method of a thread; figures of all blocks add up."""
    used = costs.get(name)
    function = getattr(owner, method)
    if used is None:
        used = costs[name] = Used(function)
    else:
        used._function = function
    setattr(owner, method, used)


class Others:
    """Writes the files of the other ranks, in a thread, and counts its processor time: `seconds`."""

    def __init__(self, work: Path, own: Any, ranks: int, every: float) -> None:
        self._work, self._own, self._ranks, self._every = work, own, ranks, every
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        from fusemega.monitoring.ranks import rank_file

        beats = 0
        while True:
            beats += 1
            for rank in range(1, self._ranks):
                path = rank_file(self._work, rank)
                aside = path.with_suffix(".new")
                aside.write_text(replace(self._own, rank=rank, beats=beats, time=time.time()).as_json())
                aside.replace(path)
                self.seconds = time.thread_time()
            if self._stop.wait(self._every):
                return


def _mark(doing: Any) -> None:
    with doing("optimizer"):
        pass


def _forward(clock: Any) -> None:
    with clock.forward(1):
        pass


def _per_call(call: Callable[[], None], times: int = 20_000) -> float:
    started = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - started) / times


if __name__ == "__main__":
    main()
