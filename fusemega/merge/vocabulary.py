"""Vocabularies of different length or meaning: which row of each model is which row of the merge.

`crop` keeps the base's rows and `pad` the longest model's, both by position; `union` goes by token string. A model
that lacks a row takes no part in it: it is given the base's row (a delta of zero), or, where the base lacks it too, the
mean of the models that have it, which then is the base's row as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.checkpoint.hf_folder import HFFolder
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.opening import require_regular
from fusemega.files.tokenizer_files import read_tokenizer_json

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the merged embedding and head.

    Attributes:
        rows: how many.
        maps: for each folder, its own row for each row of the merge, -1 where it has none; None: the same rows.
        donor: the folder whose tokenizer, template and token ids the merge carries.
        added: entries that the donor's tokenizer gets, in the order of their ids.
        note: what was done, for the user; empty where nothing had to be.
    """

    rows: int
    maps: list[np.ndarray | None]
    donor: int = 0
    added: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


def plan_vocabulary(folders: Sequence[HFFolder], mode: str | None) -> Vocabulary:
    """The rows of a merge of `folders`, of which the first is the base.

    Raises:
        UserError: the vocabularies differ and no mode, or one that does not fit, was chosen.
    """
    sizes = [int(folder.config["vocab_size"]) for folder in folders]
    if mode == "union":
        return _union(folders, sizes)
    _check_strings(folders)
    rows = max(sizes) if mode == "pad" else sizes[0]
    if len(set(sizes)) == 1:
        return Vocabulary(rows, [None] * len(folders))
    found = ", ".join(f"{size} in {folder.path}" for folder, size in zip(folders, sizes, strict=True))
    if mode is None:
        raise UserError(
            f"vocabularies differ: {found}; choose vocabulary: crop (the rows of {folders[0].path}), pad (the longest) "
            f"or union (by token string)"
        )
    if mode == "crop" and min(sizes) < rows:
        short = folders[sizes.index(min(sizes))].path
        raise UserError(f"vocabulary: crop: {short} has {min(sizes)} rows, fewer than {rows}; choose pad or union")
    maps = [np.where(np.arange(rows) < size, np.arange(rows), -1) for size in sizes]
    donor = sizes.index(rows)
    note = f"vocabulary: {mode} to the {rows} rows and the tokenizer of {folders[donor].path}"
    return Vocabulary(rows, list(maps), donor, note=note)


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    require_regular(folder / TOKENIZER_FILE)
    whole = read_tokenizer_json(folder)
    return whole | {"added_tokens": whole.get("added_tokens") or []}


def token_ids(folder: Path) -> dict[str, int]:
    """Token string -> id, with added tokens.

    Raises:
        UserError: no tokenizer.json, or not of that form.
    """
    path = folder / TOKENIZER_FILE
    tokenizer = _tokenizer_json(folder)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return ids | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a tokenizer file with a vocabulary") from None


def _check_strings(folders: Sequence[HFFolder]) -> None:
    """Refuses ids that mean different tokens; folders without a tokenizer.json cannot be checked."""
    files = [folder.path / TOKENIZER_FILE for folder in folders]
    if not files[0].is_file():
        return
    first = files[0].read_bytes()
    strings: dict[int, str] = {}
    for folder, file in zip(folders[1:], files[1:], strict=True):
        if not file.is_file() or file.read_bytes() == first:
            continue
        strings = strings or {id_: token for token, id_ in token_ids(folders[0].path).items()}
        for token, id_ in token_ids(folder.path).items():
            if strings.get(id_, token) != token:
                raise UserError(
                    f"tokenizers differ: id {id_} is {strings[id_]!r} in {folders[0].path} and {token!r} in "
                    f"{folder.path}; choose vocabulary: union"
                )


def _union(folders: Sequence[HFFolder], sizes: list[int]) -> Vocabulary:
    ids = [token_ids(folder.path) for folder in folders]
    merged = dict(ids[0])
    following = max(merged.values(), default=-1) + 1
    added = []
    for folder, own in zip(folders[1:], ids[1:], strict=True):
        entries = {entry["content"]: entry for entry in _tokenizer_json(folder.path)["added_tokens"]}
        for token in sorted(own.keys() - merged.keys(), key=own.__getitem__):
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            added.append(plain | entries.get(token, {}) | {"id": following, "content": token})
            merged[token] = following
            following += 1
    rows = max(sizes[0], following)
    maps: list[np.ndarray | None] = []
    for place, (own, size) in enumerate(zip(ids, sizes, strict=True)):
        # The base's rows without a token (padding) stay what they are.
        rows_of = np.where(np.arange(rows) < size, np.arange(rows), -1) if place == 0 else np.full(rows, -1)
        for token, row in merged.items():
            found = own.get(token, -1)
            rows_of[row] = found if found < size else -1
        maps.append(None if size == rows and np.array_equal(rows_of, np.arange(rows)) else rows_of)
    note = f"vocabulary: union of {rows} rows; {len(added)} tokens added to the tokenizer of {folders[0].path}"
    return Vocabulary(rows, maps, added=added, note=note)


def extend_tokenizer(folder: Path, added: list[dict[str, Any]]) -> None:
    """Adds tokens to a folder's tokenizer.json, and to the list of them in its tokenizer_config.json if it has one."""
    if not added:
        return
    path = folder / TOKENIZER_FILE
    tokenizer = read_json(path)
    tokenizer["added_tokens"] += added
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if "added_tokens_decoder" in config:
        for entry in added:
            config["added_tokens_decoder"][str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
        config_path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
