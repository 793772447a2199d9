"""What the recipes of implicit fusion share: sources answer prompts, and a target is trained on the best of it.

    prompts -> sample (each source) -> collect -> verify -> score or judge -> select -> SFT -> reference -> preference
            -> eval, tasks

FuseChat-3.0, WRPO and FuseRL differ in what `select` makes, and in the two objectives. Every stage is a command with a
run file in the output folder, except two short ones in Python: the division of the prompts, and the held-out rows of
the preference set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.pipeline.run import Outcome
from fusemega.recipes.divide import divide, hold_out
from fusemega.recipes.fusion import dtype_of
from fusemega.recipes.implicit_settings import MODELS, ImplicitRecipe, TrainStage
from fusemega.recipes.steps import Steps
from fusemega.sampling.engines import EngineSettings

EXPORTED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # dtypes, as training.export_dtype spells them

WITH_REFERENCE = ("dpo", "rloo", "wrpo", "fuse_po")


class ImplicitWork:
    """The stages of one recipe file. A recipe calls the methods in the order in which they stand here.

    Args:
        recipe: the settings.

    Attributes:
        steps: the stages so far.
        prompts: JSONL of all prompts.
        models: name -> folder of each model that is measured, in the order of `MODELS`.
    """

    def __init__(self, recipe: ImplicitRecipe) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.steps = Steps(self.folder, recipe.nproc, recipe.parallel.model_dump(exclude_defaults=True), recipe.model)
        self.prompts = str(self.folder / "prompts" / "all.jsonl")
        self._of_domain = {domain: str(self.folder / "prompts" / f"{domain}.jsonl") for domain in recipe.domains}
        asked = {
            "prompts": recipe.prompts.model_dump(exclude_defaults=True),
            "out": self.prompts,
            "domains": self._of_domain,
        }
        files = {f"prompts.{i}": path for i, path in enumerate(recipe.prompts.paths)}
        self.steps.call("prompts", divide, asked, {}, files, {"all": self.prompts, **self._of_domain})
        self.models = {MODELS[0]: recipe.target}
        self._pairs: dict[str, str] = {}
        if recipe.evaluation.pairs is not None:
            self._pairs["pairs"] = recipe.evaluation.pairs

    def responses(self) -> dict[str, tuple[str, list[str]]]:
        """Adds the sampling of every source. Returns part -> its prompts, and the files with responses to them. Each
        domain is a part, so that it can have its own number of responses; without domains there is one, `sources`."""
        parts: dict[str, tuple[str, list[str]]] = {}
        for domain, prompts in (self._of_domain or {"": self.prompts}).items():
            parts[domain or "sources"] = (prompts, made := [])
            for name, source in self.recipe.sources.items():
                if source.domains is not None and domain not in source.domains:
                    continue
                if source.engine is None:
                    assert source.responses is not None
                    made.append(source.responses)
                    continue
                files = f"{name}-{domain}" if domain else name
                made.append(self.sample(files, name, prompts, source.engine, self.recipe.sampling_of(name, domain)))
        return parts

    def sample(self, name: str, source: str, prompts: str, engine: EngineSettings, sampling: Mapping[str, Any]) -> str:
        """Adds stage sample-`name`. Returns the file of responses."""
        return self.steps.sample(
            name, source, prompts, {"name": engine.name, **engine.model_dump(exclude_unset=True)}, sampling
        )

    def scored(self, name: str, parts: Mapping[str, tuple[str, Sequence[str]]]) -> list[str]:
        """Adds stages collect- and verify- each part, and score-`name`, or judge- or rules- each part. Returns files of
        groups with rewards."""
        recipe, found = self.recipe, []
        options = ["--min-responses", "1", *(["--keep-length"] if recipe.keep_length else [])]
        for part, (prompts, responses) in parts.items():
            groups = self.steps.collect(part, prompts, responses, *options)
            if recipe.verify is not None:
                groups = self.steps.verify(part, groups, recipe.verify)
            found.append(groups)
        if recipe.reward.rules is not None:
            rules = {"rules": recipe.reward.rules}
            return [self.steps.rules(part, groups, rules) for part, groups in zip(parts, found, strict=True)]
        if recipe.reward.judge is not None:
            return [
                self.steps.judge(part, groups, recipe.reward.judge) for part, groups in zip(parts, found, strict=True)
            ]
        reward = recipe.reward.model
        assert reward is not None
        beside = {"load", "seq_length", "micro_batch_size", "parallel"}
        return [
            self.steps.score(
                name,
                reward.load,
                # What groups say of their prompts and responses beside texts is no concern of a reward model.
                {"path": found, "seq_length": reward.seq_length, "unknown_fields": "ignore"},
                reward.model_dump(exclude_unset=True, exclude=beside),
                None if reward.parallel is None else reward.parallel.model_dump(exclude_defaults=True),
                micro_batch_size=reward.micro_batch_size,
            )
        ]

    def select(self, name: str, groups: Sequence[str], protocol: Mapping[str, Any]) -> Path:
        """Adds stage select-`name`. Returns the folder of sets."""
        recipe = self.recipe
        settings: dict[str, Any] = {"protocol": dict(protocol), "seed": recipe.seed, "unknown_fields": "ignore"}
        for key, section in (("dedup", recipe.dedup), ("decontaminate", recipe.decontaminate)):
            if section is not None:
                settings[key] = section.model_dump(exclude_unset=True)
        return Path(self.steps.select(name, groups, settings))

    def sft(self, data: Path, objective: Mapping[str, Any]) -> str:
        """Adds stage sft: the target trained on the selected responses. Returns the model.

        It is exported in fp32, because the update of the next training begins where this one ended: narrower types
        round most of a small update away.
        """
        stage = self.recipe.sft
        self.models[MODELS[1]] = self._train(
            "sft", stage, str(data), self.recipe.target, objective_of(objective, stage), "fp32"
        )
        return self.models[MODELS[1]]

    def preference(self, data: Path, objective: Mapping[str, Any]) -> str:
        """Adds stages held-out, teach-reference and preference. Returns the trained model.

        Args:
            data: the preference set.
            objective: the recipe's settings; `reference` is added where the loss has one.
        """
        stage, measured, path = self.recipe.preference, self.recipe.evaluation, str(data)
        before = self.models[MODELS[1]]
        held: str | None = None
        if measured.held_out:
            names = {"kept": "train", "held": "held_out", "pairs": "held_out_pairs"}
            files = {key: str(self.folder / "sets" / "divided" / f"{name}.jsonl") for key, name in names.items()}
            asked = {"data": path, "share": measured.held_out, **files}
            self.steps.call("held-out", hold_out, asked, {}, {"data": path}, files)
            path, held = files["kept"], files["held"]
            self._pairs["held-out"] = files["pairs"]
        asked = objective_of(objective, stage)
        rows = self._rows(stage)
        has_reference = asked["name"] in WITH_REFERENCE and asked.get("loss_type") != "simpo"
        if has_reference and "reference" not in asked:
            seen = path if held is None or measured.training is None else [path, held]
            store = self.steps.teach("reference", before, {"path": seen, **rows}, rows="none")
            asked["reference"] = {"store": store}
        evaluation = None
        if measured.training is not None:
            evaluation = {
                "data": {"path": held, **rows},
                **measured.training.model_dump(exclude_defaults=True),
            }
        dtype = EXPORTED.get(dtype_of(self.recipe.target), "fp32")
        self.models[MODELS[2]] = self._train("preference", stage, path, before, asked, dtype, evaluation)
        return self.models[MODELS[2]]

    def measure(self) -> None:
        """Adds what `evaluation` asks of every model."""
        measured = self.recipe.evaluation
        for name, load in self.models.items():
            if measured.text is not None:
                self.steps.evaluate(name, load, {"path": measured.text, "seq_length": measured.seq_length})
            for file, path in self._pairs.items():
                self.steps.evaluate(f"{file}-{name}", load, {"path": path, **self._rows(self.recipe.preference)})
            if measured.tasks is not None:
                dtype = "fp32" if self.recipe.model.get("dtype") == "fp32" else "bf16"
                engine = {"dtype": dtype, **measured.tasks.get("engine", {})}
                self.steps.tasks(name, load, {**measured.tasks, "engine": engine})

    def summary(self, outcome: Outcome, sets: Mapping[str, str]) -> list[str]:
        """Writes summary.json. Returns lines for the terminal: the sets' sizes, and figures before and after."""
        measured = self.recipe.evaluation
        counts = {name: read_json(Path(folder) / "selection.json")["files"] for name, folder in sets.items()}
        figures: dict[str, dict[str, Any]] = {name: {} for name in self.models}
        for name in self.models:
            if measured.text is not None:
                figures[name]["bits_per_byte"] = read_json(self.folder / f"eval-{name}.json")["bits_per_byte"]
            for file in self._pairs:
                found = read_json(self.folder / f"eval-{file}-{name}.json")
                figures[name] |= {f"{file}: {key}": found[key] for key in ("accuracy_mean", "accuracy_sum")}
                figures[name][f"{file}: pairs"] = found["pairs"]
        result = self.models[MODELS[2]]
        whole = {"result": result, "prompts": outcome.results["prompts"], "sets": counts, "models": figures}
        write_durably(self.folder / "summary.json", json.dumps(whole, indent=1) + "\n")
        lines = [f"{name}: {', '.join(f'{n} {file}' for file, n in files.items())}" for name, files in counts.items()]
        return [*lines, *_table(figures), f"the result is {result}"]

    def _train(
        self,
        name: str,
        stage: TrainStage,
        data: str,
        load: str,
        objective: Mapping[str, Any],
        dtype: str,
        evaluation: Mapping[str, Any] | None = None,
    ) -> str:
        training = {"export_dtype": dtype} | stage.training.model_dump(exclude_unset=True)
        optimizer = stage.optimizer.model_dump(exclude_unset=True)
        rows = {"path": data, **self._rows(stage)}
        return self.steps.train(name, load, rows, objective, optimizer, training, evaluation)

    def _rows(self, stage: TrainStage) -> dict[str, Any]:
        given = {"seq_length", "max_length", "truncation"}
        return {"seq_length": stage.seq_length} | stage.model_dump(include=given, exclude_unset=True, exclude_none=True)


def objective_of(recipes: Mapping[str, Any], stage: TrainStage) -> dict[str, Any]:
    """The objective of a stage: the recipe's settings under the file's, unless the file names another one."""
    own = stage.objective
    return {**own} if own.get("name", recipes["name"]) != recipes["name"] else {**recipes, **own}


def _table(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(figures)
    width = max((len(key) for found in figures.values() for key in found), default=0)
    if not width:
        return []
    lines = [f"{'':<{width}}  " + "  ".join(f"{name:>10}" for name in names)]
    for key in figures[names[0]]:
        lines.append(f"{key:<{width}}  " + "  ".join(f"{figures[name][key]:>10.4f}" for name in names))
    return lines
