"""What protocols have in common that compare the samples of one model: which model it is."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fusemega.errors import UserError, nearest
from fusemega.selection.protocol import Candidate, CandidatePrompt, Protocol, ProtocolSettings


class OneSourceSettings(ProtocolSettings):
    """The settings of such a protocol."""

    source: str | None = Field(None, description="the model whose samples are compared; default: the only one")


class OneSource(Protocol):
    """A protocol that compares the samples of one model."""

    settings: OneSourceSettings

    def check_sources(self, sources: Sequence[str]) -> None:
        name = self.settings.source
        if name is None and len(sources) > 1:
            raise UserError(f"protocol.source: needed, because the data have the sources {', '.join(sources)}")
        if name is not None and name not in sources:
            raise UserError(
                f"protocol.source: no response has the source {name!r}{nearest(name, sources)}; found: "
                f"{', '.join(sources)}"
            )

    def own(self, prompt: CandidatePrompt) -> list[Candidate]:
        """The model's responses to a prompt."""
        name = self.settings.source
        return [candidate for candidate in prompt.candidates if name is None or candidate.source == name]
