"""All samples of a data set, tokenized once and stored in one memory-mapped folder of the cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.runtime.console import debug, phase, say
from fusemega.text.chat import ChatRenderer, Rendered, render_text
from fusemega.text.data import DataConfig, RawRow, Source
from fusemega.text.document import SCALARS, BadRow, Chat, Document, Dropped, Group, canonical, parse_row
from fusemega.text.row_progress import row_progress
from fusemega.text.sample import Annotated, Sample, annotate, cut
from fusemega.text.templates import OverBudget
from fusemega.text.tokenizer import Tokenizer
from fusemega.text.truncation import group_samples

_FORMAT = 10  # raise when the meaning of a cached file changes
_BATCH = 512  # rows tokenized together
_COLUMNS = {"ids": "<i4", "end_bytes": "<i4", "supervised": "|b1", "places": "|u1"}  # one value for each token
_INDEX = np.dtype(
    [*((name, "<i8") for name in ("offset", "num_bytes", "file", "row", "group")), ("key", "u1", 16)]
    + [(name, "<f8") for name in SCALARS]
)
_NO_TARGET = "window without supervised tokens"


class TokenizedDataset:
    """Samples by index, from a folder that `prepare` wrote; arrays are views of memory-mapped files.

    A pickle of it holds only the names of its folder and of the data files.

    Attributes:
        config: what was read.
        lengths: int64 [len(self)], tokens of each sample.
        in_group: bool [len(self)], whether each sample belongs to a group.
        starts: int64 [num_units], the first sample of each unit.
        num_supervised: supervised tokens of all samples.
        sources: names of the sources that responses come from, sorted; a sample's `scalars["source"]` is a place here.
        skipped: reason -> number of rows skipped, and of windows dropped for having no target.
        ignored: name -> number of unknown fields that were left out (`data.unknown_fields: ignore`).
        notes: sentences for the user on how the rows were read.
    """

    def __init__(self, folder: Path, names: Sequence[str], config: DataConfig) -> None:
        """`names`: the data files' names, by `RawRow.file`; they are not in the folder, which depends on contents."""
        self.folder, self.config, self._names = folder, config, names
        try:
            meta = read_json(folder / "meta.json")
            if missing := {"skipped", "num_supervised", "num_tokens", "ignored", "notes", "sources"} - meta.keys():
                raise UserError(f"meta.json has no {min(missing)}")
            self._index: np.ndarray = np.load(folder / "index.npy", mmap_mode="r")
            if self._index.dtype != _INDEX or self._index.ndim != 1:
                raise UserError("index.npy is no index")
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{folder}: damaged data cache, delete the folder: {error}") from None
        self.skipped: dict[str, int] = meta["skipped"]
        self.ignored: dict[str, int] = meta["ignored"]
        self.notes: list[str] = meta["notes"]
        self.sources: list[str] = meta["sources"]
        self.num_supervised: int = meta["num_supervised"]
        self._offsets = np.append(self._index["offset"], meta["num_tokens"])
        self._columns = {}
        for name, dtype in _COLUMNS.items():
            path = folder / f"{name}.bin"
            expected = meta["num_tokens"] * np.dtype(dtype).itemsize
            if not path.is_file() or path.stat().st_size != expected:
                raise UserError(f"{path}: damaged data cache ({expected} bytes expected), delete its folder")
            self._columns[name] = np.memmap(path, dtype=dtype, mode="r")
        self.lengths: np.ndarray = np.diff(self._offsets)
        groups = self._index["group"]
        self.in_group: np.ndarray = groups >= 0
        # A unit begins at every sample without a group, and where the group changes.
        self.starts: np.ndarray = np.flatnonzero(~self.in_group | np.append(True, groups[1:] != groups[:-1]))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizedDataset, (self.folder, self._names, self.config)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        entry, tokens = self._index[i], slice(int(self._offsets[i]), int(self._offsets[i + 1]))
        return Sample(
            key=entry["key"].tobytes(),
            ids=self.ids(i),
            supervised=np.asarray(self._columns["supervised"][tokens]),
            end_bytes=np.asarray(self._columns["end_bytes"][tokens]),
            num_bytes=int(entry["num_bytes"]),
            source=f"{self._names[entry['file']]}:{entry['row']}",
            places=np.asarray(self._columns["places"][tokens]),
            group=None if entry["group"] < 0 else int(entry["group"]),
            scalars={name: float(entry[name]) for name in SCALARS if not np.isnan(entry[name])},
        )

    def ids(self, i: int) -> np.ndarray:
        """int32 [L], the tokens of sample `i`."""
        return np.asarray(self._columns["ids"][int(self._offsets[i]) : int(self._offsets[i + 1])])

    @property
    def is_grouped(self) -> bool:
        """Whether any sample belongs to a group."""
        return bool(self.in_group.any())

    @property
    def num_units(self) -> int:
        """How many groups of samples there are; a sample that belongs to none counts as one."""
        return len(self.starts)

    def unit(self, i: int) -> range:
        """The samples of group `i`."""
        return range(int(self.starts[i]), int(self.starts[i + 1]) if i + 1 < len(self.starts) else len(self))

    def in_words(self) -> str:
        """The amount of data, in words."""
        groups = f"{self.num_units} groups, " if self.is_grouped else ""
        return f"{groups}{len(self)} samples, {int(self.lengths.sum())} tokens, {self.num_supervised} supervised"

    def contents(self) -> list[np.ndarray]:
        """All that the samples consist of, in order, without where they came from; views of the files."""
        names = ("key", "offset", *(("group", *SCALARS) if self.is_grouped else ()))
        found = [np.ascontiguousarray(self._index[name]) for name in names] + list(self._columns.values())
        # Objectives may pick sources by name.
        return found + [np.frombuffer(name.encode() + b"\0", dtype=np.uint8) for name in self.sources]

    def place(self, i: int) -> tuple[int, int]:
        """`RawRow.file` and `RawRow.number` of the row of sample `i`."""
        return int(self._index["file"][i]), int(self._index["row"][i])

    def of_number(self, number: int) -> list[int]:
        """The samples of all rows that have this `RawRow.number`, one row for each file that is so long."""
        return [int(i) for i in np.flatnonzero(self._index["row"] == number)]

    @property
    def keys(self) -> list[bytes]:
        """The samples' keys, in order."""
        return [key.tobytes() for key in self._index["key"]]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, spread evenly, rising.

    >>> evenly(10, 4), evenly(2, 4), evenly(0, 4)
    ([0, 3, 6, 9], [0, 1], [])
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    vocab_size: int | None = None,
    progress: bool = False,
    share_prefix: bool = False,
) -> TokenizedDataset:
    """The data set's samples, from the cache or tokenized now.

    The cached folder's name is a hash of the data's content (not of the files' names or places), the tokenizer, the
    template and the settings; it appears complete or not at all. With several ranks, call it on one, wait, then call it
    on the others.

    Args:
        vocab_size: the model's; ids beyond it make a row bad. None: not checked.
        progress: show rows done on stderr, where that is a terminal, and say there once what was left out.
        share_prefix: a group is as long as its samples with what they all begin with once.

    Raises:
        UserError: an unreadable file; a bad row under `on_bad_row: error` ("file:row: ..."); no usable sample.
    """
    tokenizer = tokenizer.with_template(config.chat_template)
    source = Source(config)
    identity = {
        "format": _FORMAT,
        "content": source.content_hash(),
        "tokenizer": tokenizer.content_hash,
        "template": tokenizer.template_hash,
        "config": config.model_dump(exclude={"path", "name", "split", "chat_template"}),  # the content says which
        "vocab_size": vocab_size,
        **({"share_prefix": True} if share_prefix else {}),
    }
    fingerprint = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = Path(cache_dir) / fingerprint
    if folder.is_dir():
        debug(f"{source.names[0]}{', ...' if len(source.names) > 1 else ''}: tokenized before, in {folder}")
    else:
        with phase(f"{len(source.names)} file(s) of rows are tokenized into {folder}"):
            _build(folder, source, _Tokenize(config, source, tokenizer, vocab_size, share_prefix), progress)
    dataset = TokenizedDataset(folder, source.names, config)
    for name in ("max_length", "truncation"):
        if getattr(config, name) != DataConfig.model_fields[name].default and not dataset.is_grouped:
            raise UserError(f"data.{name}: no effect, because no row has several responses to one prompt; leave it out")
    if progress:
        _say_left_out(tuple(source.names), dataset)
    return dataset


_SAID: set[str] = set()


def _say_left_out(names: tuple[str, ...], dataset: TokenizedDataset) -> None:
    """Says what was left out, once in a process, however many tokenizers read the same rows."""
    fields = [f"left out the field {name!r} {count} times" for name, count in dataset.ignored.items()]
    rows = [f"skipped {count} ({reason})" for reason, count in dataset.skipped.items()]
    for found in (fields, rows, *([note] for note in dataset.notes)):
        line = f"{names[0]}{', ...' if len(names) > 1 else ''}: {'; '.join(found)}"
        if found and line not in _SAID:
            _SAID.add(line)
            say(line)


class _Tokenize:
    """Rows -> samples, counting what is skipped."""

    def __init__(
        self, config: DataConfig, source: Source, tokenizer: Tokenizer, vocab_size: int | None, share_prefix: bool
    ) -> None:
        self._share_prefix = share_prefix
        self.config, self.source, self.tokenizer, self.vocab_size = config, source, tokenizer, vocab_size
        self.skipped: Counter[str] = Counter()
        self.ignored: Counter[str] | None = Counter() if config.unknown_fields == "ignore" else None
        self.sources: dict[str, int] = {}  # name -> number, by first appearance
        self._told: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._renderer: ChatRenderer | None = None

    def notes(self) -> list[str]:
        """See `TokenizedDataset.notes`."""
        notes = [f"fields that change nothing of what is learnt: {', '.join(sorted(self._told))}"] if self._told else []
        if self._cut:
            notes.append(
                f"{self._cut['rows']} rows of several responses were too long: {self._cut['tokens']} of their tokens "
                f"are left out (data.truncation: {self.config.truncation})"
            )
        if self._renderer is not None:
            notes += [f"{count} {what}" for what, count in self._renderer.counts.items()]
            closing = self._renderer.closing.strip()
            if not closing or len(self.tokenizer.encode([closing])[0].ids) != 1:
                found = f"with {closing!r}, which is several tokens" if closing else "with no token"
                notes.append(
                    f"{self.tokenizer.template_source}: its chat template ends an assistant turn {found}: the model "
                    "does not learn a token at which generation stops (data.chat_template sets another template)"
                )
        return notes

    def __call__(self, rows: Iterable[RawRow]) -> Iterator[tuple[RawRow, list[Sample]]]:
        """The samples of each row: those of a group together, those of a document one by one."""
        ready: list[tuple[RawRow, Document | Group, list[tuple[bytes, Rendered]]]] = []
        for row in rows:
            try:
                if isinstance(row.value, BadRow):
                    raise row.value
                parsed = parse_row(row.value, self.ignored, self._told)
                documents = parsed.documents if isinstance(parsed, Group) else (parsed,)
                ready.append((row, parsed, [(canonical(each), self._render(each)) for each in documents]))
            except BadRow as error:
                self._bad(row, error)
            except OverBudget as error:  # other rows might exceed it too, so none is skipped for it
                raise UserError(f"{self._place(row)}: {error}") from None
        encodings = iter(self.tokenizer.encode([rendered.text for *_, parts in ready for _, rendered in parts]))
        for row, parsed, parts in ready:
            encoded = [next(encodings) for _ in parts]
            try:
                tokens = []
                for (_, rendered), encoding in zip(parts, encoded, strict=True):
                    tokens.append(annotate(rendered, encoding, self.tokenizer))
                    self._check_ids(tokens[-1])
                if isinstance(parsed, Group):
                    yield row, self._group(parsed, tokens, parts, row)
                    continue
            except BadRow as error:
                self._bad(row, error)
                continue
            for sample in cut(tokens[0], parts[0][0], self.config.seq_length, self._place(row)):
                if sample.supervised.any():
                    yield row, [sample]
                else:
                    self.skipped[_NO_TARGET] += 1

    def _group(
        self, group: Group, tokens: Sequence[Annotated], parts: Sequence[tuple[bytes, Rendered]], row: RawRow
    ) -> list[Sample]:
        samples, left_out = group_samples(tokens, parts, self.config, self._place(row), self._share_prefix)
        if left_out:
            self._cut.update(rows=1, tokens=left_out)
        found = []
        for sample, scalars, name in zip(samples, group.scalars, group.sources, strict=True):
            number = {} if name is None else {"source": float(self.sources.setdefault(name, len(self.sources)))}
            found.append(replace(sample, group=0, scalars={**scalars, **number}))  # numbered where it is written
        return found

    def _render(self, document: Document) -> Rendered:
        if isinstance(document, Chat):
            if self._renderer is None:
                self._renderer = ChatRenderer(self.tokenizer)
            return self._renderer.render(document, self.ignored)
        if self.tokenizer.eos_id is None:
            raise UserError(f"{self.tokenizer.source}: the tokenizer has no eos token, which rows of text end with")
        return render_text(document)

    def _check_ids(self, document: Annotated) -> None:
        if self.vocab_size is not None and len(document.ids) and int(document.ids.max()) >= self.vocab_size:
            worst = int(document.ids.max())
            raise BadRow(
                "id beyond the vocabulary",
                f"token {self.tokenizer.token(worst)!r} has id {worst}, the model's vocabulary has {self.vocab_size}",
            )

    def _bad(self, row: RawRow, error: BadRow) -> None:
        if self.config.on_bad_row == "error" and not isinstance(error, Dropped):
            hint = "" if "data." in error.detail else " (data.on_bad_row: skip would count and skip it)"
            raise UserError(f"{self._place(row)}: {error.detail}{hint}")
        self.skipped[error.reason] += 1

    def _place(self, row: RawRow) -> str:
        return f"{self.source.names[row.file]}:{row.number}"


def _build(folder: Path, source: Source, tokenize: _Tokenize, progress: bool) -> None:
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial, source, tokenize, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process built the same samples first: use its folder
                raise
    except OSError as error:
        raise UserError(f"{folder}: cannot write the data cache: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(partial: Path, source: Source, tokenize: _Tokenize, progress: bool) -> None:
    index: list[tuple[Any, ...]] = []
    num_tokens = num_supervised = num_groups = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((partial / f"{name}.bin").open("wb")) for name in _COLUMNS}
        advance = stack.enter_context(row_progress("tokenizing", progress))
        rows = itertools.islice(source.rows(), tokenize.config.limit)
        while batch := list(itertools.islice(rows, _BATCH)):
            for row, samples in tokenize(batch):
                group = -1 if samples[0].group is None else num_groups
                num_groups += group >= 0
                for sample in samples:
                    scalars = (sample.scalars.get(name, np.nan) for name in SCALARS)
                    place = (num_tokens, sample.num_bytes, row.file, row.number, group)
                    index.append((*place, list(sample.key), *scalars))
                    for name, dtype in _COLUMNS.items():
                        files[name].write(np.ascontiguousarray(getattr(sample, name), dtype=dtype).tobytes())
                    num_tokens += len(sample.ids)
                    num_supervised += int(sample.supervised.sum())
            advance(len(batch))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if not index:
        counts = ", ".join(f"{reason}: {count}" for reason, count in tokenize.skipped.items()) or "no rows"
        raise UserError(f"{', '.join(source.names)}: no usable sample ({counts})")
    entries, sources = np.array(index, dtype=_INDEX), sorted(tokenize.sources)
    if sources:  # the same numbers whatever the order of the rows
        numbers = np.array([sources.index(name) for name in tokenize.sources], dtype=np.float64)
        named = ~np.isnan(entries["source"])
        entries["source"][named] = numbers[entries["source"][named].astype(int)]
    np.save(partial / "index.npy", entries)
    meta = {
        "num_tokens": num_tokens,
        "num_supervised": num_supervised,
        "skipped": dict(sorted(tokenize.skipped.items())),
        "ignored": dict(sorted((tokenize.ignored or {}).items())),
        "notes": tokenize.notes(),
        "sources": sources,
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
