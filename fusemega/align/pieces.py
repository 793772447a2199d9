"""The pieces into which a tokenizer cuts the bytes of another's token: of the token alone, and before more text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from fusemega.align.vocabulary import Vocabulary, byte_level_form
from fusemega.text.tokenizer import Encoding, Tokenizer

_NOT_TEXT = re.compile("([\udc80-\udcff])")


def cutter(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Callable[[bytes], list[int]]:
    """A function that cuts bytes in the middle of a text into the tokenizer's ids, unknown pieces left out.

    It asks the tokenizer's model alone: a new token may begin or end inside a word, where neither a word marker nor
    a border belongs.
    """
    model = tokenizer.hf.backend_tokenizer.model
    byte_ids = {vocabulary.contents[i]: i for i in vocabulary.byte_tokens}

    def tokenize(form: str) -> list[int]:
        return [piece.id for piece in model.tokenize(form) if piece.id != vocabulary.unk_id]

    def cut(content: bytes) -> list[int]:
        if vocabulary.marker == "Ġ":
            return tokenize(byte_level_form(content))
        found: list[int] = []
        # Bytes that are not a complete character are only in byte tokens.
        for part in _NOT_TEXT.split(content.decode("utf-8", "surrogateescape")):
            if _NOT_TEXT.fullmatch(part):
                byte = part.encode("utf-8", "surrogateescape")
                found += [byte_ids[byte]] if byte in byte_ids else []
            elif part:
                found += tokenize(part.replace(" ", vocabulary.marker or " "))
        return found

    return cut


def before_text(source: Tokenizer, target: Tokenizer, contents: Sequence[bytes | None]) -> dict[int, int]:
    """Source id -> the target's first piece, for tokens that end in white space, if text follows them.

    Pre-tokenizers look ahead there. GPT-2's gives the last of several white-space characters to what follows, so
    "a  \\nb" is "a", "  ", "\\n", "b", although "  \\n" may be a token. Each token is put between two letters, the
    second one with a space or without, where the source's own tokenizer makes it of that text; what begins there in
    the target's cutting of the same text is the piece. A token that stands so in neither text is left out, and one at
    whose place the target's token is longer.

    Args:
        contents: contents of the source's vocabulary.
    """
    asked = {u: text for u, content in enumerate(contents) if (text := spaced(content))}
    found: dict[int, int] = {}
    for follower in ("a", " a"):
        waiting = [u for u in asked if u not in found]
        texts = [f"a{asked[u]}{follower}" for u in waiting]
        for u, theirs, ours in zip(waiting, source.encode(texts), target.encode(texts), strict=True):
            end = 1 + len(asked[u])
            own, piece = _at(theirs, 1), _at(ours, 1)
            if own is None or piece is None or int(theirs.ids[own]) != u or theirs.ends[own] != end:
                continue
            if ours.ends[piece] <= end:
                found[u] = int(ours.ids[piece])
    return found


def spaced(content: bytes | None) -> str:
    """A token's text where it is several characters and the last one is white space, else nothing."""
    try:
        text = (content or b"").decode()
    except UnicodeDecodeError:
        return ""
    return text if len(text) > 1 and text[-1].isspace() else ""


def _at(encoding: Encoding, character: int) -> int | None:
    """The first token that begins at a character and has some of the text."""
    places = np.flatnonzero((encoding.starts == character) & (encoding.ends > character))
    return int(places[0]) if len(places) else None
