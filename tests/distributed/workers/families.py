"""Logits, gradients and exported weights of several small models under every layout of four ranks.

    families.py WORK    with folders WORK/<name>/ and texts in WORK/texts.json: token ids of segments packed in one row

Leaves WORK/<name>.<layout>/ (the weights as they came back), WORK/<name>.<layout>.gradients/ (in the weights' place,
the gradients of the mean next-token cross-entropy) and, on one last-stage rank, WORK/<name>.<layout>.logits.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemega.checkpoint.hf_export import export_hf
from fusemega.checkpoint.hf_folder import HFFolder
from fusemega.checkpoint.hf_load import load_hf
from fusemega.losses.sft import SFT
from fusemega.models.build import build_model, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown
from fusemega.training.forward import Batch, head_settings, run_schedule
from fusemega.training.optimizer import OptimizerSection, wrap
from tests.distributed.launch import report

LAYOUTS = {
    "TP1PP1": (1, 1, False),
    "TP2PP1": (2, 1, False),
    "TP2PP1SP": (2, 1, True),
    "TP4PP1": (4, 1, False),
    "TP4PP1SP": (4, 1, True),
    "TP1PP2": (1, 2, False),
    "TP2PP2SP": (2, 2, True),
}


def row_of(texts: list[list[int]]) -> Batch:
    """One packed row in which every token but the first of a text is predicted."""
    ids = torch.tensor([token for text in texts for token in text])
    ends = torch.tensor([len(text) for text in texts]).cumsum(0)
    predicts_nothing = torch.zeros(len(ids), dtype=torch.bool)
    predicts_nothing[ends - 1] = True
    positions = (~predicts_nothing).nonzero().flatten()
    return {
        "tokens": ids[None],
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts])[None],
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
        "max_seqlen": max(len(text) for text in texts),
        "positions": positions,
        "labels": ids[positions + 1],
    }


def one_model(folder: Path, label: str, texts: list[list[int]], world: World) -> dict[str, Any]:
    """Everything one model shows under one layout."""
    model = build_model(HFFolder(folder).config, world, torch.float32)
    load_hf(model, folder, world)
    out = folder.with_name(f"{folder.name}.{label}")
    export_hf(model, out, folder, world)
    logits_SV = dense_logits(model, world, texts)
    if logits_SV is not None and world.dp_rank == 0 and world.tp_rank == 0:
        torch.save(logits_SV, f"{out}.logits.pt")

    ddp, optimizer = wrap(model, OptimizerSection(lr=1e-3, use_distributed_optimizer=False, clip_grad=0.0))
    decay = {id(parameter): group["wd_mult"] for group in optimizer.param_groups for parameter in group["params"]}
    ddp[0].zero_grad_buffer()
    batch = row_of(texts)
    objective = SFT()
    # Each data-parallel rank brings the same row: together they are one row counted dp_size times.
    denominators = {"lm": torch.tensor(float(len(batch["labels"]) * world.dp_size))}

    def loss_function(hidden_NH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = objective.loss(hidden_NH, model.head_weight(), batch, denominators, head_settings(model, world))
        return loss, loss.detach()

    run_schedule(ddp, [batch], loss_function, world, forward_only=False)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    unequal = 0.0
    seen: dict[str, Any] = {"norm": norm, "decayed": [], "plain": []}
    with torch.no_grad():
        for placement in placements(model, world):
            kind = "decayed" if decay[id(placement.parameter)] else "plain"
            seen[kind].append(".".join(placement.rule.megatron.split(".")[-2:]))
            placement.parameter.copy_(placement.parameter.main_grad)
            if placement.rule.partition_dim is None:
                gradient = placement.parameter.detach()
                parts = [torch.empty_like(gradient) for _ in range(world.tp_size)]
                dist.all_gather(parts, gradient.contiguous(), group=world.tp_group)
                unequal = max(unequal, *(float((part - parts[0]).abs().max()) for part in parts))
    export_hf(model, Path(f"{out}.gradients"), folder, world)
    return seen | {"unequal": unequal}


def main() -> None:
    work = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for label, (tp, pp, sequence_parallel) in LAYOUTS.items():
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        world = initialize(ParallelConfig(**sizes, sequence_parallel=sequence_parallel))
        for name, texts in json.loads((work / "texts.json").read_text()).items():
            results[f"{name} {label}"] = one_model(work / name, label, texts, world)
    report(results)
    shutdown()


if __name__ == "__main__":
    main()
