"""WRPO (arXiv:2412.03187): a third of the prompts for SFT on the best source response, triples for the others.

First step, without `target`: of a third of the prompts, the response of highest reward over all sources goes to SFT;
the others are written to left.jsonl, for which the trained model then samples. Second step, with `target: NAME`, from
the responses of both: groups of three in the order of the objective `wrpo`, the best of all sources, and the best and
the worst of the target.
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


class WRPOSelectionSettings(ProtocolSettings):
    """The `protocol` section of `wrpo`."""

    name: Literal["wrpo"] = "wrpo"
    sft_share: float = Field(1 / 3, ge=0, le=1, description="share of the prompts for SFT, in the first step")
    target: str | None = Field(
        None, description="source of the target's own samples: makes the triples of the second step"
    )


@register_protocol("wrpo")
class WRPOSelection(Protocol):
    """WRPO: SFT on the best of all sources and prompts for the next step; with `target`, triples."""

    Settings = WRPOSelectionSettings
    preference_form = "group"
    settings: WRPOSelectionSettings

    def __init__(self, settings: WRPOSelectionSettings) -> None:
        super().__init__(settings)
        self.sft_share = settings.sft_share if settings.target is None else None

    def check_sources(self, sources: Sequence[str]) -> None:
        target = self.settings.target
        if target is not None and target not in sources:
            raise UserError(
                f"protocol.target: no response has the source {target!r}{nearest(target, sources)}; found: "
                f"{', '.join(sources)}"
            )

    def offer(self, prompt: CandidatePrompt) -> Offer:
        check_rewards(prompt)
        if self.settings.target is None:
            return Offer(sft=(best(prompt.candidates),), left=True, kinds=("sft", "left"))
        sources = prompt.by_source()
        own = sources.pop(self.settings.target, [])
        others = [candidate for candidates in sources.values() for candidate in candidates]
        if not own or not others:
            return Offer(why=f"no response of {'a source' if own else 'the target'}", kinds=("preference",))
        chosen, rejected = best(own), worst(own)
        size = margin(chosen, rejected)
        if not size:
            return Offer(why="the target's rewards are all equal", kinds=("preference",), margins=(size,))
        return Offer(preference=(best(others), chosen, rejected), kinds=("preference",), margins=(size,))
