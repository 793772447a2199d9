"""Models whose head or layers are not the usual ones, trained on two ranks.

    parts.py WORK    with folders WORK/score, WORK/blocks and texts in WORK/texts.json, of segments packed in one row

Leaves, for each of them and each layout, WORK/<name>.<layout>.gradients (of the first step, in the weights' place) and
WORK/<name>.<layout> (the weights after all steps); WORK/blocks.saved, Megatron's own checkpoint of the second.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemega.checkpoint.megatron_folder import MegatronFolder, describe_source
from fusemega.checkpoint.torch_dist import save_model
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import verify
from fusemega.files.integrity import write_integrity
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.losses.apply import objective_loss
from fusemega.losses.sft import SFT
from fusemega.models.build import GPT, build_model, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.passes.forward import LossFunction, run_schedule
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown
from fusemega.training.optimizer import OptimizerSection, wrap
from tests.distributed.launch import report
from tests.distributed.workers.families import PP2, SP, TP2, row_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": TP2,
    "TP2SP": TP2 | SP,
    "PP2 uneven": PP2 | {"num_layers_in_first_pipeline_stage": 1},
}
STEPS, LR = 3, 2e-3


def preference(model: GPT, rows: int) -> LossFunction:
    """Bradley-Terry over the scores of each sequence's last token: the first of two sequences is the better one."""

    def loss_function(hidden_SH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        scores_S = model.scores(hidden_SH)
        margins = scores_S[0::2] - scores_S[1::2]
        loss = -torch.nn.functional.logsigmoid(margins).mean() / rows
        return loss, scores_S.detach()

    return loss_function


def next_token(model: GPT, world: World, tokens: int) -> LossFunction:
    """The mean cross-entropy, as SFT trains."""

    def loss_function(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = objective_loss(SFT(), model, hidden_NH, batch, {"lm": tokens}, world)
        return loss, loss.detach()

    return loss_function


def export_gradients(model: GPT, out: Path, folder: Path, world: World) -> float:
    """In the weights' place; and by how much tensor-parallel ranks differ where they hold the same."""
    unequal = 0.0
    with torch.no_grad():
        weights = [parameter.clone() for parameter in model.parameters()]
        for placement in placements(model, world):
            gradient = placement.parameter.main_grad
            placement.parameter.copy_(gradient)
            if placement.rule.partition_dim is None:
                parts = [torch.empty_like(gradient) for _ in range(world.tp_size)]
                dist.all_gather(parts, gradient.contiguous(), group=world.tp_group)
                unequal = max(unequal, *(float((part - parts[0]).abs().max()) for part in parts))
        export_hf(model, out, folder, world)
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return unequal


def train(folder: Path, label: str, texts: list[list[int]], world: World) -> dict[str, Any]:
    """STEPS updates; what the first one's gradients were, and the scores of the last forward pass."""
    model = build_model(HFFolder(folder).architecture, world, torch.float32)
    load_hf(model, folder, world)
    out = folder.with_name(f"{folder.name}.{label}")
    seen: dict[str, Any] = {"heads": sum("score" in name for name, _ in model.named_parameters())}
    scalar = model.architecture.head == "scalar"
    if not scalar:
        logits_SV = dense_logits(model, world, texts)
        if logits_SV is not None and world.dp_rank == 0 and world.tp_rank == 0:
            torch.save(logits_SV, f"{out}.logits.pt")
    sharded = label == "DP2"  # whose gradients lie in shards after the step
    settings: dict[str, Any] = {"lr": LR, "lr_decay_style": "constant", "clip_grad": 0.0}
    ddp, optimizer = wrap(model, OptimizerSection(use_distributed_optimizer=sharded, **settings))
    batch = row_of(texts, world.layout.segment_multiple)
    rows = world.dp_size  # each data-parallel rank brings the same row
    if scalar:
        batch = replace(batch, positions=batch.last_tokens)
        loss_function = preference(model, rows)
    else:
        loss_function = next_token(model, world, len(batch.labels) * rows)
    for step in range(STEPS):
        for chunk in ddp:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        collected = run_schedule(ddp, [batch], loss_function, world, forward_only=False)
        if step == 0:
            seen["first"] = [value.tolist() for value in collected]
            if not sharded:
                seen["unequal"] = export_gradients(model, Path(f"{out}.gradients"), folder, world)
        optimizer.step()
    export_hf(model, out, folder, world)
    trained = run_schedule(list(model.chunks), [batch], loss_function, world, forward_only=True)
    return seen | {"trained": [value.tolist() for value in trained]}


def stored(work: Path, name: str, world: World) -> list[bool]:
    """What `convert` and megatron-core's own writer make of a model under this layout: each loads as the other."""
    folder = work / name
    if world.is_main:
        import_hf(folder, work / f"{name}.imported")
        (work / f"{name}.saved" / "weights").mkdir(parents=True)
    world.barrier()
    model = build_model(HFFolder(folder).architecture, world, torch.float32)
    load_hf(model, folder, world)
    save_model(model, work / f"{name}.saved" / "weights")
    if world.is_main:
        describe_source(work / f"{name}.saved", HFFolder(folder), model.architecture.hf_shapes(), {})
        write_integrity(work / f"{name}.saved")
    world.barrier()
    loaded = MegatronFolder(work / f"{name}.imported").load(world)
    pairs = zip(model.parameters(), loaded.parameters(), strict=True)
    same = [all(torch.equal(a, b) for a, b in pairs)]
    if world.is_main:
        export_megatron(work / f"{name}.saved", work / f"{name}.exported")
        same += [verify(folder, work / f"{name}.{other}").identical for other in ("imported", "saved", "exported")]
    return same


def main() -> None:
    work = Path(sys.argv[1])
    texts = json.loads((work / "texts.json").read_text())
    results: dict[str, Any] = {}
    for label, layout in LAYOUTS.items():
        world = initialize(ParallelConfig(**layout))
        for name in ("score", "blocks"):
            results[f"{name} {label}"] = train(work / name, label, texts, world)
        if label == "PP2 uneven":
            results |= {f"{name} stored": stored(work, name, world) for name in ("score", "blocks")}
    report(results)
    shutdown()


if __name__ == "__main__":
    main()
