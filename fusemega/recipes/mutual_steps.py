"""The stages of Mutual-Taught that other recipes do not have: sampling from a policy that changes, and checkpoints as
models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusemega.files.integrity import FILE
from fusemega.pipeline.functions import name_of
from fusemega.pipeline.stage import Resources, Stage
from fusemega.recipes.steps import Steps


class MutualSteps(Steps):
    """`Steps` with these stages."""

    def sample_policy(
        self,
        name: str,
        source: str,
        policy: str,
        prompts: str,
        engine: Mapping[str, Any],
        sampling: Mapping[str, Any],
        after: str | None = None,
        keeps: bool = False,
    ) -> str:
        """`fusemega sample` of a policy, as stage sample-`name`. Returns the responses, as `Steps.sample`.

        Args:
            name: name of the responses.
            source: name of the policy in the rows.
            policy: its folder: what the engine loads, or what its server knows it by.
            prompts: a prompts file.
            engine: section `engine` of the run file without the policy.
            sampling: section `sampling`.
            after: a path that has to be there first, though it is not read; None: there is none.
            keeps: whether the policy stays the same, so that responses stay where other things change.
        """
        key = "load" if engine["name"] == "transformers" else "model"
        made = self.sample(name, source, prompts, {**engine, key: policy}, sampling)
        # Behind a server it is a name only; yet it has to be there first, and of another one all responses are others.
        inputs = {**self.stages[-1].inputs, "model": self._located(policy)} | ({"after": after} if after else {})
        self.stages[-1] = replace(self.stages[-1], inputs=inputs, keeps=keeps)
        return made

    def export(self, name: str, checkpoint: Path, dtype: str) -> str:
        """`fusemega convert export` of one checkpoint as stage export-`name`. Returns the model, `policies/NAME`.

        Args:
            name: name of the model.
            checkpoint: its folder. The list of its files, with their hashes, stands for its content.
            dtype: of the weights, as the command takes it.
        """
        out = str(self.folder / "policies" / name)
        words = ("convert", "export", str(checkpoint), out, "--dtype", dtype, "--resume")
        self._tool(f"export-{name}", words, {"checkpoint": str(checkpoint / FILE)}, {"model": out})
        return out

    def divergence(self, name: str, load: str, reference: str, data: Mapping[str, Any]) -> str:
        """`fusemega eval` of a model beside a reference, as stage eval-`name`: `kl` is KL(reference || model), nats a
        token. Returns the figures, `eval-NAME.json`."""
        output = str(self.folder / f"eval-{name}.json")
        run = {"model": self._model(load), "parallel": dict(self.parallel), "data": dict(data), "output": output}
        run["reference"] = self._model(reference)
        inputs = {"model": self._located(load), "reference": self._located(reference), "data": data["path"]}
        self._launched("eval", f"eval-{name}", run, inputs, {"figures": output})
        return output

    def work(
        self,
        name: str,
        function: Callable[..., Any],
        settings: Mapping[str, Any],
        models: Mapping[str, str],
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        owns: Sequence[str] = (),
    ) -> None:
        """As `call`, of a function that runs a graph of its own in the folders `owns`, on `nproc` ranks.

        That graph knows what of it has to run again, after an interruption and where settings have changed.
        """
        read = {key: self._located(load) for key, load in models.items()} | dict(inputs)
        self.stages.append(
            Stage(
                name,
                (),
                name_of(function),
                dict(settings),
                inputs=read,
                outputs=dict(outputs),
                owns=tuple(owns),
                resumes=True,
                keeps=True,
                resources=Resources(self.nproc),
            )
        )
