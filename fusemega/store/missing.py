"""Finds out why a store has no row of a sample: other windows, other supervised parts, or other text.

A key is a hash of the document and of the window's bytes. So the document is read again, and the keys that it would
have in each of the three cases are looked up in the store. This is done once, for the message with which a run ends.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fusemega.store.reader import Store
from fusemega.text.data import Source
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.document import BadRow, Chat, Document, Group, canonical, parse_row

_TURNS = 8  # up to this many assistant turns, every combination is tried
_TRIES = 1 << 20  # keys looked for, of each kind


def why_missing(store: Store, dataset: TokenizedDataset, i: int) -> str:
    """The reason, as one clause, why the store has no row of sample `i`."""
    document = _document(dataset, i)
    if document is not None:
        if window := _window(store, document):
            return (
                f"it has the text in other windows, such as its bytes {window[0]} to {window[1]}: its scorer's are "
                f"{store.manifest.truncation} tokens, and the document is longer than one window of either model "
                "(see `fusemega split`)"
            )
        if any(_has(store, other, [(0, _length(document))]) for other in _other_masks(document)):
            return "it has the text with other parts of it supervised"
    present = sum(key in store for key in dataset.keys)
    if present == 0:
        return f"it has none of these {len(dataset)} samples: it was written from other data"
    return f"it has {present} of these {len(dataset)} samples, and not this text"


def _document(dataset: TokenizedDataset, i: int) -> Document | None:
    """The document of sample `i`; None where its row can no longer be read."""
    file, number = dataset.place(i)
    for row in Source(dataset.config).rows():
        if (row.file, row.number) == (file, number):
            try:
                found = parse_row(row.value, Counter())  # unknown fields were reported when the data was read
            except BadRow:
                return None
            if isinstance(found, Group):
                return found.documents[i - int(dataset.starts[dataset.starts <= i][-1])]
            return found
    return None


def _length(document: Document) -> int:
    """Length in bytes of the document's canonical stream."""
    if isinstance(document, Chat):
        return document.stream_length
    return len(document.text.encode()) + 1  # its eos


def _window(store: Store, document: Document) -> tuple[int, int] | None:
    """A window of the document that the store has: one at its beginning or its end, or the whole."""
    length = _length(document)
    begins = ((0, high) for high in range(1, length + 1))
    ends = ((low, length) for low in range(1, length))
    return _has(store, document, itertools.islice(itertools.chain(begins, ends), _TRIES))


def _has(
    store: Store, document: Document, windows: Iterator[tuple[int, int]] | list[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first of the windows whose row the store has. Keys are made as in `fusemega.text.sample.sample_key`."""
    begun = hashlib.blake2b(canonical(document), digest_size=16)
    for low, high in windows:
        key = begun.copy()
        key.update(b"\n%d:%d" % (low, high))
        if key.digest() in store:
            return low, high
    return None


def _other_masks(document: Document) -> Iterator[Document]:
    """The same text with every other choice of supervised turns, or of the character at which they begin."""
    if not isinstance(document, Chat):
        yield from (replace(document, supervised_from=at) for at in range(min(len(document.text), 1 << 14)))
        return
    turns = [n for n, message in enumerate(document.messages) if message.role == "assistant"]
    choices: Iterator[tuple[int, ...]] = itertools.chain.from_iterable(
        itertools.combinations(turns, count) for count in range(len(turns), 0, -1)
    )
    if len(turns) > _TURNS:
        choices = iter([tuple(turns), *((turn,) for turn in turns)])
    for chosen in choices:
        messages = enumerate(document.messages)
        yield replace(document, messages=tuple(replace(message, supervised=n in chosen) for n, message in messages))
