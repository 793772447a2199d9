"""FuseRL (arXiv:2504.06562): groups of responses, which the objectives `fuse_sft` and `fuse_po` weigh by reward.

SFT: the best response of each source (or the `top_k_responses` best of all). Preference: all responses of the sources
that have two different rewards. The paper does not say how the prompts are divided; 4:6 is FuseChat-3.0's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class FuseRLSettings(ProtocolSettings):
    """The `protocol` section of `fuserl`."""

    name: Literal["fuserl"] = "fuserl"
    sft_share: float = Field(0.4, ge=0, le=1, description="share of the prompts for FuseSFT")
    top_k_responses: int | None = Field(
        None, ge=2, description="take so many best responses of all sources for FuseSFT; left out: the best of each"
    )
    alpha: float | Literal["auto"] = Field(
        0.01, description="temperature of the weights that the report shows; the objective has its own"
    )


@register_protocol("fuserl")
class FuseRLSelection(Protocol):
    """FuseRL: the best of each source for FuseSFT, and the responses of each source for FusePO."""

    Settings = FuseRLSettings
    sft_form = "group"
    preference_form = "group"
    settings: FuseRLSettings

    def __init__(self, settings: FuseRLSettings) -> None:
        super().__init__(settings)
        self.sft_share = settings.sft_share

    def offer(self, prompt: CandidatePrompt) -> Offer:
        check_rewards(prompt)
        sources = prompt.by_source()
        if self.settings.top_k_responses is None:
            chosen = [best(candidates) for candidates in sources.values()]
        else:
            ranked = sorted(prompt.candidates, key=lambda candidate: -(candidate.reward or 0.0))
            chosen = ranked[: self.settings.top_k_responses]
        differ = [candidates for candidates in sources.values() if margin(best(candidates), worst(candidates))]
        margins = tuple(margin(best(candidates), worst(candidates)) for candidates in differ)
        compared = tuple(candidate for candidates in differ for candidate in candidates)
        sft = tuple(chosen) if len(chosen) > 1 else None
        if not compared:
            why = "no source has two different rewards"
            return Offer(sft=sft, why=why)
        return Offer(sft, compared, margins=margins)
