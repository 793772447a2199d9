"""A vocabulary map, stored as one file: for each id of a source tokenizer the corresponding id of a target tokenizer.

Shape suffixes: S ids of the source's vocabulary, T ids of the target's.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.align.kinds import KINDS
from fusemega.errors import UserError, choose
from fusemega.files.json_files import MalformedError, parse_json
from fusemega.files.npz_files import MalformedArraysError, read_arrays
from fusemega.files.output import INSIDE, check_output_file, publish_file, scratch

_FORMAT = 3
_IDS = 1 << 25  # the most that stores can code
_TABLES = ("table_S", "marked_S", "unmarked_S")
_CELLS = "cell_T"
_NO_MAP = "not a vocabulary map, or a damaged one; make one with `fusemega align`"
_FACTS = {
    "kind": str,
    "source": str,
    "target": str,
    "source_size": int,
    "target_size": int,
    "source_marks_start": bool,
    "target_marks_start": bool,
    "source_marks_text": bool,
    "target_marks_text": bool,
    "source_eos": int,
    "target_eos": int,
    "statistics": dict,
}


@dataclass(frozen=True)
class VocabularyMap:
    """Which target id each source id becomes; `fusemega.align.make_map` makes one.

    Attributes:
        kind: how it was made, one of `KINDS`.
        source, target: content hashes of the two tokenizers.
        table_S: int32, a target id, or -1 where the source's token has none.
        marked_S, unmarked_S: int32, the same for the source's token with a space put before it, or with its leading
            space taken away: for the first position of a message, where one tokenizer's token carries a space that is
            not in the text and the other's does not.
        source_size, target_size: 1 + the largest id of either tokenizer.
        source_marks_start, target_marks_start: `Vocabulary.marks_start` of both.
        source_marks_text, target_marks_text: `Vocabulary.marks_text` of both.
        source_eos, target_eos: ids that end a plain text, -1 for none. There the first becomes the second, even if
            `table_S` says otherwise because the source closes turns with it too.
        cell_T: int32, for each target id the id that stands for its cell; the tables have only ids that stand for a
            cell. Empty for kinds without cells, where each id stands for itself.
        statistics: counts from the making of the map, JSON-able.
    """

    kind: str
    source: str
    target: str
    table_S: np.ndarray
    marked_S: np.ndarray
    unmarked_S: np.ndarray
    source_size: int
    target_size: int
    source_marks_start: bool
    target_marks_start: bool
    source_marks_text: bool = False
    target_marks_text: bool = False
    source_eos: int = -1
    target_eos: int = -1
    cell_T: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def content_hash(self) -> str:
        """Hash, in hex, of everything that a projected row depends on, given the two tokenizers."""
        facts = [getattr(self, name) for name in _FACTS if name not in ("kind", "source", "target", "statistics")]
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
        for name in (*_TABLES, _CELLS):
            digest.update(np.ascontiguousarray(getattr(self, name), dtype="<i4").tobytes())
        return digest.hexdigest()

    def check(
        self,
        path: str | Path,
        source: tuple[str, str],
        target: tuple[str, str],
        source_ids: int | None = None,
        target_ids: int | None = None,
    ) -> None:
        """Checks that the map belongs to two tokenizers.

        Args:
            source, target: (content hash, name for messages) of each.
            source_ids, target_ids: 1 + their largest ids, if known.

        Raises:
            UserError: it is not; names `path`.
        """
        for side, found, (wanted, whose) in (("source", self.source, source), ("target", self.target, target)):
            if found != wanted:
                raise UserError(
                    f"{path}: the map's {side} is not the tokenizer of {whose} (map {found[:12]}, tokenizer "
                    f"{wanted[:12]}); make one with `fusemega align`"
                )
        sizes = (("source", self.source_size, source_ids), ("target", self.target_size, target_ids))
        for (side, size, ids), (_, whose) in zip(sizes, (source, target), strict=True):
            if ids is not None and size != ids:
                raise UserError(
                    f"{path}: the map has {size} ids of the {side}, and the tokenizer of {whose} has {ids}; make one "
                    "with `fusemega align`"
                )

    def save(self, path: str | Path) -> None:
        """Writes the map to a file, complete or not at all; an older one is replaced.

        Raises:
            UserError: the place cannot be written, something else than a map is there, or the disk is full.
        """
        path = Path(path)
        facts = {"format": _FORMAT, "hash": self.content_hash, **{name: getattr(self, name) for name in _FACTS}}
        tables = {name: np.asarray(getattr(self, name), dtype="<i4") for name in (*_TABLES, _CELLS)}
        written = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        self.check_replaceable(path)
        with scratch(path) as place:
            self.check_replaceable(path)
            with (place / INSIDE).open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, facts=written, **tables)
            publish_file(place / INSIDE, path)

    @classmethod
    def check_replaceable(cls, path: Path) -> None:
        """Refuses a path at which something else than a vocabulary map stands, of this format or of an older one.

        Raises:
            UserError: names it.
        """
        check_output_file(path)
        if os.path.lexists(path):
            try:
                if _facts(path)["format"] >= _FORMAT:
                    cls.load(path)
            except UserError:
                raise UserError(f"{path}: exists and is not a vocabulary map; it is not replaced") from None

    @classmethod
    def load(cls, path: str | Path) -> VocabularyMap:
        """The map in a file.

        Raises:
            UserError: no such file, not a map, one of another format, or a damaged one.
        """
        facts = _facts(path)
        if facts["format"] != _FORMAT:
            older = ", from before maps had cells" if facts["format"] < _FORMAT else ""
            raise UserError(
                f"{path}: a vocabulary map of format {facts['format']}{older}; this version reads format {_FORMAT}; "
                f"make it again with `fusemega align SOURCE TARGET {path}`"
            )
        arrays = _arrays(path, dict.fromkeys((*_TABLES, _CELLS), "<i4"))
        for name, kind in _FACTS.items():
            if type(facts.get(name)) is not kind:
                raise UserError(f"{path}: damaged vocabulary map: {name} is {facts.get(name)!r}")
        choose(f"{path}: kind", facts["kind"], KINDS)
        limit = facts["target_size"]
        if not 0 < limit <= _IDS:
            raise UserError(f"{path}: damaged vocabulary map: target_size is {limit}; allowed: 1 to {_IDS}")
        for side in ("source", "target"):
            if not -1 <= facts[f"{side}_eos"] < facts[f"{side}_size"]:
                raise UserError(f"{path}: damaged vocabulary map: {side}_eos is {facts[f'{side}_eos']}")
        for name in _TABLES:
            table = arrays[name]
            if table.shape != (facts["source_size"],):
                raise UserError(
                    f"{path}: damaged vocabulary map: {name} has {table.size} entries, one for each of the source's "
                    f"{facts['source_size']} ids expected"
                )
            if table.min(initial=-1) < -1 or table.max(initial=-1) >= limit:
                raise UserError(f"{path}: damaged vocabulary map: {name} is no table of ids below {limit}")
        _check_cells(path, facts, arrays)
        loaded = cls(**arrays, **{name: facts[name] for name in _FACTS})
        if facts.get("hash") != loaded.content_hash:
            raise UserError(f"{path}: damaged vocabulary map: it was changed after it was made (its hash differs)")
        return loaded


def _facts(path: str | Path) -> dict[str, Any]:
    """What a map's file says of the map; it has a format, a whole number."""
    try:
        facts = parse_json(_arrays(path, {"facts": "|u1"})["facts"].tobytes())
    except MalformedError:
        facts = None
    if not isinstance(facts, dict) or type(facts.get("format")) is not int:
        raise UserError(f"{path}: {_NO_MAP}")
    return facts


def _arrays(path: str | Path, dtypes: dict[str, str]) -> dict[str, Any]:
    try:
        return {**read_arrays(path, dtypes, "the vocabulary map")}
    except MalformedArraysError:
        raise UserError(f"{path}: {_NO_MAP}") from None


def _check_cells(path: str | Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Checks the table of cells, and that the other tables have only ids that stand for a cell."""
    cell_T, damaged = arrays[_CELLS], f"{path}: damaged vocabulary map: {_CELLS}"
    expected = facts["target_size"] if KINDS[facts["kind"]].cells else 0
    if cell_T.size != expected:
        why = "one for each of the target's ids" if expected else f"none for kind {facts['kind']}"
        raise UserError(f"{damaged} has {cell_T.size} entries; expected: {expected}, {why}")
    if not expected:
        return
    if cell_T.min() < 0 or cell_T.max() >= expected:
        raise UserError(f"{damaged} is no table of ids below {expected}")
    wrong = np.flatnonzero(cell_T[cell_T] != cell_T)
    if len(wrong):
        stands = int(cell_T[wrong[0]])
        raise UserError(f"{damaged} says that {stands} stands for {wrong[0]}, but {cell_T[stands]} for {stands} itself")
    for name in _TABLES:
        ids = arrays[name][arrays[name] >= 0]
        if (cell_T[ids] != ids).any():
            raise UserError(f"{damaged} does not fit {name}, which has an id that stands for no cell")
