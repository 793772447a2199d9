"""`fusemega env`: what is there, what is missing and what is broken, on this machine and on simulated ones."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from fusemega import cli
from fusemega.runtime import environment
from fusemega.runtime.environment import BROKEN, MISSING, OK, Fact, examine


def _run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["env", *argv])
    return stop.value.code, capsys.readouterr().out


def _found(name: str) -> Fact:
    return next(item for item in examine() if item.name == name)


def test_json_says_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = _run(["--json"], capsys)
    report = json.loads(out)
    assert status == 0 and report["ok"] is True and report["broken"] == []
    found = {item["name"]: item for item in report["items"]}
    assert found["torch"]["found"].startswith(torch.__version__)
    assert found["megatron-core"] == {"name": "megatron-core", "found": "0.16.1", "status": OK, "note": ""}
    status, table = _run([], capsys)
    assert status == 0 and all(name in table for name in found)
    assert "nothing that is required is broken" in table


def _versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Distributions appear in another version, or (None) not at all."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        given = changed.get(name.replace("-", "_"), "")
        if given is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return given or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_missing_requirement_breaks_and_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _versions(monkeypatch, psutil=None)
    status, out = _run(["--json"], capsys)
    report = json.loads(out)
    assert status == 1 and report["broken"] == ["psutil"]
    assert "hangs for ever" in _found("psutil").note
    status, table = _run([], capsys)
    assert status == 1 and "broken: psutil" in table


def test_another_megatron_core_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, megatron_core="0.17.0")
    item = _found("megatron-core")
    assert item.status == BROKEN and item.found == "0.17.0" and "megatron-core==0.16.1" in item.note


def test_an_absent_option_only_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, gguf=None, transformer_engine=None)
    assert _found("gguf").status == MISSING and "fusemega[gguf]" in _found("gguf").note
    assert _found("transformer-engine").status == MISSING and "fusemega[gpu]" in _found("transformer-engine").note
    assert _found("FP8").status == MISSING and "Transformer Engine" in _found("FP8").note


def test_transformer_engine_out_of_range_or_not_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, transformer_engine="2.12.0")
    assert _found("transformer-engine").status == BROKEN
    _versions(monkeypatch, transformer_engine="2.11.0")
    item = _found("transformer-engine")  # no such module here: as after an install whose library does not load
    assert item.status == BROKEN and "cannot be imported" in item.note


@pytest.mark.parametrize(("folder", "status"), [("multi_tensor_apply", OK), ("web", BROKEN)])
def test_the_wrong_apex_is_told_from_nvidias(
    folder: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('looking must not import it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _found("apex").status == status


class _NVMLError(Exception):
    pass


def _fake_nvml(capability: tuple[int, int], lost: bool = False) -> types.ModuleType:
    nvml = types.ModuleType("pynvml")

    def handle(index: int) -> int:
        if lost:
            raise _NVMLError("GPU is lost")
        return index

    memory = types.SimpleNamespace(total=80 << 30, free=79 << 30)
    nvml.__dict__.update(
        NVMLError=_NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetMemoryInfo=lambda _: memory,
        nvmlDeviceGetCudaComputeCapability=lambda _: capability,
        nvmlDeviceGetName=lambda _: "NVIDIA H100 80GB HBM3",
    )
    return nvml


def test_gpus_that_torch_cannot_use_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml((9, 0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _found("GPU 0").found == "NVIDIA H100 80GB HBM3, 80 GiB, 79 free, sm_90"
    assert _found("CUDA").status == BROKEN and "FUSEMEGA_DEVICE=cpu" in _found("CUDA").note


@pytest.mark.parametrize(("capability", "note"), [((9, 0), ""), ((8, 0), "no FP8"), ((7, 0), "no bf16, no FP8")])
def test_what_a_gpu_cannot_do(capability: tuple[int, int], note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml(capability))
    driver, gpu = environment._gpus()
    assert (driver.found, gpu.note) == ("570.1", note)


def test_a_lost_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml((9, 0), lost=True))
    assert list(environment._gpus())[1:] == [Fact("GPU 0", "-", BROKEN, "GPU is lost")]


def test_small_shared_memory_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small = types.SimpleNamespace(total=64 << 20, free=64 << 20)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: small)
    assert _found("shared memory").status == MISSING and "--shm-size" in _found("shared memory").note
