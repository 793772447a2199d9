"""FuseLLM and FuseChat from one recipe file: split, teach, align, train, merge, measure.

    fusemega run RECIPE.yaml [KEY=VALUE ...]

* FuseLLM (Wan et al., 2024, arXiv:2401.10491): one training run on all sources at once. No `merge` section.
* FuseChat (Wan et al., 2024, arXiv:2402.16107 and 2408.07990): one training run a source, which gives targets of the
  same shape, then a merge of those. `merge` says how.

Every stage is a command that stands in the output folder as a run file and can be run by hand; what is finished is
skipped the next time. On a cluster, submit those run files and start the recipe again for the rest.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fusemega.config import Section
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.losses.distill import TaughtSettings
from fusemega.losses.fuse import FusionConfig
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome
from fusemega.recipes.registry import Recipe
from fusemega.recipes.run_files import model_without_load
from fusemega.recipes.steps import Steps
from fusemega.runtime.layout import ParallelConfig
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.optimizer import OptimizerSection
from fusemega.training.run_file import TrainingSection

if __name__ == "__main__":
    raise SystemExit("error: a recipe runs with `fusemega run RECIPE.yaml`")  # earlier, this module was run itself


class TeachSection(Section):
    """Rows of every source and of the target itself."""

    top_k: int = Field(10, ge=1, description="log-probabilities stored for each position")


class SourceSection(Section):
    """A source. Its path alone stands for `load`."""

    load: str = Field(description="HF folder or hub id")
    teach: TeachSection | None = Field(None, description="for this source in place of the recipe's `teach`")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"load": value} if isinstance(value, str) else value


class AlignSection(Section):
    """How the ids of a source with another tokenizer become the target's."""

    kind: str = Field(
        "cells", description="kind of the vocabulary map: cells, first_piece, exact, mined, ms or ms_reference"
    )


class ObjectiveSection(TaughtSettings):
    """The objective of every training run."""

    name: Literal["fuse"] = "fuse"
    fusion: FusionConfig = FusionConfig()


class MergeSection(Section):
    """How the targets, one for each source, are merged. The target before training is the base."""

    merge_method: str = Field("sce", description="as in a merge's run file")
    parameters: dict[str, Any] = Field({}, description="the method's settings")


class FusionRecipe(Section):
    """A recipe file."""

    recipe: Literal["fuse"] = Field("fuse", description="the kind of recipe: FuseLLM and FuseChat")
    output_dir: str = Field(description="output folder")
    nproc: int = Field(1, ge=1, description="processes of the stages that run a model, on this machine")
    target: str = Field(description="the model that training starts from (the papers' pivot): HF folder or hub id")
    sources: dict[str, SourceSection] = Field(min_length=1, description="name -> HF folder or hub id, or a section")
    model: dict[str, Any] = Field({}, description="section `model` of every run file, without `load`")
    parallel: ParallelConfig = ParallelConfig()
    data: str = Field(description="JSONL of conversations or texts")
    unknown_fields: Literal["error", "ignore"] = Field("error", description="as data.unknown_fields of a run file")
    seq_length: int = Field(2048, ge=2, description="documents are split so that each part fits under every tokenizer")
    held_out: str | None = Field(None, description="JSONL to measure on; default: nothing is measured")
    teach: TeachSection = TeachSection()
    align: AlignSection = AlignSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    training: TrainingSection
    merge: MergeSection | None = Field(
        None,
        description="with it: FuseChat, a target for each source and a merge; without it: FuseLLM, one run on all"
        " sources",
    )

    @model_validator(mode="after")
    def _exported(self) -> FusionRecipe:
        """`training.export_hf` must stay true: the exported folders are what is merged and measured."""
        if not self.training.export_hf:
            raise ValueError("training.export_hf: false, and the folder hf is what the recipe makes; leave it out")
        return self

    @field_validator("model")
    @classmethod
    def _no_load(cls, value: dict[str, Any]) -> dict[str, Any]:
        return model_without_load(value, "load is `target`, and each of `sources`; leave it out here")

    @field_validator("sources")
    @classmethod
    def _names(cls, value: dict[str, SourceSection]) -> dict[str, SourceSection]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in ("target", "merged"):
                raise ValueError(f"{name!r} names folders: letters, digits, and . - _ ; not target, not merged")
        return value


class FuseRecipe(Recipe[FusionRecipe]):
    """`recipe: fuse`, FuseLLM and FuseChat."""

    Settings = FusionRecipe

    def graph(self, settings: FusionRecipe) -> Graph:
        """See `Recipe.graph`."""
        return _Work(settings).steps.graph()

    def finish(self, settings: FusionRecipe, outcome: Outcome) -> list[str]:
        """See `Recipe.finish`."""
        work = _Work(settings)
        bits = {name: _bits_per_byte(path) for name, path in work.figures.items()}
        summary = {"result": work.result, "bits_per_byte": bits or None}
        write_durably(work.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        lines = [f"  {name:<20} {value:.4f} bits per byte" for name, value in bits.items()]
        return [*lines, f"the result is {work.result}"]


RECIPE = FuseRecipe()


class _Work:
    """The stages of one recipe file.

    Attributes:
        result: folder of the final model.
        figures: model -> file of `fusemega eval`; empty if nothing is measured.
    """

    def __init__(self, recipe: FusionRecipe) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.steps = Steps(self.folder, recipe.nproc, recipe.parallel.model_dump(exclude_defaults=True), recipe.model)
        sources = {name: source.load for name, source in recipe.sources.items()}
        models = {"target": recipe.target, **sources}
        text = self.steps.split(recipe.data, str(self.folder / "data.jsonl"), list(models.values()), recipe.seq_length)
        self.data = self._rows(text)
        stores = {name: {"store": self._teach(name, load)} for name, load in models.items()}
        target_hash = Tokenizer.load(resolve(recipe.target)).content_hash
        for name, source in sources.items():
            if Tokenizer.load(resolve(source)).content_hash != target_hash:
                stores[name]["map"] = self._align(name, source)
        own = stores.pop("target")
        if recipe.merge is None:
            trained = {"fused": self._train("fused", [own, *stores.values()])}
        else:
            trained = {f"target-{name}": self._train(f"target-{name}", [own, one]) for name, one in stores.items()}
            trained["merged"] = self._merge(recipe.merge, list(trained.values()))
        self.result = list(trained.values())[-1]
        self.figures: dict[str, str] = {}
        if recipe.held_out is not None:
            held_out = self._rows(recipe.held_out)
            self.figures = {
                name: self.steps.evaluate(name, load, held_out) for name, load in (models | trained).items()
            }

    def _teach(self, name: str, load: str) -> str:
        source = self.recipe.sources.get(name)
        teach = source.teach if source is not None and source.teach is not None else self.recipe.teach
        settings = teach.model_dump() | {"temperature": self.recipe.objective.temperature}
        return self.steps.teach(name, load, self.data, **settings)

    def _align(self, name: str, source: str) -> str:
        kind, unknown = self.recipe.align.kind, self.recipe.unknown_fields
        if not kind.startswith("ms"):  # only ms and ms_reference count tokens in a text
            return self.steps.align(name, source, self.recipe.target, "--kind", kind)
        options = [] if unknown == "error" else ["--unknown-fields", unknown]
        return self.steps.align(name, source, self.recipe.target, "--kind", kind, *options, data=self.data["path"])

    def _train(self, name: str, teachers: list[dict[str, str]]) -> str:
        recipe = self.recipe
        return self.steps.train(
            name,
            recipe.target,
            self.data,
            {"name": "fuse", "teachers": teachers, **recipe.objective.model_dump(exclude_defaults=True)},
            recipe.optimizer.model_dump(exclude_defaults=True),
            # Targets that are merged stay in fp32 and are rounded once, at the end: in bf16 a small update would be
            # mostly rounding.
            recipe.training.model_dump(exclude_defaults=True)
            | ({} if recipe.merge is None else {"export_dtype": "fp32"}),
        )

    def _merge(self, merge: MergeSection, targets: list[str]) -> str:
        run: dict[str, Any] = {"merge_method": merge.merge_method, "models": [{"model": load} for load in targets]}
        if merge.merge_method != "linear":  # which has no base
            run["base_model"] = self.recipe.target
        run["parameters"] = merge.parameters
        run["dtype"] = dtype_of(self.recipe.target)
        return self.steps.merge(run)

    def _rows(self, path: str) -> dict[str, Any]:
        unknown = self.recipe.unknown_fields
        asked = {} if unknown == "error" else {"unknown_fields": unknown}
        return {"path": path, "seq_length": self.recipe.seq_length, **asked}


def _bits_per_byte(path: str) -> float:
    return float(read_json(Path(path))["bits_per_byte"])


def dtype_of(model: str) -> str:
    """The type of most of a model's weights, as a merge's run file spells it."""
    folder = HFFolder(resolve(model))
    most, _ = Counter(str(folder.dtype(name)) for name in folder).most_common(1)[0]
    return most.removeprefix("torch.")
