"""SimPO's on-policy pairs (arXiv:2405.14734): the best and the worst of the samples of one model, by reward.

Prompts whose samples are all the same are dropped, as in the published code.
"""

from __future__ import annotations

from typing import Literal

from fusemega.selection.protocol import (
    CandidatePrompt,
    Offer,
    best,
    check_rewards,
    margin,
    register_protocol,
    worst,
)
from fusemega.selection.protocols.one_source import OneSource, OneSourceSettings


class SimPOSelectionSettings(OneSourceSettings):
    """The `protocol` section of `simpo`."""

    name: Literal["simpo"] = "simpo"


@register_protocol("simpo")
class SimPOSelection(OneSource):
    """On-policy pairs: the best against the worst of one model's samples."""

    Settings = SimPOSelectionSettings
    settings: SimPOSelectionSettings

    def offer(self, prompt: CandidatePrompt) -> Offer:
        check_rewards(prompt)
        own = self.own(prompt)
        if not own:
            return Offer(why=f"no response of {self.settings.source}", kinds=("preference",))
        if len({candidate.same for candidate in own}) == 1:
            return Offer(why="all samples are the same", kinds=("preference",))
        chosen, rejected = best(own), worst(own)
        size = margin(chosen, rejected)
        if not size:
            return Offer(why="all rewards are equal", kinds=("preference",), margins=(size,))
        return Offer(preference=(chosen, rejected), kinds=("preference",), margins=(size,))
