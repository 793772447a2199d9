"""FuseLLM and FuseChat from one recipe file: split, teach, align, train, merge, measure.

    python -m fusemega.recipes.fusion RECIPE.yaml [KEY=VALUE ...]

* FuseLLM (Wan et al., 2024, arXiv:2401.10491): one training run on all sources at once. No `merge` section.
* FuseChat (Wan et al., 2024, arXiv:2402.16107 and 2408.07990): one training run a source, which gives targets of the
  same shape, then a merge of those. `merge` says how.

Every stage is a command that stands in the output folder as a run file and can be run by hand; what is finished is
skipped the next time. On a cluster, submit those run files and start the recipe again for the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fusemega.runtime.console import quiet_megatron, say

quiet_megatron()

from fusemega.checkpoint.open_model import ModelConfig  # noqa: E402
from fusemega.config import Section, load  # noqa: E402
from fusemega.errors import UserError  # noqa: E402
from fusemega.files.output import write_durably  # noqa: E402
from fusemega.hf.folder import HFFolder  # noqa: E402
from fusemega.hf.hub import resolve  # noqa: E402  (after the filters are set)
from fusemega.losses.distill import TaughtSettings  # noqa: E402
from fusemega.losses.fuse import FusionConfig  # noqa: E402
from fusemega.recipes.stages import Stages  # noqa: E402
from fusemega.runtime.layout import ParallelConfig  # noqa: E402
from fusemega.text.tokenizer import Tokenizer  # noqa: E402
from fusemega.training.optimizer import OptimizerSection  # noqa: E402
from fusemega.training.run_file import TrainingSection  # noqa: E402


class TeachSection(Section):
    """Rows of every source and of the target itself."""

    top_k: int = Field(10, ge=1, description="log-probabilities stored for each position")


class AlignSection(Section):
    """How the ids of a source with another tokenizer become the target's."""

    kind: str = Field(
        "first_piece", description="kind of the vocabulary map: first_piece, exact, mined, ms or ms_reference"
    )


class ObjectiveSection(TaughtSettings):
    """Of every training run."""

    name: Literal["fuse"] = "fuse"
    fusion: FusionConfig = FusionConfig()


class MergeSection(Section):
    """How the targets, one for each source, are merged. The target before training is the base."""

    merge_method: str = Field("sce", description="as in a merge's run file")
    parameters: dict[str, Any] = Field({}, description="the method's settings")


class FusionRecipe(Section):
    """A recipe file."""

    output_dir: str = Field(description="output folder")
    nproc: int = Field(1, ge=1, description="processes of the stages that run a model, on this machine")
    target: str = Field(description="the model that training starts from (the papers' pivot): HF folder or hub id")
    sources: dict[str, str] = Field(min_length=1, description="name -> HF folder or hub id")
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

    @field_validator("model")
    @classmethod
    def _no_load(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "load" in value:
            raise ValueError("load is `target`, and each of `sources`; leave it out here")
        ModelConfig(load="target", **value)
        return value

    @field_validator("sources")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in ("target", "merged"):
                raise ValueError(f"{name!r} names folders: letters, digits, and . - _ ; not target, not merged")
        return value


class Recipe:
    """A recipe at work."""

    def __init__(self, recipe: FusionRecipe) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.stages = Stages(self.folder, recipe.nproc)
        self.parallel = recipe.parallel.model_dump(exclude_defaults=True)
        self.text = str(self.folder / "data.jsonl")
        self.data = self._rows(self.text)

    def run(self) -> dict[str, Any]:
        """Every stage that is not finished yet; returns what summary.json holds.

        Raises:
            UserError: whatever a stage refuses.
        """
        recipe = self.recipe
        models = {"target": recipe.target, **recipe.sources}
        self._split(list(models.values()))
        stores = {name: {"store": self._teach(name, load)} for name, load in models.items()}
        target_hash = Tokenizer.load(resolve(recipe.target)).content_hash
        for name, source in recipe.sources.items():
            if Tokenizer.load(resolve(source)).content_hash != target_hash:
                stores[name]["map"] = self._align(name, source)
        own = stores.pop("target")
        if recipe.merge is None:
            trained = {"fused": self._train("fused", [own, *stores.values()])}
        else:
            trained = {f"target-{name}": self._train(f"target-{name}", [own, one]) for name, one in stores.items()}
            trained["merged"] = self._merge(recipe.merge, list(trained.values()))
        bits = {name: self._evaluate(name, load) for name, load in (models | trained).items()}
        summary = {"result": list(trained.values())[-1], "bits_per_byte": bits if recipe.held_out else None}
        write_durably(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _split(self, models: list[str]) -> None:
        recipe, out = self.recipe, Path(self.text)
        command = ["split", recipe.data, self.text, "--tokenizers", *models, "--max-tokens", str(recipe.seq_length)]
        inputs = [Path(recipe.data), *(Path(resolve(model)) for model in models)]  # every later stage follows this one
        self.stages.run("split", command, lambda: self.stages.tool(*command), (out,), inputs)

    def _teach(self, name: str, model: str) -> str:
        store = self.folder / "stores" / name
        run = {"model": self._model(model), "parallel": self.parallel, "data": self.data, "store": str(store)}
        run |= self.recipe.teach.model_dump() | {"temperature": self.recipe.objective.temperature}
        stage = f"teach-{name}"
        self.stages.run(stage, run, partial(self.stages.command, "teach", stage, run), (store,))
        return str(store)

    def _align(self, name: str, source: str) -> str:
        out = self.folder / "maps" / f"{name}.map"
        command = ["align", source, self.recipe.target, str(out), "--kind", self.recipe.align.kind]
        if self.recipe.align.kind.startswith("ms"):
            command += ["--data", self.text]
            if self.recipe.unknown_fields != "error":
                command += ["--unknown-fields", self.recipe.unknown_fields]
        self.stages.run(f"align-{name}", command, lambda: self.stages.tool(*command), (out,))
        return str(out)

    def _train(self, name: str, teachers: list[dict[str, str]]) -> str:
        recipe, out = self.recipe, self.folder / name
        run = {
            "output_dir": str(out),
            "model": self._model(recipe.target),
            "parallel": self.parallel,
            "data": self.data,
            "objective": {"name": "fuse", "teachers": teachers, **recipe.objective.model_dump(exclude_defaults=True)},
            "optimizer": recipe.optimizer.model_dump(exclude_defaults=True),
            # What is merged is rounded once, at the end: in bf16 a small update is mostly rounding.
            "training": recipe.training.model_dump(exclude_defaults=True)
            | ({} if recipe.merge is None else {"export_dtype": "fp32"}),
        }
        self.stages.run(name, run, partial(self.stages.command, "train", name, run), (out,))
        return str(out / "hf")

    def _merge(self, merge: MergeSection, targets: list[str]) -> str:
        out = self.folder / "merged"
        run: dict[str, Any] = {"merge_method": merge.merge_method, "models": [{"model": load} for load in targets]}
        if merge.merge_method != "linear":
            run["base_model"] = self.recipe.target
        run["parameters"] = merge.parameters
        run["dtype"] = _dtype_of(self.recipe.target)
        run_file = self.stages.write_run_file("merge", "merge", run, nproc=1)
        command = ["merge", str(run_file), str(out), "--resume"]
        self.stages.run("merge", run, lambda: self.stages.tool(*command), (out,))
        return str(out)

    def _evaluate(self, name: str, model: str) -> float | None:
        if self.recipe.held_out is None:
            return None
        output = self.folder / f"eval-{name}.json"
        data = self._rows(self.recipe.held_out)
        run = {"model": self._model(model), "parallel": self.parallel, "data": data, "output": str(output)}
        stage = f"eval-{name}"
        work = partial(self.stages.command, "eval", stage, run)
        self.stages.run(stage, run, work, (output,), [self.recipe.held_out])
        return float(json.loads(output.read_text(encoding="utf-8"))["bits_per_byte"])

    def _rows(self, path: str) -> dict[str, Any]:
        unknown = self.recipe.unknown_fields
        asked = {} if unknown == "error" else {"unknown_fields": unknown}
        return {"path": path, "seq_length": self.recipe.seq_length, **asked}

    def _model(self, load: str) -> dict[str, Any]:
        return {"load": load, **self.recipe.model}


def _dtype_of(model: str) -> str:
    """Of most of a model's weights, in the words of a merge's run file."""
    folder = HFFolder(resolve(model))
    most, _ = Counter(str(folder.dtype(name)) for name in folder).most_common(1)[0]
    return most.removeprefix("torch.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusemega.recipes.fusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe; examples/fusellm and examples/fusechat have commented ones")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replaces a value of the recipe")
    options = parser.parse_args()
    try:
        summary = Recipe(load(FusionRecipe, options.recipe, options.overrides)).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, bits in (summary["bits_per_byte"] or {}).items():
        print(f"  {name:<20} {bits:.4f} bits per byte")
    say(f"the result is {summary['result']}")


if __name__ == "__main__":
    main()
