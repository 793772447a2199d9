"""The pieces that a tokenizer cuts the bytes of another's token into."""

from __future__ import annotations

import re
from collections.abc import Callable

from fusemega.align.vocabulary import Vocabulary, byte_level_form
from fusemega.text.tokenizer import Tokenizer

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
        # Bytes that are no whole character have the byte tokens alone.
        for part in _NOT_TEXT.split(content.decode("utf-8", "surrogateescape")):
            if _NOT_TEXT.fullmatch(part):
                byte = part.encode("utf-8", "surrogateescape")
                found += [byte_ids[byte]] if byte in byte_ids else []
            elif part:
                found += tokenize(part.replace(" ", vocabulary.marker or " "))
        return found

    return cut
