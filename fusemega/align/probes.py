"""Short texts on which two tokenizers are compared beforehand, and the pairs of tokens with which both go on.

How a tokenizer begins a text depends on what follows, which no token shows by itself. GPT-2 writes two line breaks
before a digit as two tokens and SmolLM2 as one, though both have a token for them; of "flower" one takes "f" first and
another "fl". So both tokenizers write runs of white space and of punctuation, tokens that end in white space before
several followers, and the words of both vocabularies without the space that they stand with.

Shape suffixes: E pairs of tokens.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import numpy as np

from fusemega.align.pieces import spaced
from fusemega.align.vocabulary import Vocabulary
from fusemega.text.tokenizer import Encoding, Tokenizer

_FOLLOWERS = ("a", " a", "1", "-")
_LONGEST = 64  # characters of a run; the tokenizers known have tokens of up to 32 spaces, or powers of two
_LONGEST_INDENT = 32


def probe_texts(vocabularies: Iterable[Vocabulary]) -> list[str]:
    """The texts, each once, in a fixed order. Each begins with a character that is no part of the comparison."""
    runs = [" " * n for n in range(1, _LONGEST + 1)]
    for breaks in ("\n", "\n\n", "\r\n"):
        runs += [breaks + space * n for space in " \t" for n in range(_LONGEST_INDENT + 1)]
    runs += ["\t" * n for n in range(1, _LONGEST_INDENT + 1)]
    texts = [f"a{run}{follower}" for run in runs for follower in _FOLLOWERS]
    for mark in string.punctuation:
        texts += [
            f"a{space}{mark * n}{end}" for space in ("", " ") for n in range(1, _LONGEST + 1) for end in ("", " a")
        ]
        texts += [f"a{first}{mark * n}{end}" for first in string.punctuation for n in (1, 2) for end in (" a", "\n")]
    contents = {content for vocabulary in vocabularies for content in vocabulary.contents if content}
    for content in sorted(contents):
        if text := spaced(content):
            texts += [f"a{text}{follower}" for follower in _FOLLOWERS]
        elif content[:1] == b" " and content[1:].isalpha():  # of bytes: ASCII letters
            texts.append("(" + content[1:].decode())
    return list(dict.fromkeys(texts))


def next_tokens(source: Tokenizer, target: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Two int64 [E]: ids of the source and the target that begin at one character of a text, but for the first."""
    pairs: set[tuple[int, int]] = set()
    for theirs, ours in zip(source.encode(texts), target.encode(texts), strict=True):
        begun, other = _begun(theirs), _begun(ours)
        pairs.update((begun[at], other[at]) for at in begun.keys() & other.keys() if at > 0)
    source_E, target_E = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
    return source_E, target_E


def _begun(encoding: Encoding) -> dict[int, int]:
    """Character -> the first token that begins at it and has some of the text."""
    has_text = encoding.ends > encoding.starts
    starts, ids = encoding.starts[has_text].tolist(), encoding.ids[has_text].tolist()
    return dict(zip(reversed(starts), reversed(ids), strict=True))
