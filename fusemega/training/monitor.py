"""Callback: what `monitoring:` asks for beside heartbeats: readings of devices, slow ranks, spikes."""

from __future__ import annotations

import signal
import socket
from collections.abc import MutableMapping

from fusemega.monitoring.sampler import Sampler, together
from fusemega.monitoring.session import all_states, own_heartbeat
from fusemega.monitoring.settings import MonitoringSection
from fusemega.monitoring.spikes import Spikes
from fusemega.monitoring.stragglers import RankTime, Stragglers
from fusemega.runtime import readings
from fusemega.runtime.console import say, warn
from fusemega.training.callbacks import Callback
from fusemega.training.records import SLOWEST, SLOWEST_RATIO
from fusemega.training.trainer import Trainer


class Monitor(Callback):
    """Adds readings of all ranks' devices and the slowest rank to a step's metrics, and warns.

    Args:
        settings: `monitoring` of the run file.
    """

    def __init__(self, settings: MonitoringSection) -> None:
        self._settings = settings
        self._sampler: Sampler | None = None
        self._kind = "host"
        self._stragglers = Stragglers(settings.straggler_ratio)
        self._spikes: dict[str, Spikes] = {}
        self._hosts: list[str] = []
        self._said = False

    def on_start(self, trainer: Trainer) -> None:
        """Collective."""
        world, settings = trainer.world, self._settings
        if settings.straggler_interval is not None and world.world_size > 1:
            self._hosts = world.from_all(socket.gethostname())
        if settings.sample_seconds is not None:
            reader, self._kind = readings.reader_of(world.device)
            beat = own_heartbeat()
            self._sampler = Sampler(reader, world.rank, str(world.device), settings.sample_seconds, beat)
            self._sampler.start()

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        if self._sampler is not None and trainer.world.is_main and (own := self._sampler.take()) is not None:
            others = [state.device_state for state in all_states() if state.rank != trainer.world.rank]
            values.update(together([own, *others], self._kind))
        if self._hosts and trainer.is_due(self._settings.straggler_interval):
            self._compare(trainer, values)
        if trainer.world.is_main and self._settings.spike_factor is not None:
            self._watch_spikes(trainer.iteration, values, self._settings.spike_factor)

    def wants_stop(self, trainer: Trainer) -> int:
        if self._settings.on_gpu_error != "stop" or self._sampler is None or not self._sampler.failed:
            return 0
        if not self._said:
            self._said = True
            say("monitoring.on_gpu_error: stop: stopping after this step, with a checkpoint")
        return int(signal.SIGTERM)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if self._sampler is not None:
            self._sampler.end()
            self._sampler = None

    def _compare(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        """Collective."""
        world = trainer.world
        seconds, tokens = trainer.clock.take()
        found = world.numbers_of_all([world.pp_rank, seconds, trainer.waited, tokens])
        trainer.waited = 0.0
        times = [
            RankTime(host, int(stage), seconds, waited, int(tokens))
            for host, (stage, seconds, waited, tokens) in zip(self._hosts, found, strict=True)
        ]
        slowest, line = self._stragglers.compare(times)
        if slowest is not None:
            values[SLOWEST], values[SLOWEST_RATIO] = float(slowest.rank), slowest.ratio
        if line is not None:
            warn(line)

    def _watch_spikes(self, iteration: int, values: MutableMapping[str, float], factor: float) -> None:
        losses = [name for name in values if name.endswith("loss")]
        # The norm of a gradient varies more from batch to batch than a loss does.
        for name, least in (("loss" if "loss" in losses else losses[0], 0.02), ("grad-norm", 0.1)):
            spikes = self._spikes.setdefault(name, Spikes(name, factor, least))
            if line := spikes.see(iteration, values[name]):
                warn(line)
