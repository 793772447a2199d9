"""Readings and faults of a GPU, through the real pynvml and a stand-in for the driver's library (nvml_stub.c)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tiny
from fusemega.fixtures import data as assets
from fusemega.monitoring.ranks import read_ranks
from fusemega.training.records import DONE_MARKER, read_metrics
from tests.monitoring.stub import built_stub

ROOT = Path(__file__).resolve().parents[2]

READ = """
import json, os, sys
from fusemega.runtime.nvml import Gpu
out = []
command = open(os.environ["NVML_STUB"], "w")
gpu = Gpu(sys.argv[1] or None)
for text in sys.argv[2:]:
    with open(os.environ["NVML_STUB"], "w") as command:
        command.write(text)
    reading = gpu.read()
    out.append([reading.values, [[fault.kind, fault.text, fault.is_error] for fault in reading.faults]])
gpu.close()
print(json.dumps(out))
"""

# The readings of a run come from a GPU that it does not compute on.
TRAIN = """
import sys
from fusemega.config import load
from fusemega.runtime import nvml, readings
readings.reader_of = lambda device: (nvml.Gpu("stub"), "gpu")
from fusemega.runtime.meeting import stopped_status
from fusemega.training.assembly import train
from fusemega.training.run_file import TrainRun
number = train(load(TrainRun, sys.argv[1], sys.argv[2:]))
sys.exit(stopped_status(number) if number else 0)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return built_stub(tmp_path_factory.mktemp("nvml"))


def _read(environment: dict[str, str], *commands: str, uuid: str = "stub") -> Any:
    run = subprocess.run(
        [sys.executable, "-c", READ, uuid, *commands], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_readings_have_nvmls_names_and_units(environment: dict[str, str]) -> None:
    ((values, faults),) = _read(
        environment, "power 650000\ntemperature 61\nused 5000\ncorrected 3\nnvlink 7\nreasons 4"
    )
    assert faults == []
    assert values == {
        "MemoryInfo.used": 5000,
        "PowerUsage": 650000,
        "Temperature": 61,
        "UtilizationRates.gpu": 97,
        "ClockInfo.SM": 1980,
        "ClocksEventReasons": 4,
        "TotalEccErrors.corrected": 3,
        "TotalEccErrors.uncorrected": 0,
        "NvLinkErrorCounter": 7,
    }


def test_what_a_gpu_lacks_is_left_out(environment: dict[str, str]) -> None:
    ((values, faults),) = _read(environment, "no_ecc 1", uuid="")
    assert faults == [] and not any(name.startswith("TotalEccErrors") for name in values) and "Temperature" in values


def test_faults_are_said_once(environment: dict[str, str]) -> None:
    found = _read(
        environment, "", "xid 79", "xid 79", "xid 79\nuncorrected 2\nnvlink 5", "reasons 72\nclock 345", "xid 777"
    )
    faults = [list(each) for _, each in found]
    assert faults[0] == faults[2] == []
    assert faults[1] == [
        ["xid", "XID 79: the GPU has fallen off the bus: power, heat or the board; drain the node", True]
    ]
    assert [(kind, error) for kind, _, error in faults[3]] == [("ecc", True), ("nvlink", False)]
    assert faults[3][0][1].startswith("2 uncorrected ECC errors")
    ((kind, text, is_error),) = faults[4]
    assert (kind, is_error) == ("slowdown", False)
    assert text == "slowed down (HwSlowdown, HwThermalSlowdown) at 345 MHz, 61 C: cooling or power"
    assert faults[5][0][1] == "XID 777: NVIDIA's list of XIDs says what it means"


def test_a_lost_gpu_is_said_once_and_has_no_values(environment: dict[str, str]) -> None:
    found = _read(environment, "", "lost 1", "lost 1\nxid 48")
    assert found[1] == [{}, [["lost", "NVML: GPU is lost: it does not answer any more; drain the node", True]]]
    assert found[2][0] == {} and [kind for kind, _, _ in found[2][1]] == ["xid"]


@pytest.mark.parametrize("on_gpu_error", ["warn", "stop"])
def test_training_goes_on_or_stops(
    on_gpu_error: str, environment: dict[str, str], tmp_path: Path, chat_files: assets.ChatData
) -> None:
    """The GPU is lost after the first update."""
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=24, characters=200)
    tiny.write_model(tmp_path / "model", chat)
    output, command = tmp_path / "run", Path(environment["NVML_STUB"])
    iterations = 60 if on_gpu_error == "warn" else 100_000
    section = {
        "output_dir": str(output),
        "model": {"load": str(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": iterations, "global_batch_size": 1, "export_hf": False},
        "monitoring": {"sample_seconds": 0.1, "heartbeat_seconds": 0.1, "on_gpu_error": on_gpu_error},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(section))
    command.write_text("temperature 61")
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(tmp_path / "run.yaml")], env=environment, stderr=out
        )
        try:
            deadline = time.monotonic() + 240
            while not (output.exists() and len(read_metrics(output)) >= 2):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            command.write_text("xid 79\nlost 1")
            status = process.wait(240)
        finally:
            process.kill()
    said, rows, (state,) = log.read_text(), read_metrics(output), read_ranks(output)
    assert rows[0]["gpu/Temperature max"] == 61
    lost = [line for line in said.splitlines() if "GPU is lost" in line]
    assert len(lost) == 1 and lost[0].startswith("warning: rank 0 on ") and said.count("XID 79: ") == 1
    assert len(state.device_errors) == 2 and state.device_worst["Temperature"] == 61
    if on_gpu_error == "warn":
        assert status == 0 and len(rows) == iterations and (output / DONE_MARKER).exists() and state.ended == "finished"
    else:
        assert status == 143 and len(rows) < iterations and not (output / DONE_MARKER).exists()
        assert f"stopped after iteration {len(rows)}, with a checkpoint" in said and state.ended == "stopped"
        assert list((output / "checkpoints").glob(f"iter_{len(rows):07d}"))
