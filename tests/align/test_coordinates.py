"""Canonical bytes of real tokenizers of both families against the bytes of their tokens: so one place is one prefix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fusemega.align.positions import shared_positions
from fusemega.align.vocabulary import Vocabulary
from fusemega.text.sample import Annotated
from fusemega.text.tokenizer import Tokenizer
from tests.align.real import CONTENTS, annotated, chat, real_tokenizers

ROWS = [{"text": content} for content in CONTENTS]
ROWS += [chat("x", content) for content in CONTENTS] + [chat(*CONTENTS[:6])]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, tuple[Tokenizer, Vocabulary]]:
    return real_tokenizers("llama2", "mistral_v3", "gpt2", "smollm2")


def supervised_contents(row: dict) -> list[tuple[int, bytes]]:
    """Each supervised content with the coordinate at which it begins."""
    if "text" in row:
        return [(0, row["text"].encode())]
    found, base = [], 0
    for message in row["messages"]:
        content = message["content"].encode()
        if message["role"] == "assistant":
            found.append((base + 1, content))
        base += len(content) + 2
    return found


def stretches(got: Annotated, tokenizer: Tokenizer, row: dict) -> list[range]:
    """The supervised tokens of each content, without the closing token."""
    if "text" in row:
        return [range(len(tokenizer.prefix_ids), len(got.ids) - 1)]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], got.supervised, [0]))))
    return [range(begin, end - 1) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def test_every_token_ends_where_its_bytes_say(tokenizers: dict[str, tuple[Tokenizer, Vocabulary]]) -> None:
    for (name, (tokenizer, vocabulary)), row in itertools.product(tokenizers.items(), ROWS):
        got = annotated(tokenizer, row)
        for tokens, (origin, content) in zip(stretches(got, tokenizer, row), supervised_contents(row), strict=True):
            raws = [vocabulary.contents[got.ids[t]] or b"" for t in tokens]
            # Spaces that are not in the content may stand around it.
            added = b"".join(raws).find(content)
            assert added >= 0, (name, row)
            read = -added
            for t, raw in zip(tokens, raws, strict=True):
                read += len(raw)
                assert got.end_bytes[t] == origin + min(max(read, 0), len(content)), (name, row, t)
            assert got.end_bytes[tokens.stop] == origin + len(content) + 1
            if tokens.start > 0 and b"".join(raws)[:added] in (b"", b" ") and raws[0] != b" ":
                assert got.end_bytes[tokens.start - 1] == origin, (name, row)


def test_beginnings_and_ends_are_shared_by_all(tokenizers: dict[str, tuple[Tokenizer, Vocabulary]]) -> None:
    row = chat("x", "Hello you", "今天", "🚀 go")
    everything = {name: annotated(tokenizer, row) for name, (tokenizer, _) in tokenizers.items()}
    for a, b in itertools.combinations(everything.values(), 2):
        positions = [np.flatnonzero(side.supervised[1:]) for side in (a, b)]
        ends = [side.end_bytes[at] for side, at in zip((a, b), positions, strict=True)]
        in_a, in_b = shared_positions(*ends)
        shared = set(ends[0][in_a].tolist())
        for origin, content in supervised_contents(row):
            assert {origin, origin + len(content)} <= shared
        # What closes a turn is predicted by one position on either side, the last at its byte.
        closing = [int(side.ids[np.flatnonzero(side.supervised)[-1]]) for side in (a, b)]
        assert a.ids[positions[0][in_a[-1]] + 1] == closing[0] and b.ids[positions[1][in_b[-1]] + 1] == closing[1]
