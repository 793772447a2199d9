"""Process groups and parallel dimensions: one object that says who this process is.

Importing this module enables the CPU backend if there is no CUDA, and fixes megatron-core's own faults; nothing
above `runtime/` checks it again. It raises UserError if an installed package would make megatron-core compute wrongly.
"""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fusemega.runtime import cpu_backend, device, fused_adam, gradient_norm, kernel_packages, megatron_fixes, rope
from fusemega.runtime.console import debug
from fusemega.runtime.layout import ParallelConfig

# GPUs are hidden before anything asks CUDA, and harmful packages refused before megatron-core is imported.
device.hide_gpus_if_unwanted()
kernel_packages.refuse_harmful()
cpu_backend.enable()
megatron_fixes.apply()
rope.install()
fused_adam.install()
gradient_norm.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the backend is in place)

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(minutes=30)  # of ranks that compute in step; Megatron's default for its own groups
HOST_TIMEOUT = timedelta(days=7)  # of ranks that wait for the main one to tokenize data or write a model
_host: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # (the world's group, its twin for the host)


@dataclass(frozen=True)
class World:
    """This process's place: ranks, sizes, groups and device.

    Data-parallel ranks have different samples; `dp_cp_group` joins them with the ranks that share their tokens.
    The ranks of a pipeline stage are divided a second time for the experts of its layers: EP x expert TP, the rest
    replicas.
    `host_group` joins all ranks over gloo, for all but computation: there they wait for one another as long as it takes
    to tokenize a data set or to write a model, and no Python object goes through a GPU. `timeout` is of ranks that
    compute in step.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    expert_tp_rank: int
    expert_tp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    layout: ParallelConfig
    timeout: timedelta = GROUP_TIMEOUT

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def sequence_parallel(self) -> bool:
        return self.layout.sequence_parallel

    def barrier(self) -> None:
        dist.barrier(self.host_group)

    def from_main(self, value: T) -> T:
        """The main process's `value`, on every rank. Any object that can be pickled. Collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def from_all(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank. Collective."""
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank. Collective; the device is not waited for.

        For ranks that compute in step: it gives a rank that does not come `timeout`.
        """
        if self.world_size == 1:
            return value
        found = torch.tensor(value, dtype=torch.int64, device="cpu")
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True).wait(self.timeout)
        return int(found)

    def numbers_of_all(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's `values`, by rank, on every rank; each has as many. Collective; as `largest`."""
        mine = torch.tensor(values, dtype=torch.float64, device="cpu")
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, group=self.host_group, async_op=True).wait(self.timeout)
        return [each.tolist() for each in found]


def environment_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or srun set them; (0, 1, 0) without a launcher."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
            env["SLURM_PROCID"],
            env["SLURM_STEP_NUM_TASKS"],
            env["SLURM_LOCALID"],
        )
        if "MASTER_ADDR" not in env:
            hosts = subprocess.run(
                ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
                capture_output=True,
                text=True,
                check=True,
            )
            env["MASTER_ADDR"] = hosts.stdout.split()[0]
        # Jobs of one node must not meet on one port; the job id is what all ranks share.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))


def initialize(config: ParallelConfig, seed: int = 1234, timeout: timedelta = GROUP_TIMEOUT) -> World:
    """Join the process group and build Megatron's groups. One process needs no launcher.

    May be called again in the same process with another layout.

    Args:
        config: the layout.
        seed: seed of Megatron's random states (dropout); TP and PP ranks draw differently, others alike.
        timeout: how long ranks that compute in step wait for one that does not come.

    Raises:
        UserError: TP x CP x PP does not divide the world; this process has no device, or another kind than its peers.
    """
    rank, world_size, local_rank = environment_rank()
    config.data_parallel_size(world_size)  # called for its error
    if dist.is_initialized():
        own_device = device.own_device(local_rank)
    else:
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            store: dist.Store = dist.HashStore()
        else:
            store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
            store.set_timeout(max(timeout, GROUP_TIMEOUT))  # ranks may start at different times
        own_device = device.agreed_device(local_rank, store, rank, world_size)
        backend = "nccl" if own_device.type == "cuda" else "gloo"
        if own_device.type == "cuda":
            torch.cuda.set_device(own_device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    _free_groups()
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tp_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    world = World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=own_device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        host_group=host_group(),
        layout=config,
        timeout=timeout,
    )
    debug(
        f"rank {rank} of {world_size} on {own_device}: tensor {world.tp_rank} of {world.tp_size}, "
        f"stage {world.pp_rank} of {world.pp_size}, context {world.cp_rank} of {world.cp_size}, "
        f"data {world.dp_rank} of {world.dp_size}, experts {world.ep_rank} of {world.ep_size}"
    )
    return world


def shutdown() -> None:
    """Leave the process group; afterwards `initialize` needs a fresh process."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo (`World.host_group`); made once for the life of the world's group. Collective."""
    global _host
    everyone = dist.group.WORLD
    assert everyone is not None
    if _host is None or _host[0] is not everyone:
        real = dist.get_backend() in ("gloo", "nccl")  # torch's fake group has no peers that gloo could find
        _host = everyone, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) if real else everyone
    return _host[1]


def _free_groups() -> None:
    """Ends the groups of the previous layout with their threads; megatron-core forgets most of them. Collective."""
    groups = parallel_state._global_process_group_list or []
    if groups:
        dist.barrier()  # no rank may leave a group that another still talks in
    for group in groups:
        if group is not None:  # None stands for the world, which stays
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    if groups:
        del group, groups
        gc.collect()  # a model of that layout that nobody needs still refers to its groups, and is full of cycles
