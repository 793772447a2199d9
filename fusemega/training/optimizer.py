"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule from one section of the run file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import Field, model_validator

from fusemega.config import Section
from fusemega.models.build import GPT
from fusemega.runtime.cpu_backend import fuse_gradient_accumulation


class OptimizerSection(Section):
    """AdamW as Megatron runs it. Names and meanings are Megatron's arguments."""

    lr: float = Field(gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field("cosine", description="shape after the warm-up")
    lr_warmup_fraction: float = Field(0.0, ge=0, lt=1, description="share of the iterations spent warming up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; norms and biases are never decayed")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second moment")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0 clips nothing")
    use_distributed_optimizer: bool = Field(True, description="shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = Field(False, description="sum gradients over data-parallel ranks during backward")
    overlap_param_gather: bool = Field(False, description="gather updated parameters during the next forward")

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimizerSection:
        """min_lr must not be larger than lr."""
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self

    @model_validator(mode="after")
    def _gathering_needs_shards(self) -> OptimizerSection:
        """overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce."""
        for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if self.overlap_param_gather and not getattr(self, name):
                raise ValueError(f"overlap_param_gather needs {name}: true")
        return self


def wrap(model: GPT, section: OptimizerSection) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """The model's chunks under DistributedDataParallel (fp32 main gradients) and its optimizer.

    The objective divides by global denominators itself, so Megatron's own divisions are switched off:
    `calculate_per_token_loss` makes data and context parallelism *sum* gradients (distributed_data_parallel.py:262) and
    the schedules leave the loss alone (schedules.py:263); `num_tokens` is withheld from `finalize_model_grads`.

    Args:
        model: what this rank holds, in its training dtype (fp32 or bf16).
        section: the run file's `optimizer`.
    """
    config = model.config
    dtype = config.params_dtype
    config.calculate_per_token_loss = True
    fuse_gradient_accumulation(model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=section.use_distributed_optimizer,
        overlap_grad_reduce=section.overlap_grad_reduce,
        overlap_param_gather=section.overlap_param_gather,
    )
    ddp = [
        # As Megatron does it: only the first chunk's communication is on the critical path, and worth cutting up.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=section.use_distributed_optimizer,
        overlap_param_gather=section.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, ddp, config_overrides=get_standard_config_overrides(settings))
    config.finalize_model_grads_func = lambda chunks, num_tokens=None, **kw: finalize_model_grads(chunks, None, **kw)
    config.grad_scale_func = optimizer.scale_loss
    if section.overlap_grad_reduce:
        # Gradients are reduced only while the last micro-batch is computed.
        config.no_sync_func = ddp[0].no_sync if len(ddp) == 1 else [chunk.no_sync for chunk in ddp]
    return ddp, optimizer


def complete_parameters(ddp: Sequence[DistributedDataParallel]) -> None:
    """Gather every parameter that the last update left in shards (overlap_param_gather). Collective.

    For code that reads parameters without a training forward: evaluation, checkpoints, export.
    """
    for chunk in ddp:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def schedule(optimizer: MegatronOptimizer, section: OptimizerSection, train_iters: int) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in iterations; update number n (from 0) uses the rate at n.

    The warm-up starts at lr / (warmup + 1) rather than at 0, where Megatron's first update would change nothing.
    """
    # Megatron asserts that the warm-up is shorter than the decay.
    warmup = min(round(section.lr_warmup_fraction * train_iters), train_iters - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr / (warmup + 1),
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=train_iters,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
    )
