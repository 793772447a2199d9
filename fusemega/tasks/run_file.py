"""Run file of `fusemega tasks`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fusemega.config import Section
from fusemega.sampling.engine import SamplingSettings, unless_given
from fusemega.sampling.engines import EngineSettings, OpenAISettings, TransformersSettings, parse_engine
from fusemega.tasks import alpaca_eval, arena_hard, gsm8k, humaneval  # noqa: F401  (registers them)
from fusemega.tasks.lm_eval import LmEvalSection
from fusemega.tasks.log_probs import LogProbSettings
from fusemega.tasks.task import TaskSettings, parse_task

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


class TasksRun(Section):
    """A model's answers to tasks, and what they are worth."""

    engine: SerializeAsAny[EngineSettings] = Field(
        description="where answers come from, as in `fusemega sample`: `name` selects the engine; its settings follow"
    )
    generator: str | None = Field(
        None, description="the model's name in results and files; default: the last part of engine.load or engine.model"
    )
    sampling: SamplingSettings = Field(
        SamplingSettings(temperature=0.0), description="how answers are drawn; greedily unless it has a temperature"
    )
    tasks: dict[str, SerializeAsAny[TaskSettings]] = Field(
        {}, description="a name of your choice -> a task: `name` selects it; its settings follow"
    )
    lm_eval: LmEvalSection | None = Field(None, description="also run tasks of lm-eval on engine.load")
    output_dir: str = Field(description="folder for answers and results; the same command goes on where it stopped")

    @field_validator("sampling", mode="before")
    @classmethod
    def _is_greedy(cls, value: Any) -> Any:
        return unless_given(value, temperature=0.0)

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_name(cls, value: Any) -> Any:
        return parse_engine(value) if isinstance(value, dict) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_by_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        found = {}
        for label, section in value.items():
            if not _NAME.fullmatch(str(label)) or str(label) == "lm_eval":
                raise ValueError(
                    f"{label!r} is no name of a task; allowed: letters, digits, '.', '_', '+' and '-', not lm_eval"
                )
            if not isinstance(section, Mapping | TaskSettings):
                raise ValueError(f"{label}: expected a section with name and data, found {section!r}")
            found[str(label)] = parse_task(section, f"tasks.{label}.") if isinstance(section, Mapping) else section
        return found

    @field_validator("generator")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("files are called so; allowed: letters, digits, '.', '_', '+' and '-'")
        return value

    @model_validator(mode="after")
    def _something_to_do(self) -> TasksRun:
        """There must be a task, and what reads the model's folder needs an engine with a folder."""
        if not self.tasks and self.lm_eval is None:
            raise ValueError("tasks: none given; allowed: at least one, or lm_eval")
        if not isinstance(self.engine, TransformersSettings):
            needing = [f"tasks.{label}" for label, each in self.tasks.items() if isinstance(each, LogProbSettings)]
            needing += ["lm_eval"] if self.lm_eval is not None else []
            if needing:
                raise ValueError(
                    f"{needing[0]}: needs the model's folder, which engine.name {self.engine.name} does not have; "
                    "allowed: engine.name transformers"
                )
        return self

    @property
    def generator_name(self) -> str:
        """The model's name in results and files."""
        if self.generator is not None:
            return self.generator
        given = self.engine.model if isinstance(self.engine, OpenAISettings) else getattr(self.engine, "load", "model")
        parts = [part for part in PurePosixPath(given).parts if part not in ("hf", "/", ".", "..")]
        return re.sub(r"[^\w.+-]", "_", parts[-1] if parts else "model", flags=re.ASCII).lstrip("._+-") or "model"
