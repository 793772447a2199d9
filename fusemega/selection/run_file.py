"""The run file of `fusemega select`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from fusemega.config import Section
from fusemega.selection import protocols  # noqa: F401  (registers them)
from fusemega.selection.protocol import ProtocolSettings, parse_protocol


class DedupConfig(Section):
    """Near-duplicates among the prompts: one of them is kept."""

    ngram: int = Field(5, ge=1, le=64, description="words of an n-gram")
    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard index of two prompts' n-grams from which on they are duplicates"
    )


class NamedSet(Section):
    """Texts that prompts must not contain, such as a benchmark's questions."""

    name: str = Field(description="name in the report")
    path: str | list[str] = Field(description="as data.path of other run files")
    split: str | None = Field(None, description="as data.split of other run files")
    field: str | None = Field(
        None,
        description="field of a row that has the text; default: the first of prompt, question, instruction, problem, "
        "text, messages that is there",
    )


class DecontaminateConfig(Section):
    """Prompts that contain a text of a named set are left out."""

    against: list[NamedSet] = Field(min_length=1, description="the named sets")
    ngram: int = Field(8, ge=1, le=64, description="words of an n-gram; a shorter text must be equal as a whole")
    threshold: float = Field(
        0.5, gt=0, le=1, description="share of a text's n-grams from which on a prompt that has them is left out"
    )


class SelectRun(Section):
    """Run file of `fusemega select`."""

    data: str | list[str] = Field(
        description="groups of responses with rewards: file, folder, glob or hub name, or a list of the first three; "
        "rows of the same prompt are joined"
    )
    output_dir: str = Field(description="folder to make: the sets, selection.json, and a page")
    protocol: SerializeAsAny[ProtocolSettings] = Field(
        description="the protocol and its settings, by `name`; the name alone takes its defaults"
    )
    seed: int = Field(42, ge=0, description="decides which prompts go to which set, and the order of the rows")
    sources: list[str] | None = Field(
        None, min_length=1, description="only responses of these sources; default: of all"
    )
    dedup: DedupConfig | None = Field(None, description="leave out near-duplicates; default: equal prompts are joined")
    decontaminate: DecontaminateConfig | None = Field(None, description="leave out prompts that contain known texts")
    unknown_fields: Literal["error", "ignore"] = Field(
        "error", description="an unknown field is an error, or is left out and counted"
    )

    @field_validator("protocol", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        return parse_protocol(value) if isinstance(value, dict) else value
