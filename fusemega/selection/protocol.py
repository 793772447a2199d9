"""What a selection protocol is: what each prompt could give, decided for the prompt alone, and the share of each set.

A new protocol is one file in `protocols/`: a `ProtocolSettings` and a `Protocol` under `@register_protocol(name)`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from fusemega.config import Section, choose_section
from fusemega.errors import UserError, choose

SetName = Literal["sft", "preference", "left"]
SETS: tuple[SetName, ...] = ("sft", "preference", "left")


class Candidate(NamedTuple):
    """One response to a prompt.

    Attributes:
        text: its number in the `Texts` of the run.
        source: the model that wrote it; "" if the row does not say.
        reward: None if it was not scored.
        correct: None if that could not be decided, or was not asked.
        length: in tokens, or in characters where a response of the data has no `tokens`.
        same: equal texts have equal numbers.
    """

    text: int
    source: str
    reward: float | None = None
    correct: bool | None = None
    length: int = 0
    same: int = 0


@dataclass(frozen=True)
class CandidatePrompt:
    """A prompt with all responses to it.

    Attributes:
        key: its `prompt_key`.
        candidates: sorted by source, sample and text, whatever the order in the files was.
        domain: of the row, or "".
        dataset: the data set that it is from, or "".
        verified: whether every response has a verdict (true, false, or null: could not be decided).
        place: file and row, for messages.
    """

    key: str
    candidates: tuple[Candidate, ...]
    domain: str = ""
    dataset: str = ""
    verified: bool = False
    place: str = ""

    def by_source(self) -> dict[str, list[Candidate]]:
        """Source -> its responses, both sorted.

        Raises:
            UserError: a response names no source.
        """
        found: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            if not candidate.source:
                raise UserError(f"{self.place}: a response names no source, and this protocol treats each by itself")
            found.setdefault(candidate.source, []).append(candidate)
        return found


class Offer(NamedTuple):
    """What a prompt could give.

    Attributes:
        sft: the response for the SFT set (of a protocol with groups: several); None: none is fit for it.
        preference: the responses for the preference set, in the order of the file's row; None: there are none.
        left: whether it can be left for a later step.
        why: the rule by which it gives no preference, or nothing at all.
        kinds: the sets that a prompt of its domain may be in.
        margins: difference of the best and the worst reward that were compared, of each source.
    """

    sft: tuple[Candidate, ...] | None = None
    preference: tuple[Candidate, ...] | None = None
    left: bool = False
    why: str = ""
    kinds: tuple[SetName, ...] = ("sft", "preference")
    margins: tuple[float, ...] = ()

    @property
    def is_nothing(self) -> bool:
        return self.sft is None and self.preference is None and not self.left


class ProtocolSettings(Section):
    """The `protocol` section of a run file: `name`, then that protocol's own settings."""

    name: str


class Protocol(ABC):
    """A published way to make training sets of scored responses.

    Attributes:
        Settings: its section of the run file.
        sft_form: what a row of sft.jsonl is: `completion` (prompt and completion), or `group` (prompt and responses).
        preference_form: what a row of preference.jsonl is: `pair` (prompt, chosen, rejected), or `group`.
        sft_share: the share of the prompts, of each domain and data set, for the SFT set. Prompts that could be in
            both sets fill the other one up to the rest; None: there is one set.
    """

    Settings: ClassVar[type[ProtocolSettings]]
    sft_form: ClassVar[Literal["completion", "group"]] = "completion"
    preference_form: ClassVar[Literal["pair", "group"]] = "pair"
    sft_share: float | None = None

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def check_sources(self, sources: Sequence[str]) -> None:  # noqa: B027  (most protocols ask nothing of them)
        """Refuses data without the sources that the settings name. Raises a UserError."""

    def domain_of(self, prompt: CandidatePrompt) -> str:
        """The domain as the report has it; shares hold in each domain and data set. Raises a UserError."""
        return prompt.domain

    @abstractmethod
    def offer(self, prompt: CandidatePrompt) -> Offer:
        """What the prompt could give. A pure function of the prompt.

        Raises:
            UserError: the row lacks what the protocol needs.
        """


_PROTOCOLS: dict[str, type[Protocol]] = {}
ProtocolClass = TypeVar("ProtocolClass", bound=type[Protocol])


def register_protocol(name: str) -> Callable[[ProtocolClass], ProtocolClass]:
    """Class decorator: the protocol is found under `protocol.name: <name>` in run files."""

    def add(cls: ProtocolClass) -> ProtocolClass:
        _PROTOCOLS[name] = cls
        return cls

    return add


def protocol_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_PROTOCOLS)


def protocol_named(name: str) -> type[Protocol]:
    """The class registered under a name."""
    return _PROTOCOLS[choose("protocol.name", name, _PROTOCOLS)]


def parse_protocol(section: Mapping[str, Any]) -> ProtocolSettings:
    """The settings of the protocol that `section["name"]` picks.

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    return choose_section({name: each.Settings for name, each in _PROTOCOLS.items()}, section, "protocol.")


def place_in_order(seed: int, key: str) -> bytes:
    """Where a prompt stands in the order of the seed: depends on nothing but the two."""
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()


def divide(offers: Iterable[tuple[str, str, Offer]], seed: int, sft_share: float | None) -> dict[str, SetName]:
    """Which set each prompt goes to.

    In each pool, of n prompts that give something, floor(sft_share n) or more go to SFT: those that could give nothing
    else, then the last ones in the order of the seed. So the sets do not depend on the order of the rows, and a prompt
    that is added moves only prompts that stand at the border.

    Args:
        offers: (key, pool, offer) of each prompt; those that give nothing are left out.
        seed: decides the order.
        sft_share: of each pool; None: whatever an offer has, preference before SFT.

    Returns:
        Key -> set, of the prompts that are in one.

    >>> a = Candidate(0, "m")
    >>> both = Offer(sft=(a,), preference=(a, a))
    >>> sorted(divide([(str(i), "p", both) for i in range(5)], 0, 0.4).values())
    ['preference', 'preference', 'preference', 'sft', 'sft']
    """
    pools: dict[str, list[tuple[bytes, str, Offer]]] = defaultdict(list)
    for key, pool, offer in offers:
        if not offer.is_nothing:
            pools[pool].append((place_in_order(seed, key), key, offer))
    found: dict[str, SetName] = {}
    for members in pools.values():
        members.sort(key=lambda member: member[:2])
        # 1/3 of 3 is 1, also in floating point.
        room = len(members) if sft_share is None else len(members) - math.floor(sft_share * len(members) + 1e-9)
        second = 0
        for _, key, offer in members:
            other: SetName | None = "preference" if offer.preference is not None else "left" if offer.left else None
            if other is not None and (second < room or offer.sft is None):
                found[key], second = other, second + 1
            else:
                found[key] = "sft"
    return found


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The one of highest reward; the first of equal ones. All have a reward, or there is one."""
    return max(candidates, key=_reward)


def worst(candidates: Sequence[Candidate]) -> Candidate:
    """The one of lowest reward; the first of equal ones."""
    return min(candidates, key=_reward)


def margin(chosen: Candidate, rejected: Candidate) -> float:
    """Difference of two rewards. Rounded, because 0.15 - 0.14 is less than 0.01 in floating point."""
    return round(_reward(chosen) - _reward(rejected), 12)


def check_rewards(prompt: CandidatePrompt) -> None:
    """Refuses responses that cannot be ranked. A single one needs no reward.

    Raises:
        UserError: names the row.
    """
    if len(prompt.candidates) > 1 and any(candidate.reward is None for candidate in prompt.candidates):
        raise UserError(
            f"{prompt.place}: a response has no reward, and the responses to a prompt are ranked by it; allowed: rows "
            "with rewards, as `fusemega score` writes them"
        )


def _reward(candidate: Candidate) -> float:
    return 0.0 if candidate.reward is None else candidate.reward
