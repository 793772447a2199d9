"""Vocabularies that differ in length or meaning: which row of each model becomes which row of the merge.

Rows are matched by position if the models' files show that they stand for the same tokens: the same strings and the
same merges. Otherwise the user chooses. `crop` keeps the base's rows and `pad` the longest model's, both by position;
`position` matches by position whatever the files say; `union` matches by token string. A model that lacks a row
contributes nothing to it: it gets the base's row (a delta of zero), or, if the base lacks it too, the mean of the
models that have it, which is then the base's row as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.tokenizer_files import JSON_BYTES, tokenizer_errors
from fusemega.hf.folder import HFFolder
from fusemega.text.vocabulary_files import (
    PROBES,
    TOKENIZER_FILE,
    VocabularyFiles,
    difference,
    read_vocabulary,
    renamed,
)


@dataclass(frozen=True)
class MergedVocabulary:
    """The rows of the merged embedding and head.

    Attributes:
        rows: number of rows.
        maps: for each folder, its own row for each row of the merge, -1 where it has none; None: the same rows.
        donor: the folder whose tokenizer, template and token ids the merge carries.
        added: entries that the donor's tokenizer gets, in the order of their ids.
        note: what was done, for the user; "" if nothing had to be done.
        files: what each folder's files say of its own vocabulary.
    """

    rows: int
    maps: list[np.ndarray | None]
    donor: int = 0
    added: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    files: list[VocabularyFiles | None] = field(default_factory=list)


def plan_vocabulary(
    folders: Sequence[HFFolder], mode: str | None, donor: int | None = None, has_base: bool = False
) -> MergedVocabulary:
    """The rows of a merge of `folders`, of which the first is the base.

    Args:
        folders: folders of all models.
        mode: crop, pad, position or union; None: the vocabularies have to be equal.
        donor: the folder whose tokenizer was asked for.
        has_base: whether deltas are computed against the first.

    Raises:
        UserError: the vocabularies differ, or nothing shows that they are the same, and the mode does not allow that.
    """
    sizes = [int(folder.config["vocab_size"]) for folder in folders]
    files = [read_vocabulary(folder.path) for folder in folders]
    if mode == "union":
        if donor:
            raise UserError(f"tokenizer_source: {folders[donor].path}: vocabulary: union extends {folders[0].path}'s")
        return _union(folders, sizes, files)
    note = "" if mode == "position" else _check_same(folders, files, mode, donor, has_base)
    rows = max(sizes) if mode == "pad" else sizes[0]
    if len(set(sizes)) > 1 and mode not in ("crop", "pad"):
        found = ", ".join(f"{size} in {folder.path}" for folder, size in zip(folders, sizes, strict=True))
        raise UserError(
            f"vocabularies differ: {found}; choose vocabulary: crop (the rows of {folders[0].path}), pad (the longest) "
            f"or union (by token string)"
        )
    if mode == "crop" and min(sizes) < rows:
        short = folders[sizes.index(min(sizes))].path
        raise UserError(f"vocabulary: crop: {short} has {min(sizes)} rows, fewer than {rows}; choose pad or union")
    maps: list[np.ndarray | None] = [None] * len(folders)
    chosen = donor if donor is not None else sizes.index(rows) if mode == "pad" else 0
    if donor is None and mode is None:
        chosen = _widest(files, rows)
    if len(set(sizes)) > 1:
        maps = [np.where(np.arange(rows) < size, np.arange(rows), -1) for size in sizes]
        note = f"vocabulary: {mode} to the {rows} rows and the tokenizer of {folders[chosen].path}"
    elif mode == "position":
        note = f"vocabulary: rows by position, with the tokenizer of {folders[chosen].path}"
    own = files[chosen]
    if donor is not None and own is None:
        raise UserError(f"tokenizer_source: {folders[donor].path} has no tokenizer")
    if donor is not None and own is not None and max(own.strings, default=0) >= rows:
        last = max(own.strings)
        raise UserError(f"tokenizer_source: {own.folder}: its token {own.strings[last]!r} is id {last} of {rows} rows")
    return MergedVocabulary(rows, maps, chosen, note=note, files=files)


def _widest(files: Sequence[VocabularyFiles | None], rows: int) -> int:
    """The first folder that has every token for which any folder has a row; the first of all if there is none."""
    strings = [set[int]() if one is None else {i for i in one.strings if i < rows} for one in files]
    everything = set[int]().union(*strings)
    return next((place for place, own in enumerate(strings) if own == everything), 0)


def _check_same(
    folders: Sequence[HFFolder],
    files: Sequence[VocabularyFiles | None],
    mode: str | None,
    donor: int | None,
    has_base: bool,
) -> str:
    """Refuses rows at one position that belong to different tokens, or that nothing shows to belong to the same.

    If a tokenizer was asked for, the base may have other names for added tokens of the models; the note says so.
    """
    note = ""
    for j, second in enumerate(files):
        for i, first in enumerate(files[:j]):
            if folders[i].path == folders[j].path:
                continue
            if first is None or second is None:
                if mode is None:
                    bare = folders[i if first is None else j].path
                    raise UserError(
                        f"{bare}: no tokenizer's files there (tokenizer.json, vocab.json + merges.txt or "
                        f"tokenizer.model), so nothing shows that its rows are of the same tokens as those of "
                        f"{folders[j if first is None else i].path}; if they are, say vocabulary: position"
                    )
                continue
            found = difference(first, second, common_only=mode is not None)
            names = renamed(first, second) if found and donor is not None and has_base and i == 0 else None
            if names:
                ids = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
                note = f"vocabulary: rows by position; {folders[0].path} has other names for ids {ids}"
            elif found:
                raise UserError(
                    f"tokenizers differ: {found}; choose vocabulary: union (by token string), or position (the same "
                    f"rows, with the tokenizer of tokenizer_source)"
                )
    return note


def _union(folders: Sequence[HFFolder], sizes: list[int], files: Sequence[VocabularyFiles | None]) -> MergedVocabulary:
    known = []
    for folder, one in zip(folders, files, strict=True):
        if one is None or one.rest is None:
            raise UserError(f"{folder.path}: vocabulary: union needs a {TOKENIZER_FILE} there")
        known.append(one)
    ids = [one.ids for one in known]
    merged = dict(ids[0])
    following = max(merged.values(), default=-1) + 1
    added: list[dict[str, Any]] = []
    notes = []
    for one, own in zip(known[1:], ids[1:], strict=True):
        missing = sorted(own.keys() - merged.keys(), key=own.__getitem__)
        _check_ordinary(known[0], one, [token for token in missing if token not in one.added])
        for token in missing:
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            added.append(plain | one.added.get(token, {}) | {"id": following, "content": token})
            merged[token] = following
            following += 1
        if one.kind == known[0].kind and one.ranks != known[0].ranks:
            notes.append(f"; {one.folder} was trained on text that its own tokenizer cut otherwise")
    _check_cutting(known[0], added)
    rows = max(sizes[0], following)
    maps: list[np.ndarray | None] = []
    for place, (own, size) in enumerate(zip(ids, sizes, strict=True)):
        # The base's rows without a token (padding) are not changed.
        rows_of = np.where(np.arange(rows) < size, np.arange(rows), -1) if place == 0 else np.full(rows, -1)
        for token, row in merged.items():
            found = own.get(token, -1)
            rows_of[row] = found if found < size else -1
        maps.append(None if size == rows and np.array_equal(rows_of, np.arange(rows)) else rows_of)
    note = f"vocabulary: union of {rows} rows; {len(added)} tokens added to the tokenizer of {folders[0].path}"
    return MergedVocabulary(rows, maps, added=added, note=note + "".join(notes), files=list(files))


def _check_ordinary(base: VocabularyFiles, other: VocabularyFiles, tokens: Sequence[str]) -> None:
    """Refuses ordinary tokens that would change how the base cuts its text. They become added tokens, which are found
    before anything else is cut; only tokens of text for which the base has no token leave its cutting as it is."""
    unknown = None if base.rest is None else base.ids.get(str(base.rest.get("unk_token")))
    for token in tokens:
        if unknown is None or unknown not in base.encode(token):
            raise UserError(
                f"vocabulary: union: {other.folder} has {len(tokens)} ordinary tokens that {base.folder} lacks, the "
                f"first {token!r}: added to its tokenizer, they would cut its text otherwise; move "
                f"{other.folder} onto its tokenizer first (fusemega transplant)"
            )


def _check_cutting(base: VocabularyFiles, added: Sequence[dict[str, Any]]) -> None:
    """Checks that the base's tokenizer cuts the probes as before when it has the added tokens."""
    from tokenizers import AddedToken, Tokenizer

    if not added:
        return
    path = base.folder / TOKENIZER_FILE
    with tokenizer_errors(f"{path}: cannot tokenize"):
        extended = Tokenizer.from_file(str(path))
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        extended.add_tokens([AddedToken(entry["content"], **{key: entry[key] for key in flags}) for entry in added])
        for text in PROBES:
            if extended.encode(text, add_special_tokens=False).ids != base.encode(text):
                raise UserError(f"vocabulary: union: with the added tokens, {path} cuts the text {text!r} otherwise")


def extend_tokenizer(folder: Path, added: list[dict[str, Any]]) -> None:
    """Adds tokens to a folder's tokenizer.json, and to the list of them in its tokenizer_config.json if it has one."""
    if not added:
        return
    path = folder / TOKENIZER_FILE
    tokenizer = read_json(path, JSON_BYTES)
    tokenizer["added_tokens"] += added
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if "added_tokens_decoder" in config:
        for entry in added:
            config["added_tokens_decoder"][str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
        config_path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
