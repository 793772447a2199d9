"""Trains a tiny model under layouts of this many ranks; saves in the middle and goes on, also in the next layout.

    training.py CASES [TEACH]    JSON files: "cases", name -> run file of a training, and "resumed", the names of those
                                 that also go on in their own layout; "reference", the model that evaluations of
                                 `sft` compare with; the run files of `teach` and `score`

Reports the curves, what an evaluation found after them, and for each layout what the optimizer holds for the last row
of the vocabulary and the one before; and errors of losses that are tried alone. Leaves the trained weights in each
run's hf/.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.checkpoint.training_state import training_state
from fusemega.config import validate
from fusemega.hf.export import export_hf
from fusemega.losses.preference import Preference
from fusemega.losses.registry import register
from fusemega.passes.frozen import FrozenModel
from fusemega.scoring.evaluation import evaluate_model
from fusemega.scoring.preferences import evaluate_groups
from fusemega.scoring.rewards import ScoreRun, score
from fusemega.scoring.teach import TeachRun, teach
from fusemega.training import optimizer
from fusemega.training.assembly import open_trainer
from fusemega.training.optimizer import complete_parameters
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from tests.distributed.launch import report
from tests.losses.pairwise import Pairwise, PairwiseScores
from tests.losses.preferences import errors_over_ranks
from tests.losses.published import chunk_case, merge_case, project_case
from tests.losses.sequence_mean import SequenceMean
from tests.losses.test_cells import cells_case


def compared(trainer: Trainer, reference: dict[str, Any]) -> dict[str, float]:
    """What an evaluation finds of the trained model beside `reference`, a run file's section."""
    world, data = trainer.world, trainer.data
    source = ModelSource(validate(ModelConfig, reference, "reference"), trainer.run.parallel, dist.get_world_size())
    teacher = FrozenModel.build(source, "hidden", trainer.gpt, world)
    return evaluate_model(trainer.gpt, data.dataset, data.shape, world, teacher).model_dump()


def groups_scored(trainer: Trainer) -> dict[str, float]:
    """What an evaluation of the groups that are trained on finds."""
    complete_parameters(trainer.ddp)
    data, objective = trainer.data, trainer.objective.for_data(trainer.data.dataset)
    objective.begin_step(trainer.iteration, trainer.train_iters)
    return evaluate_groups(trainer.gpt, data.dataset, data.shape, trainer.world, objective, trainer.frozen).row


def scored_and_exported(trainer: Trainer, hf: Path, source: Path, reference: dict[str, Any] | None) -> dict[str, float]:
    complete_parameters(trainer.ddp)
    export_hf(trainer.gpt, hf, source, trainer.world)
    if reference is not None:
        return compared(trainer, reference)
    return evaluate_model(trainer.gpt, trainer.data.dataset, trainer.data.shape, trainer.world).model_dump()


def take(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    rows = [trainer.step() for _ in range(steps)]
    return [{name: value for name, value in row.items() if name != "iteration-time"} for row in rows]


def last_rows(trainer: Trainer) -> dict[str, list[float]] | None:
    """Largest value of each of the last two rows of the embedding in each optimizer state; None on other ranks."""
    world = trainer.world
    states = training_state(trainer.gpt, trainer.optimizer, world)["optimizer"].get("param_state")
    # Shards lie on data- and context-parallel ranks; one of them gathers, and the others hold no more than before.
    gathers = world.dp_rank == 0 and world.cp_rank == 0
    assert (states is None) == (trainer.run.optimizer.use_distributed_optimizer and not gathers)
    if states is None or not world.is_first_stage or world.tp_rank != world.tp_size - 1:
        return None
    return {
        name: tensor.data[-2:].abs().amax(1).tolist()
        for state in states.values()
        for name, tensor in state.items()
        if tensor.key.endswith("embedding.word_embeddings.weight")
    }


def alone() -> dict[str, float]:
    """Errors of the cross-tokenizer losses, and of those over responses, over two and four tensor-parallel ranks; see
    `Case.check`."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "cells": cells_case(Path(folder) / "cells"),
            "chunk": chunk_case(Path(folder) / "chunk", **{"lambda": 0.2}),
            "merge": merge_case(Path(folder) / "merge", **{"lambda": 0.2}),
            "project_student": project_case(Path(folder) / "project_student", **{"lambda": 0.2}),
        }
    found = {f"{name}, TP2": case.check(pairs[rank // 2], rank % 2, 2) for name, case in cases.items()}
    found |= errors_over_ranks(pairs[rank // 2], rank % 2, 2) | errors_over_ranks(dist.group.WORLD, rank, 4)
    return found | {f"{name}, TP4": case.check(dist.group.WORLD, rank, 4) for name, case in cases.items()}


def main() -> None:
    register("sequence_mean")(SequenceMean)
    register("pairwise")(Pairwise)
    register("pairwise_scores")(PairwiseScores)
    # So small that even this model has several, and communication something to overlap with.
    optimizer.DistributedDataParallelConfig = partial(optimizer.DistributedDataParallelConfig, bucket_size=20_000)
    asked = json.loads(Path(sys.argv[1]).read_text())
    runs = {name: validate(TrainRun, section, name) for name, section in asked["cases"].items()}
    found: dict[str, Any] = {}
    for name, run in runs.items():
        trainer, checked = open_trainer(run)
        found[name] = take(trainer, 2)
        trainer.save()
        found[name] += take(trainer, 2)
        if isinstance(checked.objective, Preference):
            found[f"{name}, scored"] = groups_scored(trainer)
        if checked.objective.terms == ("lm",):
            found[f"{name}, scored"] = scored_and_exported(
                trainer,
                Path(run.output_dir) / "hf",
                checked.source.hf,
                asked["reference"] if name.startswith("sft") else None,
            )
        if name in asked["resumed"]:
            trainer, _ = open_trainer(run)
            found[f"{name}, resumed"] = take(trainer, 2)
    for name, other in pairwise(runs):
        if runs[name].objective != runs[other].objective or runs[name].objective.name not in ("sft", "distill"):
            continue
        moved = runs[other].model_copy(update={"output_dir": runs[name].output_dir})
        trainer, _ = open_trainer(moved)
        assert trainer.iteration == 2
        found[f"{name}, then {other}"] = take(trainer, 2)
        found[f"{name}, then {other}, last rows"] = last_rows(trainer)
    if len(sys.argv) > 2:
        for section in json.loads(Path(sys.argv[2]).read_text()):
            if "output" in section:
                score(validate(ScoreRun, section, "score"))
            else:
                teach(validate(TeachRun, section, "teach"))
        found["alone"] = alone()  # of four ranks
    report(found)


if __name__ == "__main__":
    main()
