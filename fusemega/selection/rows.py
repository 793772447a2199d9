"""The rows of the sets, in the shapes that `data` of a run file reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusemega.selection.groups import PromptRow
from fusemega.selection.protocol import Candidate
from fusemega.selection.texts import Texts

_NAMES = ("id", "domain", "dataset")  # names that data readers know


def completion_row(prompt: PromptRow, chosen: Sequence[Candidate], texts: Texts) -> dict[str, Any]:
    """`prompt` and `completion`: the response alone is trained on, also after a prompt of several turns."""
    (one,) = chosen
    return {
        "prompt": prompt.messages,
        "completion": _turn(texts[one.text]),
        **_names(prompt),
        **({"source": one.source} if one.source else {}),
        **({"score": one.reward} if one.reward is not None else {}),
    }


def pair_row(prompt: PromptRow, pair: Sequence[Candidate], texts: Texts) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` with their rewards."""
    chosen, rejected = pair
    sources = list(dict.fromkeys(one.source for one in pair if one.source))
    return {
        "prompt": prompt.messages,
        "chosen": _turn(texts[chosen.text]),
        "rejected": _turn(texts[rejected.text]),
        "score_chosen": chosen.reward,
        "score_rejected": rejected.reward,
        **_names(prompt),
        **({"source": sources[0]} if len(sources) == 1 else {}),
    }


def group_row(prompt: PromptRow, responses: Sequence[Candidate], texts: Texts) -> dict[str, Any]:
    """`prompt` and `responses` with source and reward."""
    return {
        "prompt": prompt.messages,
        "responses": [
            {"text": texts[one.text], **({"source": one.source} if one.source else {}), "reward": one.reward}
            for one in responses
        ],
        **_names(prompt),
    }


def prompt_row(prompt: PromptRow) -> dict[str, Any]:
    """A row of prompts, as `fusemega sample` and `collect` read them."""
    return {"prompt": prompt.messages, **prompt.about}


def _turn(text: str) -> list[Mapping[str, str]]:
    return [{"role": "assistant", "content": text}]


def _names(prompt: PromptRow) -> dict[str, str]:
    return {name: prompt.about[name] for name in _NAMES if name in prompt.about}
