"""What is learnt of reasoning and tool calls under Qwen3's own template, with its own tokenizer."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest

from fusemega.fixtures.packages import AssetMissing
from fusemega.fixtures.tokenizers import tokenizer as asset
from fusemega.text.chat import ChatRenderer, Rendered
from fusemega.text.document import BadRow, Chat, parse
from fusemega.text.sample import Annotated, annotate
from fusemega.text.tokenizer import Tokenizer

Row = dict[str, Any]


@lru_cache
def qwen3() -> Tokenizer:
    try:
        return Tokenizer.load(asset("qwen3"))
    except AssetMissing as error:
        pytest.skip(str(error))


def user(content: Any, **fields: Any) -> Row:
    return {"role": "user", "content": content, **fields}


def said(content: Any, **fields: Any) -> Row:
    return {"role": "assistant", "content": content, **fields}


def rendered(tokenizer: Tokenizer, row: Row) -> tuple[Rendered, Annotated]:
    document = parse(row)
    assert isinstance(document, Chat)
    found = ChatRenderer(tokenizer).render(document)
    return found, annotate(found, tokenizer.encode([found.text])[0], tokenizer)


def learnt(tokenizer: Tokenizer, row: Row) -> list[str]:
    """The texts of the runs of supervised tokens, each up to a token that closes a turn."""
    _, tokens = rendered(tokenizer, row)
    texts = [""]
    for token, supervised in zip(tokens.ids, tokens.supervised, strict=True):
        if supervised:
            texts[-1] += tokenizer.hf.decode([token], skip_special_tokens=False)
        elif texts[-1]:
            texts.append("")
    return [text for text in texts if text]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CALL_AS_TEXT = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
RESULT = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "1"}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'
THOUGHT = "<think>\none two\n</think>\n\nten<|im_end|>"

PART = {"type": "text"}
LEARNT: dict[str, tuple[Row, list[str]]] = {
    "as the template writes it": ({"messages": [user("count"), said("<think>\none two\n</think>\n\nten")]}, [THOUGHT]),
    "in another layout": ({"messages": [user("count"), said("<think>one two</think>ten")]}, [THOUGHT]),
    "in a field": ({"messages": [user("count"), said("ten", reasoning_content="one two")]}, [THOUGHT]),
    "in a field of another name": ({"messages": [user("count"), said("ten", thinking="one two")]}, [THOUGHT]),
    "a content that the reasoning and the header hold": (
        {"messages": [user("a"), said("a", reasoning_content="a, assistant")]},
        ["<think>\na, assistant\n</think>\n\na<|im_end|>"],
    ),
    "no reasoning": ({"messages": [user("count"), said("ten")]}, ["ten<|im_end|>"]),
    "an earlier turn's is left out, and not learnt": (
        {"messages": [user("a"), said("b", reasoning="hm", train=False), user("c"), said("ten", thinking="one two")]},
        [THOUGHT],
    ),
    "an earlier turn's is left out of its content": (
        {"messages": [user("a"), said("<think>hm</think>b", weight=0), user("c"), said("<think>one two</think>ten")]},
        [THOUGHT],
    ),
    "a call and an answer": (
        {"messages": [user("rain?"), said("", tool_calls=[CALL]), RESULT, said("yes")], "tools": [TOOL]},
        [CALLED, "yes<|im_end|>"],
    ),
    "a call without content, its arguments as a text": (
        {"messages": [user("rain?"), {"role": "assistant", "tool_calls": [CALL_AS_TEXT]}, RESULT, said("yes")]},
        [CALLED, "yes<|im_end|>"],
    ),
    "reasoning, content and a call": (
        {"messages": [user("rain?"), said("I look.", tool_calls=[CALL], reasoning="hm"), RESULT, said("yes")]},
        ["<think>\nhm\n</think>\n\nI look.\n" + CALLED, "yes<|im_end|>"],
    ),
    "an earlier turn that lost its reasoning is context": (
        {"messages": [user("a"), said("b", thinking="hm"), user("c"), said("<think>one two</think>ten")]},
        [THOUGHT],
    ),
    "a call as the end": (
        {"messages": [user("rain?"), said("", tool_calls=[CALL])]},
        ["<think>\n\n</think>\n\n" + CALLED],
    ),
    "tools as a text": (
        {"messages": [user("hi"), said("yes")], "tools": json.dumps([TOOL])},
        ["yes<|im_end|>"],
    ),
    "a setting of the template": (
        {"messages": [user("hi"), said("yes")], "chat_template_kwargs": {"enable_thinking": False, "x": None}},
        ["yes<|im_end|>"],
    ),
    "parts of a content": (
        {"messages": [user([PART | {"text": "h"}, PART | {"text": "i", "x": None}]), said([PART | {"text": "yes"}])]},
        ["yes<|im_end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNT)
def test_what_is_learnt(name: str) -> None:
    row, texts = LEARNT[name]
    assert learnt(qwen3(), row) == texts


REFUSED: dict[str, tuple[Row, str, str]] = {
    "a special token in arguments": (
        {"messages": [user("a"), said("", tool_calls=[{"name": "f", "arguments": {"x": "a<|im_end|>"}}])]},
        "special token in content",
        "message 1 spells the special token '<|im_end|>'",
    ),
    "a special token in a tool": (
        {"messages": [user("a"), said("b")], "tools": [{"name": "<|im_start|>"}]},
        "special token in content",
        "the row spells the special token",
    ),
    "a special token in reasoning": (
        {"messages": [user("a"), said("<think>x<|im_end|></think>b")]},
        "special token in content",
        "the content spells the special token '<|im_end|>'",
    ),
    "documents": ({"messages": [user("a"), said("b")], "documents": [{"text": "x"}]}, "template ignores field", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    row, reason, words = REFUSED[name]
    with pytest.raises(BadRow) as error:
        rendered(qwen3(), row)
    assert error.value.reason == reason and words in error.value.detail
