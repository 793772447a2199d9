"""BlockPruner from one recipe file: search, apply, teach, train, measure.

    fusemega run RECIPE.yaml [KEY=VALUE ...]

Blocks are removed from a model (Zhong et al., 2024, arXiv:2406.10594), and what is left is healed by training: `healed`
on labels and on the rows of the whole model, the teacher; `control`, if it is asked for, on the same labels alone.

Every stage is a command that stands in the output folder as a run file and can be run by hand; what is finished is
skipped the next time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fusemega.config import Section
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.losses.distill import TaughtSettings
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome
from fusemega.prune.apply import EXPORTS, RECORD
from fusemega.recipes.prune_steps import PruneSteps
from fusemega.recipes.registry import Recipe
from fusemega.recipes.run_files import model_without_load
from fusemega.runtime.layout import ParallelConfig
from fusemega.training.optimizer import OptimizerSection
from fusemega.training.run_file import TrainingSection

_OURS = ("model", "parallel", "blocks", "output")  # keys of the search's run file that the recipe writes


class HealSection(TaughtSettings):
    """Training of what is left, on labels and on the whole model's rows."""

    name: Literal["distill"] = "distill"
    top_k: int = Field(10, ge=1, description="log-probabilities of the whole model stored for each position")
    control: bool = Field(False, description="also train a copy on the labels alone, on the same tokens")


class PruningRecipe(Section):
    """A recipe file."""

    recipe: Literal["blockpruner"] = Field("blockpruner", description="the kind of recipe: BlockPruner, then healing")
    output_dir: str = Field(description="output folder")
    nproc: int = Field(1, ge=1, description="processes of the stages that run a model, on this machine")
    load: str = Field(description="the whole model, which is also the teacher: HF folder or hub id")
    model: dict[str, Any] = Field({}, description="section `model` of every run file, without `load`")
    parallel: ParallelConfig = ParallelConfig()
    blocks: int = Field(ge=1, description="how many blocks are removed")
    export: str = Field("plain", description=f"form of the pruned folder: {', '.join(EXPORTS)}")
    order: str | None = Field(None, description="an order file to use in place of a search")
    search: dict[str, Any] | None = Field(
        None, description=f"the run file of `fusemega prune search` without {', '.join(_OURS)}; leave out with `order`"
    )
    data: str = Field(description="JSONL of conversations or texts that are trained on")
    seq_length: int = Field(2048, ge=2, description="tokens of a window")
    held_out: str | None = Field(None, description="JSONL to measure on; default: nothing is measured")
    heal: HealSection = HealSection()
    optimizer: OptimizerSection
    training: TrainingSection

    @field_validator("model")
    @classmethod
    def _no_load(cls, value: dict[str, Any]) -> dict[str, Any]:
        return model_without_load(value, "load is a key of its own; leave it out here")

    @field_validator("export")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in EXPORTS:
            raise ValueError(f"unknown name {value!r}; allowed: {', '.join(EXPORTS)}")
        return value

    @model_validator(mode="after")
    def _one_order(self) -> PruningRecipe:
        """Either `order` or `search`. `training.export_hf` must stay true."""
        if (self.order is None) == (self.search is None):
            raise ValueError("order and search: give one of them")
        for key in _OURS:
            if key in (self.search or {}):
                raise ValueError(f"search.{key}: the recipe says it; leave it out here")
        if not self.training.export_hf:
            raise ValueError("training.export_hf: false, and the folder hf is what the recipe makes; leave it out")
        return self


class BlockPrunerRecipe(Recipe[PruningRecipe]):
    """`recipe: blockpruner`."""

    Settings = PruningRecipe

    def graph(self, settings: PruningRecipe) -> Graph:
        """See `Recipe.graph`."""
        return _Work(settings).steps.graph()

    def finish(self, settings: PruningRecipe, outcome: Outcome) -> list[str]:
        """See `Recipe.finish`."""
        work = _Work(settings)
        record = read_json(Path(work.pruned) / RECORD)
        bits = {name: float(read_json(Path(path))["bits_per_byte"]) for name, path in work.figures.items()}
        summary = {
            "result": work.result,
            "removed": record["removed"],
            "parameters": record["parameters"],
            "bits_per_byte": bits or None,
        }
        write_durably(work.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        before, after = record["parameters"]["before"], record["parameters"]["after"]
        lines = [f"{len(record['removed'])} blocks removed: {before:,} parameters before, {after:,} after"]
        lines += [f"  {name:<20} {value:.4f} bits per byte" for name, value in bits.items()]
        return [*lines, f"the result is {work.result}"]


RECIPE = BlockPrunerRecipe()


class _Work:
    """The stages of one recipe file.

    Attributes:
        pruned: folder of the model before it is healed.
        result: folder of the final model.
        figures: model -> file of `fusemega eval`; empty if nothing is measured.
    """

    def __init__(self, recipe: PruningRecipe) -> None:
        self.folder = Path(recipe.output_dir)
        parallel = recipe.parallel.model_dump(exclude_defaults=True)
        self.steps = PruneSteps(self.folder, recipe.nproc, parallel, recipe.model)
        rows = {"path": recipe.data, "seq_length": recipe.seq_length}
        order = recipe.order
        if recipe.search is not None:
            order = self.steps.prune_search(recipe.load, recipe.blocks, recipe.search)
        assert order is not None
        self.pruned = self.steps.prune_apply(recipe.load, order, recipe.blocks, recipe.export)
        heal = recipe.heal.model_dump(exclude_defaults=True, by_alias=True)
        top_k, control = recipe.heal.top_k, heal.pop("control", False)
        heal.pop("top_k", None)
        store = self.steps.teach("whole", recipe.load, rows, top_k=top_k, temperature=recipe.heal.temperature)
        objectives: dict[str, dict[str, Any]] = {"control": {"name": "sft"}} if control else {}
        objectives["healed"] = {"name": "distill", "store": store, **heal}
        models = {"whole": recipe.load, "pruned": self.pruned}
        optimizer, training = (s.model_dump(exclude_defaults=True) for s in (recipe.optimizer, recipe.training))
        for name, objective in objectives.items():
            models[name] = self.steps.train(name, self.pruned, rows, objective, optimizer, training)
        self.result = models["healed"]
        self.figures: dict[str, str] = {}
        if recipe.held_out is not None:
            held_out = {"path": recipe.held_out, "seq_length": recipe.seq_length}
            self.figures = {name: self.steps.evaluate(name, load, held_out) for name, load in models.items()}
