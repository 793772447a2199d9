"""`engine:` of a run file: which engine, and its settings. An engine's own module is imported when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from fusemega.config import Section, choose_section
from fusemega.sampling.engine import Engine

_OURS = {
    **{name: f"sampling.{name}" for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "n")},
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "sampling.max_tokens"),
    "model": "engine.model",
    "messages": "prompts",
}


def _http(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("expected an address that begins with http:// or https://")
    return value.rstrip("/")


HTTPAddress = Annotated[str, AfterValidator(_http)]
"""The address of a server, without a slash at its end."""


class EngineSettings(Section):
    """What all engines have: a name."""

    name: str


class TransformersSettings(EngineSettings):
    """A model in this process, with transformers' `generate`, on the GPU if there is one."""

    name: Literal["transformers"] = "transformers"
    load: str = Field(description="Hugging Face folder or hub id (of a run of fusemega, its hf/)")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype of weights and activations")
    batch_size: int = Field(
        16, ge=1, description="responses that are made together; halved where the memory of the device does not suffice"
    )
    chat_template: str | None = Field(None, description="file with a jinja chat template that replaces the tokenizer's")
    template_variables: dict[str, Any] = Field(
        {}, description="further variables of the chat template, such as enable_thinking: false"
    )
    opens_with: str | None = Field(
        None,
        description="what the answer's turn begins with, such as an empty thinking block; no part of the response",
    )
    trust_remote_code: bool = Field(False, description="let the folder bring its own Python code")


class OpenAISettings(EngineSettings):
    """A model behind a server with OpenAI's chat completions: vLLM, SGLang, `transformers serve`, and others."""

    name: Literal["openai"] = "openai"
    base_url: HTTPAddress = Field(description="the server's address, such as http://localhost:8000/v1")
    model: str = Field(description="the model's name on the server")
    api_key_env: str | None = Field(
        None, description="environment variable with the key; default: none is sent. The key is written nowhere"
    )
    concurrency: int = Field(16, ge=1, le=4096, description="requests under way at once")
    timeout: float = Field(600.0, gt=0, description="seconds that a request may take")
    max_retries: int = Field(
        5, ge=0, le=100, description="further tries after timeouts, lost connections, busy servers and broken answers"
    )
    length_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls sampling.max_tokens"
    )
    extra_body: dict[str, Any] = Field(
        {}, description="further fields of each request, for this kind of server; they are recorded"
    )
    tokenizer: str | None = Field(
        None, description="the model's folder or hub id: the server's count or ids of prompt tokens must be its own"
    )

    @field_validator("extra_body")
    @classmethod
    def _nothing_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _OURS:
                raise ValueError(f"{name}: give {_OURS[name]} instead")
            if name in ("stream", "stream_options"):
                raise ValueError(f"{name}: not possible here, answers are read as a whole")
        return value


ENGINES: dict[str, type[EngineSettings]] = {"transformers": TransformersSettings, "openai": OpenAISettings}


def parse_engine(section: Mapping[str, Any], at: str = "engine.") -> EngineSettings:
    """The settings of the engine that `section["name"]` picks.

    Args:
        at: the section's place in the run file, for messages.

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    return choose_section(ENGINES, section, at)


def open_engine(settings: EngineSettings) -> Engine:
    """The engine, checked as far as that needs neither weights in memory nor a server.

    Raises:
        UserError: the model's folder is damaged or has no chat template; a package or the server's key is missing.
    """
    if isinstance(settings, TransformersSettings):
        from fusemega.sampling.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    assert isinstance(settings, OpenAISettings)
    from fusemega.sampling.openai_engine import OpenAIEngine

    return OpenAIEngine(settings)
