"""Both layer specs on two tensor-parallel ranks under sequence parallelism; reports what each rank saw."""

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
from fusemega.models.build import build_model, placements  # noqa: E402
from fusemega.models.dense_logits import dense_logits  # noqa: E402
from fusemega.runtime.parallel import ParallelConfig, initialize, shutdown  # noqa: E402
from fusemega.runtime.precision import LOCAL, Kernels  # noqa: E402
from tests.distributed.launch import report  # noqa: E402
from tests.te.inside.test_specs import sharded  # noqa: E402


def main() -> None:
    work = Path(sys.argv[1])
    folder = work / "model"
    world = initialize(ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True))
    out: dict[str, Any] = {"marks": {}, "shards": {}}
    logits, models = {}, {}
    for name, kernels in {"local": LOCAL, "te": Kernels(transformer_engine=True)}.items():
        model = models[name] = build_model(HFFolder(folder).architecture, world, torch.float32, kernels)
        load_hf(model, folder, world)
        out["marks"][name] = {
            next(iter(placement.rule.hf_shapes())): [
                list(placement.parameter.shape),
                getattr(placement.parameter, "tensor_model_parallel", False),
                getattr(placement.parameter, "partition_dim", -1),
                bool(getattr(placement.parameter, "sequence_parallel", False)),
            ]
            for placement in placements(model, world)
        }
        out["shards"][name] = {key: str(value) for key, value in sharded(model).items()}
        logits[name] = dense_logits(model, world, [list(range(9)), list(range(7))])
    out["largest_logit"] = logits["local"].abs().max().item()
    out["logit_difference"] = (logits["te"] - logits["local"]).abs().max().item()

    export_hf(models["te"], work / "exported", folder, world)
    world.barrier()
    out["same_bits"] = HFFolder(work / "exported").content_hash() == HFFolder(folder).content_hash()
    if world.is_main:
        (work / "saved").mkdir()
    world.barrier()
    save_model(models["te"], work / "saved")
    with torch.no_grad():
        for parameter in models["local"].parameters():
            parameter.fill_(float("nan"))
    load_model(models["local"], work / "saved")
    theirs = {next(iter(p.rule.hf_shapes())): p.parameter for p in placements(models["te"], world)}
    out["resharded"] = all(
        torch.equal(placement.parameter, theirs[next(iter(placement.rule.hf_shapes()))])
        for placement in placements(models["local"], world)
    )
    report(out)
    shutdown()


if __name__ == "__main__":
    main()
