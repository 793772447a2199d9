"""Folders of models without some blocks, read under layouts of two ranks.

    pruned.py WORK NAME...    with folders WORK/NAME, token ids in WORK/ids.json, and the run file WORK/train.json

Leaves WORK/NAME.LAYOUT, the model as it comes out again, and WORK/NAME.LAYOUT.pt, its logits. Reports the layers that
this rank holds, and the losses of the training's first steps under each layout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fusemega.config import validate
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models.build import build_model
from fusemega.models.dense_logits import dense_logits
from fusemega.runtime.parallel import ParallelConfig, initialize, shutdown
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import report
from tests.distributed.workers.families import PP2, TP2

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": TP2,
    "PP2": PP2,
    "PP2VPP2": PP2 | {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
}


def losses(run: TrainRun) -> list[float]:
    """Of the first three steps."""
    trainer, _ = open_trainer(run)
    return [trainer.step()["lm loss"] for _ in range(3)]


def main() -> None:
    """See the module."""
    work, *names = sys.argv[1:]
    ids = json.loads((Path(work) / "ids.json").read_text())
    held: dict[str, Any] = {}
    training = json.loads((Path(work) / "train.json").read_text())
    for label, layout in LAYOUTS.items():
        world = initialize(ParallelConfig(**layout))
        for name in names:
            folder = Path(work) / name
            model = build_model(HFFolder(folder).architecture, world, torch.float32)
            load_hf(model, folder, world)
            held[f"{name} {label}"] = [
                layer.layer_number - 1 for chunk in model.chunks for layer in chunk.decoder.layers
            ]
            logits_SV = dense_logits(model, world, [ids])
            if logits_SV is not None and world.tp_rank == 0:
                torch.save(logits_SV, f"{folder}.{label}.pt")
            export_hf(model, f"{folder}.{label}", folder, world)
        section = training | {"parallel": layout, "output_dir": f"{work}/run-{label}"}
        held[f"{label}, losses"] = losses(validate(TrainRun, section, label))
    report(held)
    shutdown()


if __name__ == "__main__":
    main()
