"""The stages that recipes are made of: a builder for each command, which knows what the command reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusemega.files.json_files import read_json
from fusemega.hf.hub import resolve
from fusemega.models.family import keep_layers, require_int
from fusemega.models.registry import architecture_of
from fusemega.models.stages import check_layout
from fusemega.pipeline.functions import name_of
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.stage import Resources, Stage
from fusemega.runtime.layout import ParallelConfig


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
            UserError: they do not fit together.
        """
        return Graph(self.folder, self.stages)

    def check_layout(self, model: str, without: Sequence[int] = ()) -> None:
        """Refuses a layout that does not divide a model or the processes, before any stage runs.

        Args:
            model: one that is there. Without a `config.json` at its top it is left to the stage that opens it.
            without: layers that a stage will leave out of it.

        Raises:
            UserError: names the key, and what is allowed.
        """
        config_file = resolve(model) / "config.json"
        if config_file.is_file():
            layout = ParallelConfig(**self.parallel)
            layout.data_parallel_size(self.nproc)
            config = read_json(config_file)
            kept = [layer for layer in range(require_int(config, "num_hidden_layers")) if layer not in without]
            check_layout(architecture_of(keep_layers(config, kept)), layout)

    def teach(self, name: str, load: str, data: Mapping[str, Any], **settings: Any) -> str:
        """`fusemega teach` as stage teach-`name`: a model's rows of `data`. Returns the store, `stores/NAME`."""
        store = str(self.folder / "stores" / name)
        run = {"model": self._model(load), "parallel": dict(self.parallel), "data": dict(data), "store": store}
        path = data["path"]
        files = {"data": path} if isinstance(path, str) else {f"data.{i}": each for i, each in enumerate(path)}
        inputs = {"model": self._located(load), **files}
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
    ) -> str:
        """`fusemega train` as stage `name`, into the folder `name`. Returns the trained model, `NAME/hf`."""
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
        inputs |= {key: objective[key] for key in ("store", "map") if key in objective}
        inputs |= {key: self._located(objective[key]) for key in ("tokenizer",) if key in objective}
        reference = objective.get("reference", {})
        inputs |= {"reference": reference["store"]} if "store" in reference else {}
        inputs |= {"reference": self._located(reference["in_job"]["load"])} if "in_job" in reference else {}
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

    def score(self, name: str, load: str, data: Mapping[str, Any]) -> str:
        """`fusemega score` as stage score-`name`: the rows of `data` with a reward model's rewards. Returns them,
        `rewards/NAME.jsonl`."""
        output = str(self.folder / "rewards" / f"{name}.jsonl")
        run = {"model": self._model(load), "parallel": dict(self.parallel), "data": dict(data), "output": output}
        inputs = {"model": self._located(load), "data": data["path"]}
        self._launched("score", f"score-{name}", run, inputs, {"rows": output})
        return output

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
            self.check_layout(load)
        run_file = str(self.folder / f"{name}.yaml")
        self.stages.append(
            Stage(
                name,
                (verb, run_file),
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
        self.stages.append(Stage(name, argv, "", run or {}, run_file, inputs, outputs, resumes=resumes))

    def _model(self, load: str) -> dict[str, Any]:
        return {"load": load, **self.model}

    def _located(self, model: str) -> str:
        """The folder of a model: one that a stage makes, or one that is there."""
        return model if self._is_made(model) else str(resolve(model))

    def _is_made(self, model: str) -> bool:
        return any(model == path for stage in self.stages for path in stage.outputs.values())
