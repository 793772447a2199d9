"""What every engine takes and gives. An engine turns requests into responses; it knows no files.

An engine is opened with `fusemega.sampling.engines.open_engine`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field, model_validator

from fusemega.config import Section
from fusemega.errors import UserError

STOP, LENGTH, REFUSED = "stop", "length", "refused"
"""Values of `Response.finish_reason`: the model ended the response; it reached `max_tokens`; the prompt can never be
answered (it is too long, for example), so there is no text."""


def unless_given(sampling: Any, **defaults: Any) -> Any:
    """A `sampling` section as it stands in a run file, with these defaults for the keys that it does not have.

    For validators: the default of a whole section is lost as soon as one key of it is given.
    """
    return {**defaults, **sampling} if isinstance(sampling, Mapping) else sampling


class SamplingSettings(Section):
    """How responses are drawn."""

    n: int = Field(1, ge=1, le=1 << 16, description="responses to each prompt")
    temperature: float = Field(1.0, ge=0, description="0 takes the most probable token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the fewest tokens that together have this probability")
    top_k: int | None = Field(None, ge=1, description="draw from this many most probable tokens; default: from all")
    repetition_penalty: float = Field(1.0, gt=0, description="1 is none; a larger one makes repeated tokens rarer")
    max_tokens: int = Field(1024, ge=1, description="most tokens of a response")
    seed: int = Field(
        0, ge=0, lt=1 << 63, description="the seed of a response depends on it, the prompt and the number"
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> SamplingSettings:
        """With temperature 0 all responses to a prompt would be equal, so n must be 1."""
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n {self.n}: with temperature 0 all of them would be equal; allowed: 1")
        return self


@dataclass(frozen=True)
class SampleRequest:
    """One response that is wanted.

    Attributes:
        key: of the prompt, or of whatever the caller knows the answer by.
        messages: the conversation, ending with the user's turn: objects with role and content.
        sample: number of the response among those to one prompt, from 0.
    """

    key: str
    messages: tuple[Mapping[str, Any], ...]
    sample: int = 0


@dataclass(frozen=True)
class Response:
    """What an engine answered.

    Attributes:
        key, sample: the request's.
        text: without the tokens that end it.
        finish_reason: `STOP`, `LENGTH`, `REFUSED`, or another word of the server's.
        prompt_tokens, tokens: lengths of the prompt and the response; None where they are not known.
        reason: why it was refused.
    """

    key: str
    sample: int
    text: str
    finish_reason: str
    prompt_tokens: int | None
    tokens: int | None
    reason: str = ""


class Engine(Protocol):
    """Turns requests into responses."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the responses depend on besides the messages and the sampling settings (JSON-able). It has no secrets,
        and nothing that decides speed alone."""
        ...

    def prepare(self) -> None:
        """Makes ready what `generate` needs: the weights, or a server that has the model. `generate` calls it too.

        Raises:
            UserError: it cannot be had.
        """
        ...

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        skip: Collection[tuple[str, int]] = frozenset(),
    ) -> Iterator[Response]:
        """The responses, in any order, each as soon as it is there.

        Args:
            requests: all that are wanted.
            settings: how they are drawn; `n` is not used.
            skip: (key, sample) of requests whose responses the caller has already. They are given so that a batch is
                the same whether or not an earlier run was interrupted.

        Raises:
            Missing: some requests got no response; it is raised after all others have been given.
            UserError: no request can get one.
        """
        ...


class Missing(UserError):
    """Some requests got no response. What was given before stays valid.

    Attributes:
        requests: those without a response.
    """

    def __init__(self, message: str, requests: Sequence[SampleRequest]) -> None:
        super().__init__(message)
        self.requests = tuple(requests)


def request_seed(seed: int, key: str, sample: int) -> int:
    """The seed of one response, 31 bits (servers differ in how many they take). It depends on nothing else."""
    digest = hashlib.blake2b(f"{seed} {sample} {key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
