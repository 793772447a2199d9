"""Parallel dimensions: refused before a process group is joined, and right for one process."""

from __future__ import annotations

import pytest
import torch

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.runtime.parallel import ParallelConfig, environment_rank, initialize


def test_one_process_needs_no_launcher() -> None:
    world = initialize(ParallelConfig())
    assert (world.rank, world.world_size, world.tp_size, world.pp_size, world.dp_size) == (0, 1, 1, 1, 1)
    assert world.is_main and world.is_first_stage and world.is_last_stage
    x = torch.ones(2)
    torch.distributed.all_reduce(x, group=world.tp_group)
    assert torch.equal(x, torch.ones(2))


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
