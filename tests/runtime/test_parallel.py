"""Parallel dimensions: refused before a process group is joined, and right for one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fusemega
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.runtime.meeting import lost_peer
from fusemega.runtime.parallel import GROUP_TIMEOUT, HOST_TIMEOUT, ParallelConfig, environment_rank, initialize
from fusemega.runtime.together import on_main


def test_one_process_needs_no_launcher() -> None:
    world = initialize(ParallelConfig())
    assert (world.rank, world.world_size, world.tp_size, world.pp_size, world.dp_size) == (0, 1, 1, 1, 1)
    assert world.is_main and world.is_first_stage and world.is_last_stage
    x = torch.ones(2)
    torch.distributed.all_reduce(x, group=world.tp_group)
    assert torch.equal(x, torch.ones(2))


def test_what_is_not_computed_has_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's group would be used by object collectives, and end ranks that wait while the main one tokenizes."""
    world = initialize(ParallelConfig())
    assert initialize(ParallelConfig()).host_group is world.host_group  # another layout, the same world
    assert world.host_group is not torch.distributed.group.WORLD
    assert torch.distributed.get_backend(world.host_group) == "gloo" and HOST_TIMEOUT > 24 * GROUP_TIMEOUT
    used = []
    for name in ("broadcast_object_list", "all_gather_object", "barrier"):
        real = getattr(torch.distributed, name)

        def spy(*arguments: Any, real: Any = real, **keywords: Any) -> Any:
            used.append(keywords.get("group", arguments[-1]))
            return real(*arguments, **keywords)

        monkeypatch.setattr(torch.distributed, name, spy)
    assert world.from_main({"a": 1}) == {"a": 1} and world.from_all("b") == ["b"]
    world.barrier()
    on_main(world, lambda: None)
    assert used == [world.host_group] * 4


def test_no_other_collective_of_objects() -> None:
    for path in Path(fusemega.__file__).parent.rglob("*.py"):
        calls = re.findall(r"dist\.(?:\w+_object(?:_list)?|barrier)\(.*", path.read_text())
        assert path.name == "parallel.py" or all("host_group" in call for call in calls), (path, calls)


def test_a_lost_peer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun or srun, where no launcher of ours tells which rank it was."""
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:3\n more")
    assert lost_peer(gone) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert re.match(r"rank 1 on .*: another rank has ended .* \(\[gloo.*\[10.0.0.2\]:3\)$", str(lost_peer(gone)))
    assert lost_peer(RuntimeError("shapes do not fit")) is None


def test_a_world_that_does_not_divide_is_named() -> None:
    config = ParallelConfig(tensor_model_parallel_size=3, pipeline_model_parallel_size=2)
    assert config.data_parallel_size(12) == 2
    with pytest.raises(UserError, match=r"3 x .* 2 = 6 does not divide the 4 process"):
        config.data_parallel_size(4)
    with pytest.raises(UserError, match="does not divide the 1 process"):
        initialize(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tensor_model_paralel_size": 2}, "paralel_size: unknown key .*did you mean 'tensor_model_parallel"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size: .*greater than or equal to 1.*found 0"),
        ({"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size of 2"),
    ],
)
def test_bad_layouts(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ParallelConfig, data, "run.yaml")


def test_srun_variables_stand_in_for_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert environment_rank() == (0, 1, 0)
    slurm = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    for name, value in {**slurm, "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # set by the function: let monkeypatch undo it
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert environment_rank() == (5, 8, 1)
