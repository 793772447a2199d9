"""Logits, gradients and exported weights of several small models under every layout of four ranks.

    families.py WORK [LAYOUTS]    with folders WORK/<name>/ and texts in WORK/texts.json: token ids of segments packed
        in one row; LAYOUTS: a key of `MATRICES`

Leaves WORK/<name>.<layout>/ (the weights as they came back), WORK/<name>.<layout>.gradients/ (in the weights' place,
the gradients of the mean next-token cross-entropy), for the models of SEQUENCES also WORK/<name>.<layout>.sequences/
and .groups/ (those of losses that couple the tokens of a text, and two texts), and WORK/<name>.<layout>.logits.pt where
rows are whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.losses.apply import objective_loss
from fusemega.losses.registry import Objective
from fusemega.losses.sft import SFT
from fusemega.models.build import GPT, build_model, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.passes.forward import run_schedule
from fusemega.passes.layers import Point, handed_out
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown
from fusemega.text.packing import padded
from fusemega.training.optimizer import OptimizerSection, wrap
from tests.distributed.launch import report
from tests.losses.pairwise import Pairwise
from tests.losses.sequence_mean import SequenceMean

TP2, TP4 = ({"tensor_model_parallel_size": size} for size in (2, 4))
CP2, CP4 = ({"context_parallel_size": size} for size in (2, 4))
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1PP1": {},
    "TP2PP1": TP2,
    "TP2PP1SP": TP2 | SP,
    "TP4PP1": TP4,
    "TP4PP1SP": TP4 | SP,
    "TP1PP2": PP2,
    "TP2PP2SP": TP2 | SP | PP2,
    "CP4": CP4,
    "TP2SPCP2": TP2 | SP | CP2,
    "CP2PP2VPP2": CP2 | PP2 | {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
}
EP2, EP4 = ({"expert_model_parallel_size": size} for size in (2, 4))
ETP1, ETP2 = ({"expert_tensor_parallel_size": size} for size in (1, 2))
EXPERTS: dict[str, dict[str, Any]] = {
    "EP2 allgather": EP2 | {"moe_token_dispatcher_type": "allgather"},
    "EP4": EP4,
    "TP2SPEP2": TP2 | SP | EP2,
    "TP4SPETP1": TP4 | SP | ETP1,
    "PP2EP2": PP2 | EP2,
    "CP2EP4": CP2 | EP4,
}
MORE_EXPERTS: dict[str, dict[str, Any]] = {
    "EP1": {},
    "EP2": EP2,
    "TP2SP": TP2 | SP,
    "TP2SPEP4ETP1": TP2 | SP | EP4 | ETP1,
    "EP2ETP2": EP2 | ETP2,
    "PP2VPP2EP2": PP2 | EP2 | {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
}
MATRICES = {"dense": LAYOUTS, "experts": EXPERTS, "more experts": MORE_EXPERTS}
SEQUENCES = ("qwen2-windowed-tied", "qwen3-windowed", "mixtral", "gemma2")


def row_of(texts: list[list[int]], multiple: int) -> MicroBatch:
    """One packed row in which every token but the first of a text is predicted; segments are padded to a multiple."""
    lengths = [len(text) for text in texts]
    sizes = padded(lengths, multiple).tolist()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ids = torch.tensor([token for text, n in zip(texts, sizes, strict=True) for token in text + [0] * (n - len(text))])
    positions = torch.cat([torch.arange(s, s + n - 1) for s, n in zip(starts, lengths, strict=True)])
    counts = torch.tensor(lengths) - 1
    return MicroBatch(
        tokens=ids[None],
        position_ids=torch.cat([torch.arange(size) for size in sizes])[None],
        cu_seqlens=torch.tensor([*starts, len(ids)]).int(),
        bounds=(*starts, len(ids)),
        prefixes=((0, 0),) * len(texts),
        max_seqlen=max(sizes),
        positions=positions,
        labels=ids[positions + 1],
        sequences=torch.arange(len(texts)).repeat_interleave(counts),
        sequence_tokens=counts,
        last_tokens=torch.tensor(starts) + torch.tensor(lengths) - 1,
        groups=torch.arange(len(texts)) // 2,  # pairs, of which the first text is chosen
        group_sizes=torch.full((len(texts) // 2,), 2),
        sequence_fields={"number": (torch.arange(len(texts)) + 1.0) % 2},
        group_fields={"has_rewards": torch.zeros(len(texts) // 2, dtype=torch.bool)},
        sources=("",) * len(texts),
        num_positions=len(positions),
        texts=tuple(lengths),
    )


POINTS = {"input 3": Point(3, "input"), "mlp_input 1": Point(1, "mlp_input"), "output 2": Point(2)}


def hidden_errors(
    model: GPT, batch: MicroBatch, part: MicroBatch, wanted: dict[str, torch.Tensor], world: World
) -> dict[str, float]:
    """Of the points that this rank holds: the relative error against `wanted`, the states of the texts' tokens."""
    starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = (batch.sequence_tokens + 1).tolist()
    real = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    found: dict[Point, list[torch.Tensor]] = {}

    def nothing(hidden_NH: torch.Tensor, _: MicroBatch) -> tuple[torch.Tensor, None]:
        return hidden_NH.new_zeros(()), None

    micro_batches = [part] * world.layout.micro_batch_multiple
    with handed_out(model, list(POINTS.values()), lambda p, h: found.setdefault(p, []).append(h), world) as held:
        run_schedule(list(model.chunks), micro_batches, nothing, world, forward_only=True)
    assert set(held) == found.keys() and all(len(states) == len(micro_batches) for states in found.values())
    errors = {}
    for name, point in POINTS.items():
        if point in found:
            whole_TH = torch.full((batch.tokens.size(1), wanted[name].size(1)), torch.nan)
            whole_TH[real] = wanted[name]
            if world.cp_size > 1:
                whole_TH = whole_TH[zigzag(batch.cu_seqlens, world.cp_rank, world.cp_size)]
            here = ~whole_TH.isnan()
            errors[name] = float((found[point][-1][here] - whole_TH[here]).norm() / whole_TH[here].norm())
    return errors


def one_model(folder: Path, label: str, texts: list[list[int]], world: World) -> dict[str, Any]:
    """Everything one model shows under one layout."""
    model = build_model(HFFolder(folder).architecture, world, torch.float32)
    load_hf(model, folder, world)
    out = folder.with_name(f"{folder.name}.{label}")
    export_hf(model, out, folder, world)
    if world.cp_size == 1:
        logits_SV = dense_logits(model, world, texts)
        if logits_SV is not None and world.dp_rank == 0 and world.tp_rank == 0:
            torch.save(logits_SV, f"{out}.logits.pt")

    batch = row_of(texts, world.layout.segment_multiple)
    part = batch.context_part(world.cp_rank, world.cp_size) if world.cp_size > 1 else batch
    hidden = hidden_errors(model, batch, part, torch.load(folder / "hidden.pt"), world)
    ddp, optimizer = wrap(model, OptimizerSection(lr=1e-3, use_distributed_optimizer=False, clip_grad=0.0))
    decay = {id(parameter): group["wd_mult"] for group in optimizer.param_groups for parameter in group["params"]}
    # Each data-parallel rank brings the same row, several times where the schedule wants several.
    times = world.dp_size * world.layout.micro_batch_multiple
    counts = {"lm": len(batch.labels), "sequence": len(texts), "pairwise": len(texts) // 2}
    denominators: dict[str, torch.Tensor | float] = {name: count * times for name, count in counts.items()}

    def backward(objective: Objective[Any]) -> None:
        def loss_function(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            loss, _ = objective_loss(objective, model, hidden_NH, batch, denominators, world)
            return loss, loss.detach()

        for chunk in ddp:
            chunk.zero_grad_buffer()
        run_schedule(ddp, [part] * world.layout.micro_batch_multiple, loss_function, world, forward_only=False)

    coupled: dict[str, list[torch.Tensor]] = {}
    if folder.name in SEQUENCES:
        for kind, objective in (("sequences", SequenceMean()), ("groups", Pairwise(Pairwise.Settings()))):
            backward(objective)
            coupled[kind] = [placement.parameter.main_grad.clone() for placement in placements(model, world)]
    backward(SFT())
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    unequal = 0.0
    seen: dict[str, Any] = {"norm": norm, "decayed": [], "plain": [], "hidden": hidden}
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
    for kind, gradients in coupled.items():
        with torch.no_grad():
            for placement, gradient in zip(placements(model, world), gradients, strict=True):
                placement.parameter.copy_(gradient)
        export_hf(model, Path(f"{out}.{kind}"), folder, world)
    return seen | {"unequal": unequal}


def main() -> None:
    work = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for label, layout in MATRICES[(*sys.argv, "dense")[2]].items():
        world = initialize(ParallelConfig(**layout))
        for name, texts in json.loads((work / "texts.json").read_text()).items():
            results[f"{name} {label}"] = one_model(work / name, label, texts, world)
    report(results)
    shutdown()


if __name__ == "__main__":
    main()
