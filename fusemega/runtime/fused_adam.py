"""Adam for machines without Transformer Engine and apex.

megatron-core then falls back to torch.optim.AdamW, which keeps `step` as a tensor of each parameter. Its distributed
optimizer cannot load such a state: a run saves, and ends with an AssertionError when it resumes (optimizer/
distrib_optimizer.py:642, which expects the state before it exists; then :825 and :940).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) with the interface and state layout of TE's and apex's FusedAdam, over torch's fused kernel.

    `step` lives in the param group, `exp_avg` and `exp_avg_sq` (fp32, the parameter's shape) in the state: what
    megatron-core's DistributedOptimizer saves and loads.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **_: object,
    ) -> None:
        if not bias_correction:
            raise ValueError("this FusedAdam always corrects bias")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    def initialize_state(self, param: torch.Tensor) -> None:
        self.state[param] = {name: torch.zeros_like(param, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for param in params:
                if not self.state[param]:
                    self.initialize_state(param)
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                _steps(params, group["step"] - 1),  # the kernel adds 1 itself
                foreach=False,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )


def _steps(params: Sequence[torch.Tensor], step: int) -> list[torch.Tensor]:
    """`step` for each parameter on its own device, as the fused kernels want it; one allocation a device."""
    devices = {param.device for param in params}
    filled = {device: torch.full((len(params),), float(step), device=device).unbind() for device in devices}
    return [filled[param.device][number] for number, param in enumerate(params)]


def install() -> None:
    """Makes `FusedAdam` megatron-core's Adam in this process, unless TE or apex brings one. Idempotent."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    # Without CUDA, Transformer Engine's Adam could be imported, but not run.
    if distrib_optimizer.HAVE_APEX_OR_TE and torch.cuda.is_available():
        return
    patched: Any = optimizers
    patched.Adam, patched.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    patched = distrib_optimizer
    patched.Adam, patched.HAVE_APEX_OR_TE, patched.USING_TE_OPTIMIZER = FusedAdam, True, True
