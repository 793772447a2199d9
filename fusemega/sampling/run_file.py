"""Run file of `fusemega sample`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from fusemega.config import Section
from fusemega.sampling.engine import SamplingSettings
from fusemega.sampling.engines import EngineSettings, parse_engine
from fusemega.sampling.prompts import PromptsConfig


class SampleRun(Section):
    """Responses of one source to all prompts."""

    source: str = Field(description="name of the source, which its responses keep")
    prompts: PromptsConfig
    output: str = Field(
        description="JSONL file of the responses, which grows; the same command goes on where it stopped"
    )
    engine: SerializeAsAny[EngineSettings] = Field(description="`name` selects the engine; its settings follow")
    sampling: SamplingSettings = SamplingSettings()

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return parse_engine(value) if isinstance(value, dict) else value
