"""Where rows come from: JSONL, JSON, parquet and other files, or a data set of the hub."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fusemega.config import Section
from fusemega.errors import UserError, choose, nearest
from fusemega.text.document import BadRow

_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_BUILDERS = {".csv": "csv", ".arrow": "arrow", ".txt": "text"}
_SUFFIXES = (*_LINES, ".parquet", *_BUILDERS)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class DataConfig(Section):
    """The `data` section of a run file.

    Attributes:
        path: a file, folder, glob or `datasets` hub name, or a list of files, folders and globs.
        name: the hub data set's configuration, where it has several.
        split: split of a hub data set, or of a folder that `datasets` saved.
        seq_length: tokens in a row of a micro-batch; longer documents are cut into windows of at most this length.
        on_bad_row: stop at a row that cannot be used, or skip and count it.
        limit: use the first rows only.
    """

    path: str | list[str]
    name: str | None = None
    split: str = "train"
    seq_length: int = Field(2048, ge=2)
    on_bad_row: Literal["error", "skip"] = "error"
    limit: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Row:
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
            self._dataset, self.names = _load_saved(Path(paths[0]), config.split), [paths[0]]
            return
        for path in paths:
            self._files += _expand(path)
        self.names = [str(path) for path in self._files]

    def content_hash(self) -> str:
        """Hex digest of everything that decides the rows: the files' bytes, or the data set's fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        if self._dataset is not None:
            digest.update(self._dataset._fingerprint.encode())
        for path in self._files:
            digest.update(b"\0%d\0" % path.stat().st_size)
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Every row in order.

        Raises:
            UserError: a file that cannot be read at all.
        """
        if self._dataset is not None:
            for number, value in enumerate(self._dataset, start=1):
                yield Row(0, number, value)
        for index, path in enumerate(self._files):
            try:
                for number, value in _read(path):
                    yield Row(index, number, value)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot read: {error}") from None


def _is_hub_name(path: str) -> bool:
    return bool(_HUB_NAME.fullmatch(path)) and not Path(path).exists() and not path.endswith(_SUFFIXES)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load_hub(name: str, config: DataConfig) -> Any:
    import datasets  # slow to import, and needed only here

    try:
        return datasets.load_dataset(name, config.name, split=config.split)
    except Exception as error:  # the hub client raises many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.path: {name!r} is no file here, and no data set could be loaded: {lines[0]}") from error


def _load_saved(path: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot load the saved data set: {lines[0]}") from error
    return loaded[choose(f"{path}: data.split", split, loaded)] if isinstance(loaded, dict) else loaded


def _expand(path: str) -> list[Path]:
    """The files that a file, folder or glob stands for, sorted."""
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file() and file.name.endswith(_SUFFIXES))
        if not files:
            raise UserError(f"{path}: the folder holds no data file ({', '.join(_SUFFIXES)})")
        return files
    files = [place] if place.is_file() else sorted(Path(hit) for hit in glob.glob(path, recursive=True))
    if not files:
        siblings = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{path}: no such data file{nearest(place.name, siblings)}")
    for file in files:
        if not file.name.endswith(_SUFFIXES):
            raise UserError(f"{file}: unknown kind of data file; allowed: {', '.join(_SUFFIXES)}")
    return files


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    if path.name.endswith(_LINES):
        yield from _read_json(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        import datasets

        try:
            loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{path}: cannot read: {lines[0]}") from error
        yield from enumerate(loaded, start=1)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """One row a line; a `.json` file may instead be one array of rows."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        if ".json" in path.suffixes and file.read(1) == b"[":
            file.seek(0)
            try:
                yield from enumerate(json.loads(file.read()), start=1)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: malformed JSON: {error}") from None
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            yield number, _decode(line)


def _decode(line: bytes) -> Any:
    if not line.strip():
        return BadRow("empty", "the row is empty")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("malformed JSON", f"not UTF-8 text (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return BadRow("malformed JSON", f"malformed JSON: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield number, value
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole parquet file: {str(error).splitlines()[0]}") from None
