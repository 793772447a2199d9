"""`training.profile`: what the operations of a few iterations cost, as traces and as a table for the report."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fusemega.files.owned import check_replaceable, remove_listed, write_list
from fusemega.runtime.console import say
from fusemega.runtime.together import on_main, output_folder
from fusemega.training.callbacks import Callback
from fusemega.training.profile_table import PROFILE, Operation, ProfileTable
from fusemega.training.run_file import ProfileSection
from fusemega.training.trainer import Trainer

_LISTED = 20  # operations in a table
_SPAN = "iteration "  # how the name of an iteration's mark in the trace begins


class Profile(Callback):
    """Records the iterations that the run file names, on the ranks that it names, into `output_dir/profile`.

    A run that ends before they are done writes those recorded so far; one that fails writes nothing. Only an earlier
    profile is replaced, nothing else.
    """

    def __init__(self, section: ProfileSection, output_dir: str) -> None:
        self._section, self._folder = section, Path(output_dir) / PROFILE
        self._begun: int | None = None
        self._profiler: profile | None = None
        self._span: record_function | None = None

    def check(self) -> None:
        """Refuses a run whose `profile/` holds something else, before it starts.

        Raises:
            UserError: names what stands in the way.
        """
        check_replaceable(self._folder, PROFILE)

    def on_start(self, trainer: Trainer) -> None:
        if trainer.iteration >= self._section.stop and trainer.world.is_main:
            say(f"training.profile: iteration {trainer.iteration} is past the profiled ones; nothing is recorded")

    def on_step_begin(self, trainer: Trainer) -> None:
        if self._begun is None and self._section.start <= trainer.iteration < self._section.stop:
            self._begin(trainer)
        if self._profiler is not None:
            self._span = record_function(f"{_SPAN}{trainer.iteration}")
            self._span.__enter__()

    def _begin(self, trainer: Trainer) -> None:
        self._begun = trainer.iteration
        if trainer.world.rank in self._section.ranks:
            # Kineto says on stderr that it starts and stops. Level 6 leaves its errors. It reads this at its first use.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            on_gpu = trainer.world.device.type == "cuda"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])], acc_events=True
            )
            self._profiler.start()

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None
        if self._begun is not None and trainer.iteration == self._section.stop:
            self._write(trainer)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if error is None and self._begun is not None:
            self._write(trainer)
        elif self._profiler is not None:
            self._profiler.stop()

    def _write(self, trainer: Trainer) -> None:
        """Collective."""
        assert self._begun is not None
        start, stop, world = self._begun, trainer.iteration, trainer.world
        self._begun = None
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        on_main(world, self._make_way)
        with output_folder(self._folder, world) as made:
            if profiler is not None:
                _write_trace(profiler, made / f"rank{world.rank}.trace.json.gz")
                table_of(profiler, world.rank, start, stop).write(made)
            world.barrier()
            if world.is_main:
                write_list(made, PROFILE)
        if world.is_main:
            say(f"profiled iterations {start} to {stop - 1} (counted from 0) into {self._folder}")

    def _make_way(self) -> None:
        self.check()
        if self._folder.is_dir():
            remove_listed(self._folder)


def _write_trace(profiler: profile, path: Path) -> None:
    """Writes the trace compressed, because it is large and repetitive; Perfetto and Chrome read that."""
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=5) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()


def table_of(profiler: profile, rank: int, start: int, stop: int) -> ProfileTable:
    """The operations that took most time: on a GPU if there is one, else on the CPU.

    torch gives a GPU's time twice, with the operation and with the kernels that it starts. The operations are listed,
    and the sum of all is the kernels'.
    """
    # The marks of whole iterations are not operations.
    averages: list[Any] = [row for row in profiler.key_averages() if not row.key.startswith(_SPAN)]
    found = [
        Operation(row.key, int(row.count), float(row.self_cpu_time_total), float(row.self_device_time_total))
        for row in averages
        if row.device_type == DeviceType.CPU
    ]
    kernels = (row for row in averages if row.device_type != DeviceType.CPU and not row.is_user_annotation)
    cpu, gpu = sum(row.cpu_us for row in found), float(sum(row.self_device_time_total for row in kernels))
    found.sort(key=lambda row: -(row.gpu_us if gpu else row.cpu_us))
    return ProfileTable(rank, start, stop, found[:_LISTED], cpu, gpu)
