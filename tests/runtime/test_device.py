"""Which device a process takes, and what is refused, without a GPU: what torch and the machine say is put there."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fusemega.errors import UserError
from fusemega.runtime import device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """`gpus`: how many torch sees; `files`: a folder in place of /dev; `nvml`: how many the driver counts."""
    state = SimpleNamespace(gpus=0, files=tmp_path, nvml=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state.gpus)
    monkeypatch.setattr(device, "_DEVICE_FILES", tmp_path)
    monkeypatch.setattr(device, "_nvml_devices", lambda: state.nvml)
    for name in ("CUDA_VISIBLE_DEVICES", device.WANTED):
        monkeypatch.setenv(name, "")  # what the code sets is undone
        monkeypatch.delenv(name)
    return state


@pytest.mark.parametrize(
    ("gpus", "local_rank", "index"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (2, 1, 1)], ids=lambda value: str(value)
)
def test_a_process_takes_the_only_gpu_or_that_of_its_rank(
    machine: SimpleNamespace, gpus: int, local_rank: int, index: int
) -> None:
    machine.gpus = gpus
    assert device.own_device(local_rank) == torch.device("cuda", index)


def test_more_processes_than_gpus(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.gpus = 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match=r"^LOCAL_RANK 2, and this process sees 2 GPUs \(CUDA_VISIBLE_DEVICES=4,5\)"):
        device.own_device(2)


def test_a_machine_without_a_gpu_computes_on_its_cpu(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # the usual build, also where there is no GPU
    assert device.own_device(0) == torch.device("cpu")


def test_a_gpu_that_cannot_be_used_is_refused(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.nvml = 8
    with pytest.raises(UserError, match=r"^torch \(.*\) finds no usable GPU, and the driver \(NVML\) counts 8; .*=cpu"):
        device.own_device(0)
    (machine.files / "nvidia0").touch()
    (machine.files / "nvidiactl").touch()
    with pytest.raises(UserError, match="and there is /dev/nvidia0"):
        device.own_device(0)
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device.own_device(0) == torch.device("cpu"), "whoever hides the GPUs has said so"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (machine.files / "nvidia0").unlink()
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=0 names one"):
        device.own_device(0)
    monkeypatch.setenv(device.WANTED, "cpu")
    assert device.own_device(0) == torch.device("cpu")


def test_what_is_wanted_can_be_said(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.WANTED, "cuda")
    with pytest.raises(UserError, match="FUSEMEGA_DEVICE=cuda asks for one"):
        device.own_device(0)
    monkeypatch.setenv(device.WANTED, "cpus")
    with pytest.raises(UserError, match=r"FUSEMEGA_DEVICE.*'cpus'.*did you mean 'cpu'"):
        device.hide_gpus_if_unwanted()
    monkeypatch.setenv(device.WANTED, "cpu")
    device.hide_gpus_if_unwanted()
    assert device.os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("ranks", "verdict"),
    [
        ([("a", "cuda:0", "G1"), ("a", "cuda:1", "G2"), ("b", "cuda:0", "G3")], ""),
        ([("a", "cuda:0", "G1"), ("b", "cuda:0", "G1")], ""),  # two machines may count alike
        ([("a", "cpu", ""), ("a", "cpu", "")], ""),
        ([("a", "cuda:0", "G1"), ("b", "", "CUDA broke")], "rank 1 on b: CUDA broke"),
        ([("b", "", "CUDA broke")], "CUDA broke"),
        (
            [("a", "cuda:0", "G1"), ("a", "cuda:1", "G2"), ("b", "cpu", "")],
            "rank 0 on a computes on cuda, rank 2 on b computes on cpu",
        ),
        (
            [("a", "cuda:0", "G1"), ("a", "cuda:1", "G2"), ("a", "cuda:0", "G1")],
            "ranks 0 and 2 are both on the GPU G1 of a",
        ),
    ],
)
def test_every_rank_is_told_the_same(
    ranks: list[tuple[str, str, str]], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    told: dict[int, str] = {}
    names = threading.local()
    monkeypatch.setattr(device.socket, "gethostname", lambda: names.host)
    monkeypatch.setattr(device, "_identity", lambda own: names.id)

    def own_device(rank: int) -> torch.device:
        if not names.kind:
            raise UserError(names.id)
        return torch.device(names.kind)

    monkeypatch.setattr(device, "own_device", own_device)

    def one(rank: int) -> None:
        names.host, names.kind, names.id = ranks[rank]
        try:
            assert device.agreed_device(rank, store, rank, len(ranks)) == torch.device(names.kind)
            told[rank] = ""
        except UserError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(len(ranks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(told) == list(range(len(ranks))) and len(set(told.values())) == 1
    assert verdict in told[0] and bool(verdict) == bool(told[0])
