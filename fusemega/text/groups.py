"""A row with several responses to one prompt: a pair, or a list of responses with what the row says of each.

    prompt, chosen, rejected     also: score_chosen and score_rejected (or rewards, chosen's first), margin, weight
    chosen, rejected             two texts, or two conversations: what they share at their beginning is the prompt
    prompt, responses            also: rewards (or scores), one number a response; weight
    a response                   a string, a list of messages, or an object with text or messages, and source, reward
                                 (or score) and weight

What `fusemega sample` and its followers say of a prompt (answer, tests, entry_point) and of a response (sample, tokens,
correct) may stand there too; nothing is learnt from it.

A beginning that conversations share ends before the first message that differs, which must be the assistant's. The one
of texts ends, as in TRL, before the first character that differs, and before the space in front of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusemega.text.conversation import (
    Document,
    NotLearnt,
    Text,
    as_chat,
    check_prompt,
    parse_messages,
    with_system,
)
from fusemega.text.fields import CALLS, FLAGS, BadRow, check_extras, is_absent, kind, string

SCALARS = ("chosen", "reward", "margin", "weight", "source")
"""Numbers that a response of a group may have: 1 for a pair's chosen and 0 for its rejected one; its reward; the margin
of its pair; its weight; the place of the name of its source in `TokenizedDataset.sources`."""
_REWARDS = ("reward", "score")
_OF_GROUP = ("prompt", "responses", "rewards", "scores", "weight")
_OF_PROMPT, _OF_RESPONSE = ("answer", "tests", "entry_point"), ("sample", "tokens", "correct", "verdict")


@dataclass(frozen=True)
class Group:
    """One prompt and several responses to it: each a document of its own, of which the response alone is supervised.

    Attributes:
        documents: in the order of the row; chosen before rejected.
        scalars: numbers of each document, by name; the names are in `SCALARS`.
        sources: the name of each document's source, or None.
    """

    documents: tuple[Document, ...]
    scalars: tuple[Mapping[str, float], ...]
    sources: tuple[str | None, ...]


def parse_group(row: Mapping[str, Any], ignored: Counter[str] | None) -> tuple[Group, tuple[str, ...]]:
    """The pair or group of a row, and the row's keys that say so.

    Args:
        row: without nulls.
        ignored: as `document.parse_row`.

    Raises:
        NotLearnt: the row's weight is 0.
        BadRow: see the module; equal or empty responses; numbers that are missing, infinite or of another type.
    """
    weight = _row_weight(row)
    if "responses" in row:
        return _several(row, weight, ignored), (*_OF_GROUP, *_OF_PROMPT)
    return _pair(row, weight, ignored)


def answered(
    row: Mapping[str, Any],
    prompt: Any,
    responses: Mapping[str, Any],
    ignored: Counter[str] | None,
    first: int = 0,
    *,
    blank: bool = False,
) -> list[Document]:
    """The prompt with each of the responses (by their names in the row), which alone are supervised.

    Args:
        row: what else the template is given.
        first: how many messages of the prompt precede the response's in the row's list.
        blank: whether a response may be white space: some code goes on with a line break, but no answer is one.
    """
    for key, response in responses.items():
        if isinstance(prompt, str) != isinstance(response, str):
            raise BadRow("wrong type", f"prompt and {key} must both be strings or both be lists of messages")
    if isinstance(prompt, str):
        string(prompt, "prompt")
        for key, response in responses.items():
            text = string(response, key)
            if not (text if blank else text.strip()):
                raise BadRow("empty", f"{key} is empty")
        return [Text(prompt + response, len(prompt)) for response in responses.values()]
    before = parse_messages(prompt, "prompt", False, ignored)
    after = {key: parse_messages(response, key, True, ignored, first) for key, response in responses.items()}
    for key, messages in after.items():
        learnt = [message for message in messages if message.supervised]
        if (
            not blank
            and learnt
            and not any(m.content.strip() or m.reasoning or m.fields.keys() & set(CALLS) for m in learnt)
        ):
            raise BadRow("empty", f"{key} is empty")
    return [as_chat(with_system(before + after[key], row), responses[key], row) for key in responses]


def _pair(
    row: Mapping[str, Any], weight: Mapping[str, float], ignored: Counter[str] | None
) -> tuple[Group, tuple[str, ...]]:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow("unknown shape", f"the row has no {key}; expected both chosen and rejected")
    if "messages" in row and row["messages"] != row["chosen"]:
        raise BadRow("unsupported field", "the row has messages beside chosen and rejected, which are not chosen's")
    prompt, chosen, rejected, first = _split(row)
    documents = answered(row, prompt, {"chosen": chosen, "rejected": rejected}, ignored, first)
    if documents[0] == documents[1]:
        raise BadRow("no preference", "chosen and rejected are the same")
    common = dict(weight)
    if "margin" in row:
        common["margin"] = _number(row["margin"], "margin")
    names = ("score_chosen", "score_rejected")
    scores = {name: _number(row[name], name) for name in names if name in row}
    if len(scores) == 1:
        raise BadRow("number missing", f"the row has {min(scores)} alone; allowed: {' and '.join(names)}, or neither")
    rewards = _rewards(row, 2)
    if rewards and scores:
        raise BadRow("unsupported field", f"the row has rewards and {names[0]}; allowed: one of them")
    rewards = rewards or list(scores.values())
    scalars = tuple(
        {"chosen": preferred, **({"reward": rewards[i]} if rewards else {}), **common}
        for i, preferred in enumerate((1.0, 0.0))
    )
    keys = ("prompt", "chosen", "rejected", "margin", "weight", "rewards", "scores", *names)
    return Group(tuple(documents), scalars, (None, None)), (*keys, *(("messages",) if "messages" in row else ()))


def _split(row: Mapping[str, Any]) -> tuple[Any, Any, Any, int]:
    """The prompt and the two responses of a pair, and how much of the prompt was a part of the responses."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if chosen == rejected:
        raise BadRow("no preference", "chosen and rejected are the same")
    both = chosen, rejected
    texts = all(isinstance(each, str) for each in both)
    lists = all(isinstance(each, (list, tuple)) for each in both)
    shared = 0
    if texts or lists:
        pairs = enumerate(zip(chosen, rejected, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if texts and shared and chosen[shared - 1] == " ":
        shared -= 1
    if prompt is None:
        if not (texts or lists):
            raise BadRow("wrong type", "chosen and rejected must both be strings or both be lists of messages")
        if not shared:
            raise BadRow("no prompt", "the row has no prompt, and chosen and rejected begin differently")
    # Beside a prompt, whole conversations repeat it (UltraFeedback's prompt is the question alone).
    elif not (lists and shared and (isinstance(prompt, str) or _begin_with(prompt, both))):
        return prompt, chosen, rejected, 0
    for key, each in zip(("chosen", "rejected"), both, strict=True):
        if len(each) == shared:
            raise BadRow("empty", f"{key} is empty after the beginning that chosen and rejected share")
        if not texts and isinstance(each[shared], Mapping) and each[shared].get("role") != "assistant":
            raise BadRow(
                "prompts differ",
                f"{key}[{shared}] is of role {str(each[shared].get('role'))[:40]}, where chosen and rejected begin to "
                "differ; allowed: assistant, after the same prompt",
            )
    if isinstance(prompt, str):
        check_prompt(prompt, parse_messages(chosen[:shared], "chosen", True, Counter()), "chosen")
    return chosen[:shared], chosen[shared:], rejected[shared:], shared


def _begin_with(prompt: Any, conversations: Sequence[Sequence[Any]]) -> bool:
    """Whether whole conversations were given beside their prompt."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return all(list(each[: len(prompt)]) == list(prompt) for each in conversations)


def _several(row: Mapping[str, Any], weight: Mapping[str, float], ignored: Counter[str] | None) -> Group:
    responses = row["responses"]
    if "prompt" not in row:
        raise BadRow("unknown shape", "the row has responses and no prompt; expected prompt with responses")
    if not isinstance(responses, (list, tuple)):
        raise BadRow("wrong type", f"responses is a list of responses, found {kind(responses)}")
    if not responses:  # one alone can be scored, and trained on by FuseSFT; what compares several refuses it itself
        raise BadRow("empty", "responses is empty; a group has one or more")
    given: dict[str, Any] = {}
    numbers: list[dict[str, float]] = []
    sources: list[str | None] = []
    for i, response in enumerate(responses):
        key, source = f"responses[{i}]", None
        said: dict[str, float] = {}
        if isinstance(response, Mapping):
            key, response, said, source = _object(response, key, row, ignored)
        given[key] = response
        numbers.append(said)
        sources.append(source)
    for name in ("reward", "weight"):
        has = [name in said for said in numbers]
        if any(has) and not all(has):
            raise BadRow("number missing", f"responses[{has.index(False)}] has no {name}, and others have one")
    if "weight" in numbers[0]:
        if weight:
            raise BadRow("unsupported field", "the row and its responses have a weight; allowed: one of them")
        if not any(said["weight"] for said in numbers):
            raise BadRow("no weight", "the weights of the responses are all 0")
    rewards = _rewards(row, len(responses))
    if rewards and "reward" in numbers[0]:
        raise BadRow("unsupported field", "the row and its responses have rewards; allowed: one of them")
    scalars = [{**said, **({"reward": rewards[i]} if rewards else {}), **weight} for i, said in enumerate(numbers)]
    return Group(tuple(answered(row, row["prompt"], given, ignored)), tuple(scalars), tuple(sources))


def _object(
    response: Mapping[str, Any], key: str, row: Mapping[str, Any], ignored: Counter[str] | None
) -> tuple[str, Any, dict[str, float], str | None]:
    """A response that is an object: its content's key and content, its numbers, and the name of its source."""
    present = {str(name): value for name, value in response.items() if value is not None}
    check_extras(present, ("text", "messages", "source", *_REWARDS, *_OF_RESPONSE), key, ignored)
    if flags := [name for name in present if name in FLAGS and name != "weight"]:
        raise BadRow("unsupported flag", f"{key} has {flags[0]}; allowed for a response: weight")
    found = [name for name in ("text", "messages") if name in present]
    if len(found) != 1:
        raise BadRow("wrong type", f"{key} has {' and '.join(found) or 'neither'}; allowed: one of text and messages")
    content = present[found[0]]
    if found == ["text"]:
        string(content, f"{key}.text")
        if not isinstance(row["prompt"], str):
            content = [{"role": "assistant", "content": content}]
    said: dict[str, float] = {}
    rewards = [name for name in _REWARDS if name in present]
    if len(rewards) > 1:
        raise BadRow("unsupported field", f"{key} has reward and score; allowed: one of them")
    if rewards:
        said["reward"] = _number(present[rewards[0]], f"{key}.{rewards[0]}")
    if "weight" in present:
        said["weight"] = _weight(present["weight"], f"{key}.weight")
    source = present.get("source")
    if source is not None and not string(source, f"{key}.source"):
        raise BadRow("empty", f"{key}.source is empty")
    return f"{key}.{found[0]}", content, said, source


def _row_weight(row: Mapping[str, Any]) -> dict[str, float]:
    """{"weight": ...} of the whole row, or nothing."""
    if "weight" not in row:
        return {}
    weight = row["weight"]
    if (weight := float(weight) if isinstance(weight, bool) else _weight(weight, "weight")) == 0:
        raise NotLearnt
    return {"weight": weight}


def _rewards(row: Mapping[str, Any], count: int) -> list[float]:
    given = [key for key in ("rewards", "scores") if not is_absent(row.get(key))]
    if not given:
        return []
    if len(given) > 1:
        raise BadRow("unsupported field", "the row has rewards and scores; allowed: one of them")
    key, values = given[0], row[given[0]]
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = f"{len(values)} of them" if isinstance(values, (list, tuple)) else kind(values)
        raise BadRow("wrong type", f"{key} is a list of {count} numbers, one per response; found {found}")
    return [_number(value, f"{key}[{i}]") for i, value in enumerate(values)]


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise BadRow("wrong type", f"{key} is a finite number, found {str(value)[:40]!r}")
    return float(value)


def _weight(value: object, key: str) -> float:
    if (weight := _number(value, key)) < 0:
        raise BadRow("wrong type", f"{key} is a number of at least 0, found {str(value)[:40]!r}")
    return weight


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
