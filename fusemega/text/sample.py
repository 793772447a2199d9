"""Turns one tokenization and its spans into samples: windows of tokens with targets, byte offsets and a key.

The canonical stream has byte offsets that do not depend on tokenizer or template. For each message of a conversation it
is [1 virtual header byte][UTF-8 bytes of the content][1 virtual end-of-turn byte]. For a message that begins at `base`,
the last template token before the content ends at base + 1, a content token at base + 1 + the end of its last content
byte, the closing token at base + 1 + len + 1. A text is one message without header byte: its prefix (bos) ends at 0,
its tokens at their byte, its eos at len + 1. Other template tokens have no end byte: -1.

A position must predict what follows its end byte, whatever template and tokenizer write in between. So
* if the template's space before a content is merged into the content's first token ("[/INST]", "▁Hello"), the token
  before that one ends at base + 1;
* a space that is not in the text (SentencePiece's, before "你") ends where the text begins;
* the template's white space before the closing token (" </s>") ends where the content ends: of several positions with
  one end byte the last is used;
* if the closing is several tokens, the content's last token has no end byte, because its next token is only a part of
  the marker.

Shape suffixes: L tokens of a window, P supervised tokens among them; W tokens at one message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fusemega.text.chat import Rendered
from fusemega.text.document import BadRow
from fusemega.text.tokenizer import SPACES, Encoding, Tokenizer

OF_TEXT, BEGINS = 1, 2  # bits of `Sample.places`


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
        group: number of the group of samples that it belongs to; None for none.
        scalars: its numbers, by name (`document.SCALARS`).
        places: uint8 [L], bits of each token: `OF_TEXT`: it is of a plain text, not of a conversation; `BEGINS`: a
            content begins right after it. None: all bits are 0.
    """

    key: bytes
    ids: np.ndarray
    supervised: np.ndarray
    end_bytes: np.ndarray
    num_bytes: int
    source: str
    places: np.ndarray | None = None
    group: int | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)

    def is_place(self, place: int) -> np.ndarray:
        """bool [L]: whether each token has the bit `place`, `OF_TEXT` or `BEGINS`."""
        return np.zeros(len(self.ids), dtype=bool) if self.places is None else (self.places & place) > 0

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
        places: uint8 [L], as in `Sample`.
    """

    ids: np.ndarray
    supervised: np.ndarray
    end_bytes: np.ndarray
    target_bytes: np.ndarray
    stream_length: int
    places: np.ndarray

    @cached_property
    def reached(self) -> np.ndarray:
        """int32 [L]: the byte of the canonical stream that is reached with each token."""
        return np.maximum.accumulate(np.maximum(self.end_bytes, 0))


def annotate(rendered: Rendered, encoding: Encoding, tokenizer: Tokenizer) -> Annotated:
    """Which tokens are targets, and where each ends in the canonical stream.

    A token that straddles the border of a supervised range is a target iff it ends inside the range.

    Raises:
        BadRow: a content spells a special token, which the tokenizer would read as that token, or holds a character
            that the tokenizer has no token for.
    """
    _refuse_special_tokens(rendered, encoding, tokenizer)
    ids, ends = encoding.ids, encoding.ends
    char_bytes = _char_bytes(rendered.text)
    byte_ends = _byte_ends(encoding, char_bytes, tokenizer)
    supervised = np.zeros(len(ids), dtype=bool)
    end_bytes = np.full(len(ids), -1, dtype=np.int32)
    target_chars = np.zeros(len(rendered.text) + 1, dtype=np.int64)  # [i + 1]: bytes of character i if it is a target
    reached = np.maximum.accumulate(ends)
    for span in rendered.spans:
        # The message's tokens, with the one before it: views.
        window = slice(*np.searchsorted(reached, (span.start - 1, span.closing_end + 1)))
        ends_W, byte_ends_W, end_bytes_W = ends[window], byte_ends[window], end_bytes[window]
        if not span.is_spelt:
            continue
        origin = span.base + int(span.has_header) + span.offset
        begin = origin + span.stripped_bytes if span.offset else origin
        first, last = char_bytes[span.start], char_bytes[span.end]
        inside = (byte_ends_W > first) & (byte_ends_W <= last)
        end_bytes_W[inside] = origin + span.stripped_bytes + byte_ends_W[inside] - first
        if span.is_open:
            end_bytes_W[inside & (byte_ends_W == last)] = -1
        # Where a content begins: after the token that ends there, or before a space that its first token absorbed.
        if not _mark_last(end_bytes_W, byte_ends_W == first, begin) and rendered.text.endswith(" ", 0, span.start):
            _mark_last(end_bytes_W, byte_ends_W == first - 1, begin)
        if span.closing_end > span.end:
            closing = rendered.text[span.end : span.closing_end]
            token_start = span.closing_end - len(closing.lstrip())
            # The template's white space before the closing token ends where the content does.
            content_end = origin + span.stripped_bytes + last - first
            end_bytes_W[(ends_W > span.end) & (ends_W <= token_start)] = content_end
            # A closing of several tokens: the content's last token would predict only a part of it.
            if ((ends_W > token_start) & (ends_W < span.closing_end)).any():
                end_bytes_W[end_bytes_W == content_end] = -1
            _mark_last(end_bytes_W, ends_W == span.closing_end, origin - span.offset + span.num_bytes + 1)
        if span.supervised is not None:
            low, high = span.supervised
            supervised[window] |= (ends_W > low) & (ends_W <= high)
            target_chars[low + 1 : span.end + 1] = np.diff(char_bytes[low : span.end + 1])
    for turn in rendered.turns:
        window = slice(*np.searchsorted(reached, (turn.start, turn.end + 1)))
        supervised[window] |= (ends[window] > turn.start) & (ends[window] <= turn.end)
        if turn.closing is not None:
            _mark_last(end_bytes[window], ends[window] == turn.end, turn.closing)
        for low, high in turn.texts:
            target_chars[low + 1 : high + 1] = np.diff(char_bytes[low : high + 1])
    target_bytes = np.diff(np.cumsum(target_chars)[np.append(0, reached)])
    if rendered.framed:
        prefix = len(tokenizer.prefix_ids)
        ids = np.concatenate([tokenizer.prefix_ids, ids, [tokenizer.eos_id]]).astype(np.int32)
        supervised = np.concatenate([np.zeros(prefix, dtype=bool), supervised, [True]])
        before = np.full(prefix, -1)
        before[-1:] = 0  # the prefix ends where the text begins
        end_bytes = np.concatenate([before, end_bytes, [rendered.stream_length]]).astype(np.int32)
        target_bytes = np.concatenate([np.zeros(prefix, dtype=np.int64), target_bytes, [0]])
    supervised[:1] = False
    # No content, closing token or other message has the coordinate at which a content begins.
    begins = np.isin(end_bytes, [span.base + int(span.has_header) for span in rendered.spans])
    places = (begins * BEGINS + int(rendered.framed) * OF_TEXT).astype(np.uint8)
    return Annotated(ids, supervised, end_bytes, target_bytes, rendered.stream_length, places)


def cut(document: Annotated, canonical: bytes, seq_length: int, source: str) -> Iterator[Sample]:
    """Consecutive windows of at most `seq_length` tokens.

    A window begins with the last token of the one before, as context: so each target of the document is a target
    of exactly one window. Windows without a target are yielded too, for the caller to count.
    """
    length = len(document.ids)
    for begin in range(0, max(length - 1, 1), seq_length - 1):
        yield part(document, canonical, begin, min(begin + seq_length, length), source)


def part(document: Annotated, canonical: bytes, begin: int, end: int, source: str) -> Sample:
    """The window of the tokens [begin, end) of a document; the first of them is context."""
    low = 0 if begin == 0 else int(document.reached[begin])
    high = document.stream_length if end == len(document.ids) else int(document.reached[end - 1])
    supervised = document.supervised[begin:end].copy()
    supervised[:1] = False
    # Long tool calls have no bytes in the canonical stream, so their windows are distinguished by number.
    identity = canonical if low < high else canonical + b"\n%d" % begin
    return Sample(
        key=sample_key(identity, low, high),
        ids=document.ids[begin:end],
        supervised=supervised,
        end_bytes=document.end_bytes[begin:end],
        num_bytes=int(document.target_bytes[begin:end][supervised].sum()),
        source=source,
        places=document.places[begin:end],
    )


def sample_key(canonical: bytes, low: int, high: int) -> bytes:
    """16 bytes naming the bytes [low, high) of the canonical stream of the document `canonical`."""
    return hashlib.blake2b(canonical + b"\n%d:%d" % (low, high), digest_size=16).digest()


def _mark_last(end_bytes: np.ndarray, hits: np.ndarray, coordinate: int) -> bool:
    """Gives the last token of `hits` a coordinate, unless it has one from a content. Returns whether there is a hit."""
    where = np.flatnonzero(hits)
    if len(where) and end_bytes[where[-1]] < 0:
        end_bytes[where[-1]] = coordinate
    return len(where) > 0


def _char_bytes(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: UTF-8 bytes before each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def _byte_ends(encoding: Encoding, char_bytes: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [L]: the byte of the rendered text at which each token ends, -1 where that cannot be told.

    Of tokens that share a character all but the last end inside it. Their bytes are counted back from the last one's
    end, where the vocabulary tells how many bytes each token has and they add up to the bytes of the text; or to one
    more, which is then a space of the tokenizer's own in front (its token ends where it begins).
    """
    ends, starts = encoding.ends, encoding.starts
    byte_ends = char_bytes[ends]
    is_within = np.append(starts[1:] < ends[:-1], False)[: len(ends)]
    if not is_within.any():
        return byte_ends
    widths = tokenizer.token_num_bytes[encoding.ids].astype(np.int64)
    counted = np.concatenate(([0], np.cumsum(widths)))
    unknown = np.concatenate(([0], np.cumsum(widths == 0)))
    within = np.flatnonzero(is_within)
    whole = np.flatnonzero(~is_within)  # each ends a run of tokens that share characters
    place = np.searchsorted(whole, within)
    last, first = whole[place], np.where(place > 0, whole[place - 1] + 1, 0)
    exact = byte_ends[last] - (counted[last + 1] - counted[within + 1])
    added = counted[last + 1] - counted[first] - (byte_ends[last] - char_bytes[starts[first]])
    known = (unknown[last + 1] == unknown[first]) & (added == 0)
    for i in np.flatnonzero((unknown[last + 1] == unknown[first]) & (added == 1)):
        known[i] = tokenizer.token(encoding.ids[first[i]]).startswith(SPACES)
    byte_ends[within] = np.where(known, exact, -1)
    return byte_ends


def _refuse_special_tokens(rendered: Rendered, encoding: Encoding, tokenizer: Tokenizer) -> None:
    suspects = [*tokenizer.special_ids, -1 if tokenizer.unknown_id is None else tokenizer.unknown_id]
    for i in np.flatnonzero(np.isin(encoding.ids, suspects)):
        token, start, end = tokenizer.token(encoding.ids[i]), int(encoding.starts[i]), int(encoding.ends[i])
        # Where the token's own text begins: it may have absorbed white space around it. An unknown token (-1) stands
        # for other text than its own.
        spelt = rendered.text.find(token, start, end)
        if any(span.start <= spelt < span.end for span in rendered.spans):
            raise BadRow(
                "special token in content",
                f"the content spells the special token {token!r} (character {spelt} of the rendered text), "
                "which the tokenizer would read as that token",
            )
        unknown = spelt < 0 and encoding.ids[i] == tokenizer.unknown_id
        if unknown and any(span.start <= start < span.end for span in rendered.spans):
            raise BadRow(
                "text without a token",
                f"the tokenizer has no token for {rendered.text[start:end]!r} (character {start} of the rendered "
                f"text): it would be read and trained on as {token!r}",
            )
