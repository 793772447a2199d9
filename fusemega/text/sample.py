"""One tokenization and its spans become samples: windows of tokens with targets, byte coordinates and a key.

Canonical stream, the coordinates that all tokenizers and templates share. Of a conversation, for each message:
[1 virtual header byte][UTF-8 bytes of the content][1 virtual end-of-turn byte]. The last template token before the
content of the message that begins at `base` ends at base + 1, a content token at base + 1 + its last content byte
(exclusive), the closing token at base + 1 + len + 1. A text is one message without header byte: its prefix (bos)
ends at 0, its tokens at their byte, its eos at len + 1. Other template tokens end nowhere: -1.

Shapes: L tokens of a window, P supervised tokens among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusemega.text.chat import Rendered
from fusemega.text.document import BadRow
from fusemega.text.tokenizer import Encoding, Tokenizer


@dataclass(frozen=True)
class Sample:
    """One window of one conversation or text, tokenized once.

    Attributes:
        key: 16 bytes, blake2b of the canonical document and the window's byte range in the canonical stream; free of
            tokenizer and template (a document that fits in one window has the range (0, whole stream)).
        ids: int32 [L].
        supervised: bool [L]: token i is a target, predicted at position i - 1; [0] is always False.
        end_bytes: int32 [L]: where token i ends in the canonical stream, -1 where at no comparable place.
        num_bytes: UTF-8 bytes of content in the supervised tokens (closing tokens count 0).
        source: "file:row", for messages.
    """

    key: bytes
    ids: np.ndarray
    supervised: np.ndarray
    end_bytes: np.ndarray
    num_bytes: int
    source: str

    @property
    def positions(self) -> np.ndarray:
        """int64 [P]: the positions that predict a supervised token, ascending."""
        return np.flatnonzero(self.supervised[1:])

    @property
    def ids_hash(self) -> bytes:
        """8 bytes, blake2b of `ids` as little-endian int32: tells whether two tokenizations are the same."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids, dtype="<i4").tobytes(), digest_size=8).digest()


@dataclass(frozen=True)
class Annotated:
    """A whole document's tokens, before windows are cut.

    Attributes:
        ids: int32 [L].
        supervised: bool [L].
        end_bytes: int32 [L], as in `Sample`.
        target_bytes: int64 [L]: bytes of supervised content that the token adds.
        stream_length: bytes of the canonical stream.
    """

    ids: np.ndarray
    supervised: np.ndarray
    end_bytes: np.ndarray
    target_bytes: np.ndarray
    stream_length: int


def annotate(rendered: Rendered, encoding: Encoding, tokenizer: Tokenizer) -> Annotated:
    """Which tokens are targets, and where each ends in the canonical stream.

    A token that straddles the border of a supervised range is a target iff it ends inside the range.

    Raises:
        BadRow: a content spells a special token, which the tokenizer would read as that token.
    """
    _refuse_special_tokens(rendered, encoding, tokenizer)
    ids, ends = encoding.ids, encoding.ends
    char_bytes = _char_bytes(rendered.text)
    byte_ends = _byte_ends(encoding, char_bytes, tokenizer)
    supervised = np.zeros(len(ids), dtype=bool)
    end_bytes = np.full(len(ids), -1, dtype=np.int32)
    target_chars = np.zeros(len(rendered.text) + 1, dtype=np.int64)  # [i + 1]: bytes of character i if it is a target
    for span in rendered.spans:
        origin = span.base + int(span.has_header)
        first = char_bytes[span.start]
        inside = (byte_ends > first) & (byte_ends <= char_bytes[span.end])
        end_bytes[inside] = origin + span.stripped_bytes + byte_ends[inside] - first
        if span.has_header:
            _mark_last(end_bytes, ends == span.start, origin)
        if span.closing_end > span.end:
            _mark_last(end_bytes, ends == span.closing_end, origin + span.num_bytes + 1)
        if span.supervised is not None:
            low, high = span.supervised
            supervised |= (ends > low) & (ends <= high)
            target_chars[low + 1 : span.end + 1] = np.diff(char_bytes[low : span.end + 1])
    reached = np.maximum.accumulate(np.concatenate(([0], ends)))
    target_bytes = np.diff(np.cumsum(target_chars)[reached])
    if rendered.framed:
        prefix = len(tokenizer.prefix_ids)
        ids = np.concatenate([tokenizer.prefix_ids, ids, [tokenizer.eos_id]]).astype(np.int32)
        supervised = np.concatenate([np.zeros(prefix, dtype=bool), supervised, [True]])
        before = np.full(prefix, -1)
        before[-1:] = 0
        end_bytes = np.concatenate([before, end_bytes, [rendered.stream_length]]).astype(np.int32)
        target_bytes = np.concatenate([np.zeros(prefix, dtype=np.int64), target_bytes, [0]])
    supervised[:1] = False
    return Annotated(ids, supervised, end_bytes, target_bytes, rendered.stream_length)


def cut(document: Annotated, canonical: bytes, seq_length: int, source: str) -> Iterator[Sample]:
    """Consecutive windows of at most `seq_length` tokens.

    A window begins with the last token of the one before, as context: so each target of the document is a target
    of exactly one window. Windows without a target are yielded too, for the caller to count.
    """
    length = len(document.ids)
    reached = np.maximum.accumulate(np.maximum(document.end_bytes, 0))
    for begin in range(0, max(length - 1, 1), seq_length - 1):
        end = min(begin + seq_length, length)
        low = 0 if begin == 0 else int(reached[begin])
        high = document.stream_length if end == length else int(reached[end - 1])
        supervised = document.supervised[begin:end].copy()
        supervised[:1] = False
        yield Sample(
            key=sample_key(canonical, low, high),
            ids=document.ids[begin:end],
            supervised=supervised,
            end_bytes=document.end_bytes[begin:end],
            num_bytes=int(document.target_bytes[begin:end][supervised].sum()),
            source=source,
        )


def sample_key(canonical: bytes, low: int, high: int) -> bytes:
    """16 bytes naming the bytes [low, high) of the canonical stream of the document `canonical`."""
    return hashlib.blake2b(canonical + b"\n%d:%d" % (low, high), digest_size=16).digest()


def _mark_last(end_bytes: np.ndarray, hits: np.ndarray, coordinate: int) -> None:
    """Gives the last token of `hits` a coordinate, unless a content already gave it one."""
    where = np.flatnonzero(hits)
    if len(where) and end_bytes[where[-1]] < 0:
        end_bytes[where[-1]] = coordinate


def _char_bytes(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: UTF-8 bytes before each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def _byte_ends(encoding: Encoding, char_bytes: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [L]: the byte of the rendered text at which each token ends, -1 where that cannot be told.

    A token whose last character is also the next token's ends inside that character; its byte is then counted from
    the last token that ends at a whole character, where the vocabulary tells how many bytes a token has.
    """
    ends, starts = encoding.ends, encoding.starts
    byte_ends = char_bytes[ends]
    within = np.flatnonzero(np.append(starts[1:] < ends[:-1], False)) if len(ends) else np.empty(0, dtype=np.int64)
    if len(within) == 0:
        return byte_ends
    widths = tokenizer.token_num_bytes[encoding.ids].astype(np.int64)
    is_within = np.zeros(len(ends), dtype=bool)
    is_within[within] = True
    anchor = np.maximum.accumulate(np.where(is_within, -1, np.arange(len(ends))))[within]
    counted = np.concatenate(([0], np.cumsum(widths)))
    unknown = np.concatenate(([0], np.cumsum(widths == 0)))
    origin = np.where(anchor >= 0, byte_ends[anchor], 0)
    exact = origin + counted[within + 1] - counted[anchor + 1]
    known = unknown[within + 1] == unknown[anchor + 1]
    fits = (exact > char_bytes[ends[within] - 1]) & (exact < char_bytes[ends[within]])
    byte_ends[within] = np.where(known & fits, exact, -1)
    return byte_ends


def _refuse_special_tokens(rendered: Rendered, encoding: Encoding, tokenizer: Tokenizer) -> None:
    for i in np.flatnonzero(np.isin(encoding.ids, tokenizer.special_ids)):
        token = tokenizer.token(encoding.ids[i])
        # Where the token's own text begins: it may have absorbed white space around it. An unknown token, which
        # stands for other text than its own, is no concern here (-1).
        start = rendered.text.find(token, int(encoding.starts[i]), int(encoding.ends[i]))
        if any(span.start <= start < span.end for span in rendered.spans):
            raise BadRow(
                "special token in content",
                f"the content spells the special token {token!r} (character {start} of the rendered text), "
                "which would be read as that token",
            )
