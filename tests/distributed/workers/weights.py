"""Fills, exports and reloads one small model under every layout of four ranks; reports what each rank saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from fusemega.checkpoint.megatron_folder import MegatronFolder, describe_source
from fusemega.checkpoint.torch_dist import save_model
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import verify
from fusemega.files.integrity import write_integrity
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models.build import build_model, init_random, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown
from tests.distributed.launch import report

TP2, TP4 = ({"tensor_model_parallel_size": size} for size in (2, 4))
PP2, PP4 = ({"pipeline_model_parallel_size": size} for size in (2, 4))
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1PP1": {},
    "TP2PP1": TP2 | SP,
    "TP4PP1": TP4,
    "TP1PP2": PP2,
    "TP1PP4": PP4,
    "TP2PP2": TP2 | SP | PP2,
    "TP2PP2 virtual": TP2 | SP | PP2 | {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
    "TP1PP2 uneven": PP2 | {"num_layers_in_first_pipeline_stage": 1},
}


def world_of(layout: dict[str, Any]) -> World:
    return initialize(ParallelConfig(**layout))


def padding_is_zero(model: Any, world: World) -> bool:
    """Every element outside the pieces is zero."""
    for placement in placements(model, world):
        outside = torch.ones_like(placement.parameter, dtype=torch.bool)
        for piece in placement.pieces:
            outside[tuple(slice(*span) for span in piece.local_box)] = False
        if placement.parameter[outside].count_nonzero():
            return False
    return True


def one_model(folder: Path, work: Path, name: str, world: World) -> dict[str, Any]:
    """Everything one model shows under one layout, in numbers and hashes."""
    model = build_model(HFFolder(folder).architecture, world, torch.float32)
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
    export_hf(model, work / f"loaded-{name}", folder, world, max_shard_size=20_000)
    init_random(model, world, seed=5)
    export_hf(model, work / f"random-{name}", folder, world)
    world.barrier()
    if world.is_main:
        out["loaded_hash"] = HFFolder(work / f"loaded-{name}").content_hash()
        out["random_hash"] = HFFolder(work / f"random-{name}").content_hash()
    return out


def whole_model_import(folder: Path, out: Path, world: World) -> None:
    """The same as `import_hf`, by way of a model and megatron-core's own writer: each rank writes its own chunks."""
    model = build_model(HFFolder(folder).architecture, world, torch.float32)
    load_hf(model, folder, world)
    if world.is_main:
        (out / "weights").mkdir(parents=True)
    world.barrier()
    save_model(model, out / "weights")
    if world.is_main:
        names = list(model.architecture.hf_shapes())
        describe_source(out, HFFolder(folder), names, {})
        write_integrity(out)
    world.barrier()


def loads_as_filled(folder: Path, megatron: Path, world: World) -> bool:
    """Loading a Megatron folder gives every bit that filling a model from the HF folder gives, and zero padding."""
    filled = build_model(HFFolder(folder).architecture, world, torch.float32)
    load_hf(filled, folder, world)
    loaded = MegatronFolder(megatron).load(world)
    pairs = list(zip(filled.parameters(), loaded.parameters(), strict=True))
    equal = all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
    return bool(pairs) and equal and padding_is_zero(loaded, world)


def main() -> None:
    work = Path(sys.argv[1])
    out: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        world = world_of(layout)  # a layout costs more than a model: some thirty process groups
        for kind in ("tied", "untied"):
            out[f"{kind} {name}"] = one_model(work / f"model-{kind}", work / kind, name, world)
    world = world_of(LAYOUTS["TP2PP2"])
    for kind in ("tied", "untied"):
        if world.is_main:
            import_hf(work / f"model-{kind}", work / f"megatron-{kind}")
        whole_model_import(work / f"model-{kind}", work / f"saved-{kind}", world)
    for name, layout in LAYOUTS.items():  # 101 rows of vocabulary were imported, 102 were saved; TP 4 wants 104
        world = world_of(layout)
        for kind in ("tied", "untied"):
            folders = [work / f"{origin}-{kind}" for origin in ("megatron", "saved")]
            out[f"{kind} {name}"]["loads_equal"] = [loads_as_filled(work / f"model-{kind}", f, world) for f in folders]
    if world.is_main:
        for kind in ("tied", "untied"):
            export_megatron(work / f"saved-{kind}", work / f"exported-{kind}")
            for other in ("megatron", "saved", "exported"):
                result = verify(work / f"model-{kind}", work / f"{other}-{kind}", workers=2)
                out[f"{kind} {other}"] = result.as_dict()
    report(out)
    shutdown()


if __name__ == "__main__":
    main()
