"""Wrong values of `monitoring:`, and run files of a preflight."""

from __future__ import annotations

from tests.bad_inputs.run import Bad, kind

_c, TRAIN = kind("configuration"), "train train.yaml monitoring."

# fmt: off
TABLE: list[Bad] = [
    _c("silence as short as a heartbeat", TRAIN + "silent_seconds=5", "monitoring: silent_seconds 5 is less than twice heartbeat_seconds 5"),
    _c("a misspelt key of monitoring", TRAIN + "heartbeat_second=3", "monitoring.heartbeat_second: unknown key (did you mean 'heartbeat_seconds'?)"),
    _c("an unknown answer to errors of a GPU", TRAIN + "on_gpu_error=halt", "monitoring.on_gpu_error: found 'halt'"),
    _c("no time for a collective", TRAIN + "collective_timeout_minutes=0", "monitoring.collective_timeout_minutes: "),
    _c("every rank a straggler", TRAIN + "straggler_ratio=1", "monitoring.straggler_ratio: "),
    _c("a heartbeat all the time", TRAIN + "heartbeat_seconds=0", "monitoring.heartbeat_seconds: "),
    _c("no readings, by zero", TRAIN + "sample_seconds=0", "monitoring.sample_seconds: "),
    _c("a preflight of no run file", "preflight nowhere.yaml", "nowhere.yaml: "),
    _c("a preflight of a wrong run file", "preflight train.yaml optimizer.lr=fast", "optimizer.lr: "),
]
