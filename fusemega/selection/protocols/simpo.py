"""SimPO's on-policy pairs (arXiv:2405.14734): the best and the worst of the samples of one model, by reward.

Prompts whose samples are all the same are dropped, as in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fusemega.errors import UserError, nearest
from fusemega.selection.protocol import (
    CandidatePrompt,
    Offer,
    Protocol,
    ProtocolSettings,
    best,
    check_rewards,
    margin,
    register_protocol,
    worst,
)


class SimPOSelectionSettings(ProtocolSettings):
    """The `protocol` section of `simpo`."""

    name: Literal["simpo"] = "simpo"
    source: str | None = Field(None, description="the model whose samples are compared; default: the only one")


@register_protocol("simpo")
class SimPOSelection(Protocol):
    """On-policy pairs: the best against the worst of one model's samples."""

    Settings = SimPOSelectionSettings
    settings: SimPOSelectionSettings

    def check_sources(self, sources: Sequence[str]) -> None:
        name = self.settings.source
        if name is None and len(sources) > 1:
            raise UserError(f"protocol.source: needed, because the data have the sources {', '.join(sources)}")
        if name is not None and name not in sources:
            raise UserError(
                f"protocol.source: no response has the source {name!r}{nearest(name, sources)}; found: "
                f"{', '.join(sources)}"
            )

    def offer(self, prompt: CandidatePrompt) -> Offer:
        check_rewards(prompt)
        name = self.settings.source
        own = [candidate for candidate in prompt.candidates if name is None or candidate.source == name]
        if not own:
            return Offer(why=f"no response of {name}", kinds=("preference",))
        if len({candidate.same for candidate in own}) == 1:
            return Offer(why="all samples are the same", kinds=("preference",))
        chosen, rejected = best(own), worst(own)
        size = margin(chosen, rejected)
        if not size:
            return Offer(why="all rewards are equal", kinds=("preference",), margins=(size,))
        return Offer(preference=(chosen, rejected), kinds=("preference",), margins=(size,))
