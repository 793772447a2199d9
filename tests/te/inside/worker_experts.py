"""Layers of experts by both specs on two ranks, in several layouts: the same weights, shards, logits and gradients.

    worker_experts.py WORK

Reports for each model and layout what Transformer Engine's layers, with grouped products, have other than local ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.te import stand_in

stand_in.install()

import torch  # noqa: E402

from fusemega.checkpoint.torch_dist import load_model, save_model  # noqa: E402
from fusemega.hf.export import export_hf  # noqa: E402
from fusemega.hf.folder import HFFolder  # noqa: E402
from fusemega.hf.load import load_hf  # noqa: E402
from fusemega.losses.apply import objective_loss  # noqa: E402
from fusemega.losses.sft import SFT  # noqa: E402
from fusemega.models.build import GPT, build_model, placements  # noqa: E402
from fusemega.models.dense_logits import dense_logits  # noqa: E402
from fusemega.passes.forward import run_schedule  # noqa: E402
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown  # noqa: E402
from fusemega.runtime.precision import LOCAL, Kernels  # noqa: E402
from fusemega.training.optimizer import OptimizerSection, wrap  # noqa: E402
from tests.distributed.launch import report  # noqa: E402
from tests.distributed.workers.families import row_of  # noqa: E402
from tests.te.inside.test_specs import sharded  # noqa: E402

TE = Kernels(transformer_engine=True)
_TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_EP2, _ETP1 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": _EP2,
    "TP2": _TP2,
    "TP2xEP2": _TP2 | _EP2 | _ETP1,
}
# A router that sends tokens to few experts: some of the others get none.
TEXTS = [[5, 9, 5, 9, 5, 9, 5], [7, 7, 7, 7, 7]]


def by_hf_name(model: GPT, world: World) -> dict[str, torch.nn.Parameter]:
    """The parameters by the first of the tensors that each is made of."""
    return {next(iter(placement.rule.hf_shapes())): placement.parameter for placement in placements(model, world)}


def gradients(model: GPT, world: World) -> tuple[dict[str, torch.Tensor], float]:
    """Those of the mean cross-entropy of a row, after all ranks' are summed; and their norm."""
    batch = row_of(TEXTS, world.layout.segment_multiple)
    ddp, optimizer = wrap(model, OptimizerSection(lr=1e-3, use_distributed_optimizer=False, clip_grad=0.0))
    counts: dict[str, torch.Tensor | float] = {"lm": len(batch.labels) * world.dp_size}

    def loss_function(hidden_NH: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = objective_loss(SFT(), model, hidden_NH, batch, counts, world)
        return loss, loss.detach()

    run_schedule(ddp, [batch], loss_function, world, forward_only=False)
    optimizer.prepare_grads()
    found = {name: parameter.main_grad.clone() for name, parameter in by_hf_name(model, world).items()}
    return found, float(optimizer.get_grad_norm())


def compared(folder: Path, label: str, world: World) -> dict[str, Any]:
    """One model in one layout."""
    architecture = HFFolder(folder).architecture
    local, te = (build_model(architecture, world, torch.float32, kernels) for kernels in (LOCAL, TE))
    for model in (local, te):
        load_hf(model, folder, world)
    ours, theirs = by_hf_name(local, world), by_hf_name(te, world)
    marks = [
        name
        for name, parameter in theirs.items()
        for mark, default in {"tensor_model_parallel": False, "allreduce": True, "sequence_parallel": False}.items()
        if getattr(parameter, mark, default) != getattr(ours[name], mark, default)
    ]
    wanted, got = (dense_logits(model, world, TEXTS) for model in (local, te))
    assert wanted is not None and got is not None
    out: dict[str, Any] = {"marks": marks, "shards": sharded(te) == sharded(local)}
    out |= {"logits": float((got - wanted).abs().max()), "largest": float(wanted.abs().max())}
    export_hf(te, folder.with_name(f"{folder.name}.{label}"), folder, world)
    saved = folder.with_name(f"{folder.name}.{label}.saved")
    if world.is_main:
        saved.mkdir()
    world.barrier()
    save_model(te, saved)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.fill_(float("nan"))
    load_model(local, saved)
    out["loaded"] = all(torch.equal(theirs[name], parameter) for name, parameter in ours.items())
    found = [gradients(model, world) for model in (local, te)]
    (mine, out["norm"]), (their, out["te_norm"]) = found
    scale = max(float(gradient.norm()) for gradient in mine.values())
    out["gradients"] = max(float((their[name] - mine[name]).norm()) for name in mine) / scale
    out["unused"] = sum(not gradient.any() for name, gradient in mine.items() if "experts" in name)
    return out


def main() -> None:
    work = Path(sys.argv[1])
    results = {}
    for label, layout in LAYOUTS.items():
        world = initialize(ParallelConfig(**layout))
        for name in ("mixtral", "qwen3_moe") if label == "EP2" else ("mixtral",):
            results[f"{name} {label}"] = compared(work / name, label, world)
    report(results)
    shutdown()


if __name__ == "__main__":
    main()
