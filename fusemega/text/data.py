"""Where rows come from: JSONL, JSON, parquet and other files, or a data set of the hub."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, model_validator

from fusemega.config import Section
from fusemega.errors import UserError, choose, nearest
from fusemega.files.json_files import MalformedError, parse_json
from fusemega.files.opening import MIB, open_regular, refuse_special_files, require_regular
from fusemega.files.parquet_files import read_parquet
from fusemega.text.fields import BadRow

_ARRAYS = (".json", ".json.gz")  # may be one array of rows
_LINES = (*_ARRAYS, ".jsonl", ".jsonl.gz")
_BUILDERS = {".csv": "csv", ".arrow": "arrow", ".txt": "text"}
_SUFFIXES = (*_LINES, ".parquet", *_BUILDERS)
# Words of a file's path that say its split, as `datasets` reads them.
_SPLITS = {
    word: name
    for name, words in {
        "train": "train training",
        "validation": "validation valid val dev",
        "test": "test testing eval evaluation",
    }.items()
    for word in words.split()
}
_SHARD = re.compile(r"([\w.-]+)-\d{5}-of-\d{5}\.")  # as datasets writes them: train_sft-00000-of-00003.parquet
_ABOUT = {"config.json", "dataset_info.json", "dataset_infos.json"}  # beside the rows, by datasets and model folders
_LINE_BYTES, _ARRAY_BYTES = 64 * MIB, 1024 * MIB
_DIGITS = 4000  # of a number in a row, which may be training data
Truncation = Literal["keep_start", "keep_end", "drop"]
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class DataConfig(Section):
    """The rows, and the windows that they are cut into."""

    path: str | list[str] = Field(description="file, folder, glob or `datasets` hub name; or a list of the first three")
    name: str | None = Field(None, description="the hub data set's configuration, if it has several")
    split: str | None = Field(
        None,
        description="which split of a hub data set, a saved data set, a folder or a glob; for the last two it is "
        "taken from the files' names; default: train, and for a glob the only split; files given by "
        "name are read completely",
    )
    seq_length: int = Field(
        2048, ge=2, description="tokens in a row; longer documents are cut into windows of this length"
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="rows of several responses: most tokens of a response with its prompt; default: as many as let "
        "the group fit in a row",
    )
    truncation: Truncation = Field(
        "keep_start",
        description="rows of several responses that are too long: cut the end of the longest responses (keep_start), "
        "or the beginning of the prompt (keep_end), or leave the row out (drop)",
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at an unusable row, or skip and count it")
    unknown_fields: Literal["error", "ignore"] = Field(
        "error", description="an unknown field is an error, or is left out and counted"
    )
    chat_template: str | None = Field(
        None, description="file with a jinja chat template that replaces the tokenizer's, also in the export"
    )
    limit: int | None = Field(None, ge=1, description="use only this many rows, the first ones")

    @model_validator(mode="after")
    def _length_acts(self) -> DataConfig:
        """max_length must be less than seq_length, which holds at least two responses."""
        if self.max_length is not None and self.max_length >= self.seq_length:
            raise ValueError(f"max_length {self.max_length}: no effect beside seq_length {self.seq_length}")
        return self


@dataclass(frozen=True)
class RawRow:
    """One row: `file` indexes the source's `names`, `number` counts from 1 (lines, in a JSONL file); `value` is a
    BadRow where the line cannot be decoded."""

    file: int
    number: int
    value: Any


class Source:
    """An ordered set of rows. `names`: the files, or the hub data set's name."""

    def __init__(self, config: DataConfig) -> None:
        paths = [config.path] if isinstance(config.path, str) else config.path
        if not paths:
            raise UserError("data.path: an empty list; give at least one file")
        self._files: list[Path] = []
        self._dataset: Any = None
        if len(paths) == 1 and _is_hub_name(paths[0]):
            self._dataset, self.names = _load_hub(paths[0], config), [paths[0]]
            return
        if len(paths) == 1 and _is_saved(Path(paths[0])):
            self._dataset, self.names = _load_saved(Path(paths[0]), config.split or "train"), [paths[0]]
            self._files = [Path(part["filename"]) for part in self._dataset.cache_files]
            return
        for path in paths:
            self._files += _expand(path, config.split)
        self.names = [str(path) for path in self._files]

    def content_hash(self) -> str:
        """Hex digest of everything that decides the rows: the files' kinds and bytes, in order, wherever they lie and
        whatever they are called; a hub data set's fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        if self._dataset is not None and not self._files:
            digest.update(self._dataset._fingerprint.encode())
        elif self._dataset is not None:
            digest.update(str(self._dataset.features).encode())
        for path in self._files:
            kind = max((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), key=len, default="")
            with open_regular(path) as file:
                digest.update(b"\0%s %d\0" % (kind.encode(), os.fstat(file.fileno()).st_size))
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def rows(self) -> Iterator[RawRow]:
        """Every row in order.

        Raises:
            UserError: a file that cannot be read at all.
        """
        if self._dataset is not None:
            for number, value in enumerate(self._dataset, start=1):
                yield RawRow(0, number, value)
            return
        for index, path in enumerate(self._files):
            try:
                for number, value in _read(path):
                    yield RawRow(index, number, value)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot read: {error}") from None


def _is_hub_name(path: str) -> bool:
    return bool(_HUB_NAME.fullmatch(path)) and not Path(path).exists() and not path.endswith(_SUFFIXES)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load_hub(name: str, config: DataConfig) -> Any:
    import datasets  # slow to import, and needed only here

    try:
        return datasets.load_dataset(name, config.name, split=config.split or "train")
    except Exception as error:  # the hub client raises many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.path: {name!r} is no file here, and no data set could be loaded: {lines[0]}") from error


def _load_saved(path: Path, split: str) -> Any:
    import datasets

    refuse_special_files(path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot load the saved data set: {lines[0]}") from error
    return loaded[choose(f"{path}: data.split", split, loaded)] if isinstance(loaded, dict) else loaded


def _expand(path: str, split: str | None) -> list[Path]:
    """The files that a file, folder or glob stands for, sorted."""
    place = Path(path)
    if place.is_dir():
        inside = (file.relative_to(place) for file in place.rglob("*") if file.name.endswith(_SUFFIXES))
        shown = (file for file in inside if not any(part.startswith((".", "__")) for part in file.parts))
        files = sorted(place / file for file in shown if file.name not in _ABOUT and (place / file).is_file())
        if not files:
            raise UserError(f"{path}: the folder holds no data file ({', '.join(_SUFFIXES)})")
        return _of_split(place, files, split or "train")
    named = place.is_file()
    files = [place] if named else sorted(Path(hit) for hit in glob.glob(path, recursive=True))
    if not files:
        siblings = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{path}: no such data file{nearest(place.name, siblings)}")
    for file in files:
        if not file.name.endswith(_SUFFIXES):
            raise UserError(f"{file}: unknown kind of data file; allowed: {', '.join(_SUFFIXES)}")
    if named:
        _check_named(place, split)
        return files
    return _of_glob(path, files, split)


def _check_named(file: Path, split: str | None) -> None:
    """Refuses a `split` that contradicts the name of a file given by name, because such a file is read whole."""
    says = _splits_in(Path(file.name)) or {"train"} | _splits_in(Path(file.parent.name, "x"))
    if split is not None and _SPLITS.get(split, split) not in says:
        raise UserError(
            f"{file}: a file that is named in data.path is read whole, and its name does not say that it is of "
            f"data.split: {split}; leave data.split out, or give the folder of the files"
        )


def _of_glob(path: str, files: list[Path], split: str | None) -> list[Path]:
    """All files that the glob matches, if they are of one split; otherwise those of `split`, which must be given."""
    # The folder before the first wildcard: only what lies below it can tell splits apart.
    base = Path(re.split(r"[*?[]", path)[0] + "x").parent
    names = {frozenset(_splits_in(file.relative_to(base))) for file in files}
    if len(names) == 1 and split is None:
        return files
    if split is None:
        found = ", ".join(sorted({name for some in names for name in some}))
        raise UserError(f"{path}: matches files of several splits ({found}); choose one with data.split")
    return _of_split(base, files, split)


def _splits_in(file: Path) -> set[str]:
    """The splits named by the words of a path. In the names that libraries give to shards, all before the number is
    the split, whatever words are in it."""
    if shard := _SHARD.match(file.name):
        return {_SPLITS.get(shard[1], shard[1])}
    words = re.split("[^a-z0-9]+", str(file).lower().removesuffix("".join(file.suffixes).lower()))
    return {_SPLITS[word] for word in words if word in _SPLITS}


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of `split`: all of them are "train" where no name says another split."""
    found: dict[str, list[Path]] = {}
    for file in files:
        names = _splits_in(file.relative_to(folder)) or {""}
        if len(names) > 1:
            raise UserError(
                f"{file}: its name says several splits ({', '.join(sorted(names))}); give files in data.path"
            )
        found.setdefault(names.pop(), []).append(file)
    if found.keys() == {""}:
        found = {"train": files}
    if "" in found:
        others = ", ".join(sorted(found.keys() - {""}))
        raise UserError(
            f"{found[''][0]}: its name says no split, others in {folder} do ({others}); give files in data.path"
        )
    return found[choose(f"{folder}: data.split", _SPLITS.get(split, split), found)]


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    if path.name.endswith(_LINES):
        yield from _read_json(path)
    elif path.suffix == ".parquet":
        yield from enumerate(read_parquet(path), start=1)
    else:
        import datasets

        require_regular(path)
        try:
            loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{path}: cannot read: {lines[0]}") from error
        yield from enumerate(loaded, start=1)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """One row in each line, without blank lines at the end; a `.json` file may instead be one array of rows."""
    with open_regular(path) as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        if path.name.endswith(_ARRAYS) and _begins_with_bracket(file):
            file.seek(0)
            yield from enumerate(_array(path, file.read(_ARRAY_BYTES + 1)), start=1)
            return
        file.seek(0)
        blank = 0  # lines in a row; a small archive can have billions
        for number in itertools.count(1):
            line = file.readline(_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _LINE_BYTES:
                raise UserError(f"{path}:{number}: a line of more than {_LINE_BYTES} bytes")
            if not line.strip():
                blank += 1
                continue
            for empty in range(number - blank, number):
                yield empty, BadRow("empty", "the row is empty")
            blank = 0
            yield number, _decode(line)


def _begins_with_bracket(file: IO[bytes]) -> bool:
    """Whether the first character is "[", after white space and a byte order mark."""
    start = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8).lstrip()
    while not start:
        block = file.read(1 << 16)
        if not block:
            return False
        start = block.lstrip()
    return start.startswith(b"[")


def _array(path: Path, content: bytes) -> list[Any]:
    if len(content) > _ARRAY_BYTES:
        raise UserError(f"{path}: an array of more than {_ARRAY_BYTES} bytes; write one row in each line, as .jsonl")
    try:
        value: list[Any] = parse_json(content, digits=_DIGITS, finite=False)
    except MalformedError as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from None
    return value


def _decode(line: bytes) -> Any:
    try:
        return parse_json(line, digits=_DIGITS, finite=False)
    except MalformedError as error:
        return BadRow("malformed JSON", str(error))
