"""FuseChat-3.0 (arXiv:2503.04222): the best response over all sources for SFT, pairs within one source for DPO.

    instruction   SFT: highest reward. DPO: highest against lowest reward of one source, if the margin is in the window
    maths         SFT: correct, of highest reward. DPO: correct, of highest reward, against incorrect, of lowest reward,
                  of one source, if the margin is in the window
    code          as maths, where correct means that all tests are passed, without the window
    chinese       SFT only: highest reward

A prompt gives one pair: of the source with the largest margin. A maths or code prompt without a correct response is
dropped. Of the instruction prompts with a pair, two fifths go to SFT. Maths and code prompts with a pair go to DPO, as
long as two fifths of all are left for SFT.

Published are the sets' sizes, and that the pairs of a prompt are of one source. Which source, the split of maths and
code, and that the window is no rule for code are this project's choices. The published sizes of the instruction sets
are exactly floor(0.4 n) of n prompts, so the prompts without a pair were gone before the split: `without_pair: drop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from fusemega.errors import UserError, nearest
from fusemega.selection.protocol import (
    Candidate,
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

Domain = Literal["instruction", "maths", "code", "chinese"]
DOMAINS: tuple[Domain, ...] = ("instruction", "maths", "code", "chinese")


class FuseChat3Settings(ProtocolSettings):
    """The `protocol` section of `fusechat3`."""

    name: Literal["fusechat3"] = "fusechat3"
    sft_share: float = Field(
        0.4, ge=0, le=1, description="share of the prompts for SFT; of maths and code the least share"
    )
    min_margin: float = Field(0.01, ge=0, description="smallest difference of a pair's rewards")
    max_margin: float | None = Field(0.1, gt=0, description="largest difference of a pair's rewards; null: any")
    code_window: bool = Field(False, description="whether the margins of pairs of code are bounded, too")
    without_pair: Literal["drop", "sft"] = Field(
        "drop", description="instruction prompts without a pair: leave them out, or take them for SFT"
    )
    default_domain: Domain = Field("instruction", description="domain of rows that name none")
    domains: dict[str, Domain] = Field({}, description="other words for a domain in the rows, such as `math: maths`")

    @model_validator(mode="after")
    def _window_is_open(self) -> FuseChat3Settings:
        """max_margin must not be less than min_margin."""
        if self.max_margin is not None and self.max_margin < self.min_margin:
            raise ValueError(f"max_margin {self.max_margin} is less than min_margin {self.min_margin}")
        return self


@register_protocol("fusechat3")
class FuseChat3(Protocol):
    """FuseChat-3.0: by domain, the best over all sources for SFT, and pairs within one source for DPO."""

    Settings = FuseChat3Settings
    settings: FuseChat3Settings

    def __init__(self, settings: FuseChat3Settings) -> None:
        super().__init__(settings)
        self.sft_share = settings.sft_share

    def domain_of(self, prompt: CandidatePrompt) -> str:
        if not prompt.domain:
            return self.settings.default_domain
        domain = self.settings.domains.get(prompt.domain, prompt.domain)
        if domain not in DOMAINS:
            raise UserError(
                f"{prompt.place}: domain {prompt.domain!r}{nearest(prompt.domain, DOMAINS)}; allowed: "
                f"{', '.join(DOMAINS)}, or a word of protocol.domains"
            )
        return domain

    def offer(self, prompt: CandidatePrompt) -> Offer:
        domain = self.domain_of(prompt)
        check_rewards(prompt)
        if domain == "chinese":
            return Offer(sft=(best(prompt.candidates),), kinds=("sft",))
        if domain == "instruction":
            pair, margins = self._pair(prompt, prompt.candidates, prompt.candidates, windowed=True)
            if pair is None and self.settings.without_pair == "drop":
                return Offer(why=self._no_pair, margins=margins)
            return Offer((best(prompt.candidates),), pair, why="" if pair else self._no_pair, margins=margins)
        if not prompt.verified:
            raise UserError(
                f"{prompt.place}: the row is of domain {domain}, and its responses have no `correct`; allowed: rows as "
                "`fusemega verify` writes them"
            )
        right = [candidate for candidate in prompt.candidates if candidate.correct is True]
        wrong = [candidate for candidate in prompt.candidates if candidate.correct is False]
        if not right:
            return Offer(why="no response is correct" if domain == "maths" else "every response fails")
        windowed = domain == "maths" or self.settings.code_window
        pair, margins = self._pair(prompt, right, wrong, windowed)
        why = "" if pair else self._no_pair if margins else "no source has both kinds of response"
        return Offer((best(right),), pair, why=why, margins=margins)

    @property
    def _no_pair(self) -> str:
        low, high = self.settings.min_margin, self.settings.max_margin
        return f"no pair in the window {low:g} to {'any' if high is None else f'{high:g}'}"

    def _pair(
        self, prompt: CandidatePrompt, right: Sequence[Candidate], wrong: Sequence[Candidate], windowed: bool
    ) -> tuple[tuple[Candidate, Candidate] | None, tuple[float, ...]]:
        """The pair of the source with the largest margin that is allowed; and the margin of every source."""
        found: tuple[Candidate, Candidate] | None = None
        margins = []
        for source in prompt.by_source():
            of_right = [candidate for candidate in right if candidate.source == source]
            of_wrong = [candidate for candidate in wrong if candidate.source == source]
            if not of_right or not of_wrong:
                continue
            chosen, rejected = best(of_right), worst(of_wrong)
            if chosen is rejected:  # one response, or equal rewards
                continue
            size = margin(chosen, rejected)
            margins.append(size)
            if windowed and not self._is_inside(size):
                continue
            if found is None or size > margin(*found):
                found = chosen, rejected
        return found, tuple(margins)

    def _is_inside(self, size: float) -> bool:
        high = self.settings.max_margin
        return size >= self.settings.min_margin and (high is None or size <= high)
