"""Fills, exports and reloads one small model under every layout of four ranks; reports what each rank saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from fusemega.checkpoint.convert import MegatronFolder, export_megatron, import_hf, verify
from fusemega.checkpoint.hf_export import export_hf
from fusemega.checkpoint.hf_folder import HFFolder
from fusemega.checkpoint.hf_load import load_hf
from fusemega.errors import UserError
from fusemega.models.build import build_model, init_random, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown
from tests.distributed.launch import report

LAYOUTS = {
    "TP1PP1": (1, 1, False),
    "TP2PP1": (2, 1, True),
    "TP4PP1": (4, 1, False),
    "TP1PP2": (1, 2, False),
    "TP1PP4": (1, 4, False),
    "TP2PP2": (2, 2, True),
}


def world_of(tp: int, pp: int, sequence_parallel: bool) -> World:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return initialize(ParallelConfig(**sizes, sequence_parallel=sequence_parallel))


def padding_is_zero(model: Any, world: World) -> bool:
    """Every element outside the pieces is zero."""
    for placement in placements(model, world):
        outside = torch.ones_like(placement.parameter, dtype=torch.bool)
        for piece in placement.pieces:
            outside[tuple(slice(*span) for span in piece.local_box)] = False
        if placement.parameter[outside].count_nonzero():
            return False
    return True


def one_model(folder: Path, work: Path, world: World) -> dict[str, Any]:
    """Everything one model shows under one layout, in numbers and hashes."""
    hf_config = HFFolder(folder).config
    model = build_model(hf_config, world, torch.float32)
    with torch.no_grad():  # garbage that a missed element would keep
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_hf(model, folder, world)
    out: dict[str, Any] = {"padding": padding_is_zero(model, world)}
    out["split"] = sum(bool(getattr(p, "tensor_model_parallel", False)) for p in model.parameters())
    marks = [param_is_not_tensor_parallel_duplicate(p) for p in model.parameters()]
    out["counted"] = sum(marks)
    logits = dense_logits(model, world, [list(range(9)), list(range(7))])
    out["logits"] = None if logits is None else logits.double().sum(1).tolist()
    name = f"tp{world.tp_size}pp{world.pp_size}"
    export_hf(model, work / f"loaded-{name}", folder, world, max_shard_size=20_000)
    init_random(model, world, seed=5)
    export_hf(model, work / f"random-{name}", folder, world)
    world.barrier()
    if world.is_main:
        out["loaded_hash"] = HFFolder(work / f"loaded-{name}").content_hash()
        out["random_hash"] = HFFolder(work / f"random-{name}").content_hash()
    return out


def main() -> None:
    work = Path(sys.argv[1])
    out: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        world = world_of(*layout)  # a layout costs more than a model: some thirty process groups
        for kind in ("tied", "untied"):
            out[f"{kind} {name}"] = one_model(work / f"model-{kind}", work / kind, world)
    world = world_of(2, 2, True)
    import_hf(work / "model-tied", work / "megatron", world)
    world = world_of(4, 1, False)  # 101 rows of vocabulary: 102 were saved, 104 are wanted
    model = MegatronFolder(work / "megatron").load(world)
    out["resharded padding"] = padding_is_zero(model, world)
    out["resharded"] = verify(work / "model-tied", work / "megatron", world).as_dict()
    world = world_of(1, 4, False)
    export_megatron(work / "megatron", work / "exported", world)
    out["exported"] = verify(work / "model-tied", work / "exported", world).as_dict()
    try:
        export_megatron(work / "megatron", work / "exported", world)
    except UserError as error:
        out["refused"] = str(error)
    report(out)
    shutdown()


if __name__ == "__main__":
    main()
