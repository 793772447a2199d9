"""The stages that recipes are made of: a builder for each command, which knows what the command reads and makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusemega.files.json_files import read_json
from fusemega.hf.hub import resolve
from fusemega.models.registry import architecture_of
from fusemega.models.stages import check_layout
from fusemega.pipeline.functions import name_of
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.stage import Resources, Stage
from fusemega.recipes.run_files import check_run_files
from fusemega.runtime.layout import ParallelConfig

_SETTINGS = ".settings.json"  # of a file of responses, beside it


@dataclass
class Steps:
    """Collects the stages of one recipe. Each method adds a stage and returns the path that it makes.

    Attributes:
        folder: the output folder; a stage's run file is `folder/NAME.yaml`.
        nproc: processes of each stage that runs a model.
        parallel: section `parallel` of their run files.
        model: section `model` of their run files, without `load`.
        stages: the stages added so far.
    """

    folder: Path
    nproc: int
    parallel: Mapping[str, Any]
    model: Mapping[str, Any]
    stages: list[Stage] = field(default_factory=list)

    def graph(self) -> Graph:
        """The stages so far, checked.

        Raises:
            UserError: they do not fit together, or a command would refuse its run file.
        """
        check_run_files(self.stages)
        return Graph(self.folder, self.stages)

    def check_layout(self, model: str, parallel: Mapping[str, Any] | None = None) -> None:
        """Refuses a layout that does not divide a model or the processes, before any stage runs.

        Args:
            model: one that is there. Without a `config.json` at its top it is left to the stage that opens it.
            parallel: the layout; default: the recipe's.

        Raises:
            UserError: names the key, and what is allowed.
        """
        config_file = resolve(model) / "config.json"
        if config_file.is_file():
            layout = ParallelConfig(**(self.parallel if parallel is None else parallel))
            layout.data_parallel_size(self.nproc)
            check_layout(architecture_of(read_json(config_file)), layout)

    def teach(self, name: str, load: str, data: Mapping[str, Any], **settings: Any) -> str:
        """`fusemega teach` as stage teach-`name`: a model's rows of `data`. Returns the store, `stores/NAME`."""
        store = str(self.folder / "stores" / name)
        run = {"model": self._model(load), "parallel": dict(self.parallel), "data": dict(data), "store": store}
        inputs = {"model": self._located(load), **files_of(data)}
        self._launched("teach", f"teach-{name}", run | settings, inputs, {"store": store})
        return store

    def align(self, name: str, source: str, target: str, *options: str, data: str | None = None) -> str:
        """`fusemega align` as stage align-`name`. Returns the vocabulary map, `maps/NAME.map`.

        Args:
            name: name of the map.
            source: a model or tokenizer.
            target: a model or tokenizer.
            options: further words of the command.
            data: the text whose statistics the map uses.
        """
        out = str(self.folder / "maps" / f"{name}.map")
        inputs = {"source": self._located(source), "target": self._located(target)}
        inputs |= {} if data is None else {"data": data}
        text = () if data is None else ("--data", data)
        self._tool(f"align-{name}", ("align", source, target, out, *options, *text), inputs, {"map": out})
        return out

    def transplant(self, model: str, out: str, tokenizer: str) -> str:
        """`fusemega transplant` as stage transplant. Returns `out`, the model on the other vocabulary."""
        inputs = {"model": self._located(model), "tokenizer": self._located(tokenizer)}
        self._tool("transplant", ("transplant", model, out, "--tokenizer", tokenizer), inputs, {"model": out})
        return out

    def split(self, data: str, out: str, models: Sequence[str], max_tokens: int) -> str:
        """`fusemega split` as stage split. Returns `out`, text that fits the windows of all `models`."""
        words = ("split", data, out, "--tokenizers", *models, "--max-tokens", str(max_tokens))
        inputs = {"data": data} | {f"tokenizers.{i}": self._located(model) for i, model in enumerate(models)}
        self._tool("split", words, inputs, {"data": out})
        return out

    def train(
        self,
        name: str,
        load: str,
        data: Mapping[str, Any],
        objective: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        training: Mapping[str, Any],
        evaluation: Mapping[str, Any] | None = None,
    ) -> str:
        """`fusemega train` as stage `name`, into the folder `name`. Returns the trained model, `NAME/hf`.

        Args:
            name: name of the stage.
            load: the model that training starts from.
            data, objective, optimizer, training, evaluation: sections of the run file.
        """
        out = self.folder / name
        run = {
            "output_dir": str(out),
            "model": self._model(load),
            "parallel": dict(self.parallel),
            "data": dict(data),
            "objective": dict(objective),
            "optimizer": dict(optimizer),
            "training": dict(training),
        }
        inputs = {"model": self._located(load), "data": data["path"]}
        if evaluation is not None:
            run["evaluation"] = dict(evaluation)
            inputs["evaluation"] = evaluation["data"]["path"]
        inputs |= {key: objective[key] for key in ("store", "map") if key in objective}
        inputs |= {key: self._located(objective[key]) for key in ("tokenizer",) if key in objective}
        reference = objective.get("reference", {})
        inputs |= {"reference": reference["store"]} if "store" in reference else {}
        inputs |= {"reference": self._located(reference["in_job"]["load"])} if "in_job" in reference else {}
        inputs |= {"teacher": self._located(objective["teacher"]["load"])} if "teacher" in objective else {}
        for number, teacher in enumerate(objective.get("teachers", [])):
            inputs |= {f"teachers.{number}.{key}": teacher[key] for key in ("store", "map") if key in teacher}
        outputs = {"hf": str(out / "hf"), "metrics": str(out / "metrics.jsonl")}
        self._launched("train", name, run, inputs, outputs, (str(out),))
        return outputs["hf"]

    def merge(self, run: Mapping[str, Any]) -> str:
        """`fusemega merge` as stage merge. Returns the model, folder `merged`.

        Args:
            run: the run file: models, base_model, method.
        """
        out, run_file = str(self.folder / "merged"), str(self.folder / "merge.yaml")
        inputs = {f"models.{i}": self._located(one["model"]) for i, one in enumerate(run["models"])}
        inputs |= {"base_model": self._located(run["base_model"])} if "base_model" in run else {}
        self._tool("merge", ("merge", run_file, out, "--resume"), inputs, {"model": out}, dict(run), run_file)
        return out

    def evaluate(self, name: str, load: str, data: Mapping[str, Any]) -> str:
        """`fusemega eval` as stage eval-`name`. Returns the figures, `eval-NAME.json`."""
        output = str(self.folder / f"eval-{name}.json")
        run = {"model": self._model(load), "parallel": dict(self.parallel), "data": dict(data), "output": output}
        inputs = {"model": self._located(load), "data": data["path"]}
        self._launched("eval", f"eval-{name}", run, inputs, {"figures": output})
        return output

    def score(
        self,
        name: str,
        load: str,
        data: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
        parallel: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> str:
        """`fusemega score` as stage score-`name`: the rows of `data` with a reward model's rewards. Returns them,
        `rewards/NAME.jsonl`.

        Args:
            name: name of the rows.
            load: the reward model.
            data: section `data` of the run file.
            model, parallel: its sections; default: the recipe's.
            settings: its other keys.
        """
        output = str(self.folder / "rewards" / f"{name}.jsonl")
        sections = {
            "model": self._model(load) if model is None else {"load": load, **model},
            "parallel": dict(self.parallel if parallel is None else parallel),
            "data": dict(data),
        }
        inputs = {"model": self._located(load), **files_of(data)}
        self._launched("score", f"score-{name}", {**sections, **settings, "output": output}, inputs, {"rows": output})
        return output

    def sample(
        self, name: str, source: str, prompts: str, engine: Mapping[str, Any], sampling: Mapping[str, Any]
    ) -> str:
        """`fusemega sample` as stage sample-`name`. Returns the responses, `responses/NAME.jsonl`.

        They stay where prompts or settings change: the command goes on with them if they fit, and refuses to if not.

        Args:
            name: name of the responses.
            source: name of the model in the rows.
            prompts: a prompts file.
            engine: section `engine` of the run file; of a model here, `load` is a folder, or made by a stage.
            sampling: section `sampling`.
        """
        output, run_file = str(self.folder / "responses" / f"{name}.jsonl"), str(self.folder / f"sample-{name}.yaml")
        run = {"source": source, "prompts": {"path": prompts}, "output": output}
        run |= {"engine": dict(engine), "sampling": dict(sampling)}
        inputs = {"prompts": prompts} | ({"model": self._located(engine["load"])} if "load" in engine else {})
        outputs = {"responses": output, "settings": f"{output}{_SETTINGS}"}
        stage = Stage(f"sample-{name}", ("sample", run_file), "", run, run_file, inputs, outputs)
        # Of a model that a stage makes anew, all responses are others.
        keeps = "load" not in engine or not self._is_made(engine["load"])
        self.stages.append(replace(stage, resumes=True, keeps=keeps, may_be_array=True))
        return output

    def collect(self, name: str, prompts: str, responses: Sequence[str], *options: str) -> str:
        """`fusemega collect` as stage collect-`name`. Returns the groups, `groups/NAME.jsonl`.

        Args:
            name: name of the groups.
            prompts: the prompts file.
            responses: files of `sample`.
            options: further words of the command.
        """
        out = str(self.folder / "groups" / f"{name}.jsonl")
        inputs = {"prompts": prompts} | {f"responses.{i}": path for i, path in enumerate(responses)}
        inputs |= {f"settings.{i}": f"{path}{_SETTINGS}" for i, path in enumerate(responses)}
        self._tool(f"collect-{name}", ("collect", prompts, out, *responses, *options), inputs, {"groups": out})
        return out

    def verify(self, name: str, groups: str, settings: Mapping[str, Any]) -> str:
        """`fusemega verify` as stage verify-`name`. Returns the groups with `correct`, `verified/NAME.jsonl`.

        Args:
            name: name of the groups.
            groups: their file.
            settings: further keys of the run file.
        """
        return self._written("verify", name, groups, "verified", settings)

    def judge(self, name: str, groups: str, settings: Mapping[str, Any]) -> str:
        """`fusemega judge` as stage judge-`name`. Returns the groups with rewards, `rewards/NAME.jsonl`. Arguments as
        `verify`'s."""
        return self._written("judge", name, groups, "rewards", settings)

    def rules(self, name: str, groups: str, settings: Mapping[str, Any]) -> str:
        """`fusemega rules` as stage rules-`name`. Returns the groups with rewards, `rewards/NAME.jsonl`. Arguments as
        `verify`'s."""
        return self._written("rules", name, groups, "rewards", settings)

    def select(self, name: str, groups: Sequence[str], settings: Mapping[str, Any]) -> str:
        """`fusemega select` as stage select-`name`. Returns the folder of sets, `sets/NAME`.

        Args:
            name: name of the sets.
            groups: files of groups with rewards.
            settings: further keys of the run file: protocol, seed, dedup, decontaminate.
        """
        out, run_file = str(self.folder / "sets" / name), str(self.folder / f"select-{name}.yaml")
        run = {"data": list(groups), "output_dir": out, **settings}
        inputs = {f"data.{i}": path for i, path in enumerate(groups)}
        for number, known in enumerate((settings.get("decontaminate") or {}).get("against", [])):
            paths = [known["path"]] if isinstance(known["path"], str) else known["path"]
            inputs |= {f"against.{number}.{i}": path for i, path in enumerate(paths) if os.path.exists(path)}
        self._tool(f"select-{name}", ("select", run_file), inputs, {"sets": out}, run, run_file)
        return out

    def tasks(self, name: str, load: str, settings: Mapping[str, Any]) -> str:
        """`fusemega tasks` as stage tasks-`name`. Returns the folder of results, `tasks/NAME`.

        Args:
            name: name of the model.
            load: the model.
            settings: further keys of the run file; `engine` without `load`.
        """
        out, run_file = str(self.folder / "tasks" / name), str(self.folder / f"tasks-{name}.yaml")
        engine = {"name": "transformers", **settings.get("engine", {}), "load": load}
        run = {"generator": name, **settings, "engine": engine, "output_dir": out}
        inputs = {"model": self._located(load)}
        for label, task in settings.get("tasks", {}).items():
            paths = files_of(task.get("data") or {"path": []}, f"tasks.{label}")
            inputs |= {key: path for key, path in paths.items() if os.path.exists(path)}
        stage = Stage(f"tasks-{name}", ("tasks", run_file), "", run, run_file, inputs, {"results": out})
        self.stages.append(replace(stage, resumes=True))
        return out

    def call(
        self,
        name: str,
        function: Callable[..., Any],
        settings: Mapping[str, Any],
        models: Mapping[str, str],
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        run_file: str = "",
    ) -> None:
        """A Python function under `@stage_function` as stage `name`.

        Args:
            name: name of the stage.
            function: called with `settings` as its keyword arguments.
            settings: JSON-able.
            models: name -> model that it reads, by folder or hub id.
            inputs: name -> any other path that it reads.
            outputs: name -> path that it makes.
            run_file: see `Stage`.
        """
        read = {key: self._located(load) for key, load in models.items()} | dict(inputs or {})
        stage = Stage(name, (), name_of(function), dict(settings), run_file, read, dict(outputs or {}))
        self.stages.append(stage)

    def _launched(
        self,
        verb: str,
        name: str,
        run: dict[str, Any],
        inputs: dict[str, str],
        outputs: dict[str, str],
        owns: tuple[str, ...] = (),
    ) -> None:
        load = run["model"]["load"]
        if not self._is_made(load):
            self.check_layout(load, parallel=run["parallel"])
        run_file = str(self.folder / f"{name}.yaml")
        self.stages.append(
            Stage(
                name,
                (*verb.split(), run_file),
                settings=run,
                run_file=run_file,
                inputs=inputs,
                outputs=outputs,
                owns=owns,
                resumes=verb != "eval",
                resources=Resources(self.nproc),
                may_be_array=True,
            )
        )

    def _written(self, verb: str, name: str, groups: str, folder: str, settings: Mapping[str, Any]) -> str:
        """A command that writes the rows of `groups` again, with more in them, and resumes."""
        output, run_file = str(self.folder / folder / f"{name}.jsonl"), str(self.folder / f"{verb}-{name}.yaml")
        run = {"data": groups, "output": output, **settings}
        stage = Stage(f"{verb}-{name}", (verb, run_file), "", run, run_file, {"data": groups}, {"rows": output})
        self.stages.append(replace(stage, resumes=True, whole=True))
        return output

    def _tool(
        self,
        name: str,
        argv: tuple[str, ...],
        inputs: dict[str, str],
        outputs: dict[str, str],
        run: dict[str, Any] | None = None,
        run_file: str = "",
    ) -> None:
        resumes = "--resume" in argv
        self.stages.append(Stage(name, argv, "", run or {}, run_file, inputs, outputs, resumes=resumes, whole=resumes))

    def _model(self, load: str) -> dict[str, Any]:
        return {"load": load, **self.model}

    def _located(self, model: str) -> str:
        """The folder of a model: one that a stage makes, or one that is there."""
        return model if self._is_made(model) else str(resolve(model))

    def _is_made(self, model: str) -> bool:
        return any(model == path for stage in self.stages for path in stage.outputs.values())


def files_of(data: Mapping[str, Any], name: str = "data") -> dict[str, str]:
    """The inputs that a section `data` names."""
    path = data["path"]
    return {name: path} if isinstance(path, str) else {f"{name}.{i}": each for i, each in enumerate(path)}
