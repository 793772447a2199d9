"""Moves a model to another vocabulary: new rows for embedding and head, everything else bit for bit.

A vocabulary map from the new vocabulary to the old one gives each new token's row: that of the old token with the same
content. A token without a counterpart gets the mean of the old rows of the pieces into which the old tokenizer cuts its
content (FVT: Gee et al. 2022, Fast Vocabulary Transfer for Language Model Compression). A token without pieces (unused
ids, special tokens without a counterpart) gets the mean of all the old tokenizer's rows (Hewitt 2021). So does a byte
token whose byte another token has (`<0x41>` beside `A`): no text is tokenized to it, and with that token's row it would
take half of that token's probability. Means are computed in fp32 and rounded once.

Shape suffixes: N new ids, V old ids, H hidden size, C pieces of a token; a map's S are the new ids.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusemega.align.make_map import exact_map, ids_by_content
from fusemega.align.pieces import cutter
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from fusemega.files.boxes import whole
from fusemega.files.integrity import write_integrity
from fusemega.files.json_files import read_json
from fusemega.files.output import new_folder, refuse_existing
from fusemega.hf.check import check_copies, check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.loadable import settle
from fusemega.hf.proof import check_written
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, plan_shards, write_file, write_index
from fusemega.hf.side_files import copy_side_files, write_config
from fusemega.models.rules import VocabRows
from fusemega.runtime.console import say
from fusemega.runtime.meter import meter
from fusemega.text.tokenizer import Tokenizer

RECORD = "transplant.json"
GENERATION = "generation_config.json"
# Kinds of maps whose ids are no counterpart of a token, and why.
_NO_ROWS = {
    "first_piece": "are only the beginnings of new tokens",
    "cells": "stand for sets of tokens",
}
_ROWS_EACH = 1 << 12  # rows averaged together
# Generation settings that hold ids of the old vocabulary (beside `*_token_id`, of which three are known here).
_ID_SETTINGS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids")


@dataclass(frozen=True)
class RowPlan:
    """Which old rows each new row is made of.

    Attributes:
        copied_N: int64, the old row that is copied; -1 where another rule applies.
        pieces: new id -> old ids, in the order of the text; a piece that stands twice counts twice.
    """

    copied_N: np.ndarray
    pieces: dict[int, list[int]]

    def counts(self) -> dict[str, int]:
        """How many new ids are copied, averaged over pieces, and given the mean of all."""
        copied = int((self.copied_N >= 0).sum())
        return {"copied": copied, "averaged": len(self.pieces), "mean": len(self.copied_N) - copied - len(self.pieces)}


def plan_rows(table_N: np.ndarray, new: Vocabulary, cut: Callable[[bytes], list[int]]) -> RowPlan:
    """Plans which old rows each new id takes.

    Args:
        table_N: int, the old id of each new id, -1 where it has none.
        cut: the pieces of a content, as old ids; see `cutter`.
    """
    own = ids_by_content(new)
    unseen = [i for i in new.byte_tokens if own[new.contents[i] or b""] != i]
    copied_N = table_N.astype(np.int64)
    copied_N[unseen] = -1
    missing = set(np.flatnonzero(copied_N < 0).tolist()).difference(unseen)
    pieces = {i: cut(content) for i in sorted(missing) if (content := new.contents[i]) is not None}
    return RowPlan(copied_N, {i: found for i, found in pieces.items() if found})


def move_rows(old_VH: torch.Tensor, plan: RowPlan, num_old: int) -> torch.Tensor:
    """The new rows [N, H] in the old ones' dtype.

    Args:
        old_VH: of any float dtype.
        num_old: number of ids of the old tokenizer; later rows are padding, and not part of the mean of all.
    """
    wide = torch.promote_types(old_VH.dtype, torch.float32)
    new_NH = old_VH[:num_old].mean(0, dtype=wide).to(old_VH.dtype).repeat(len(plan.copied_N), 1)
    copied = np.flatnonzero(plan.copied_N >= 0)
    new_NH[copied] = old_VH[plan.copied_N[copied]]
    # Tokens with equally many pieces are averaged together: their old rows are one rectangular tensor.
    by_count: dict[int, list[int]] = defaultdict(list)
    for i, pieces in plan.pieces.items():
        by_count[len(pieces)].append(i)
    for ids in by_count.values():
        for at in range(0, len(ids), _ROWS_EACH):
            some = ids[at : at + _ROWS_EACH]
            pieces_NC = torch.tensor([plan.pieces[i] for i in some])
            new_NH[some] = old_VH[pieces_NC].to(wide).mean(1).to(old_VH.dtype)
    return new_NH


def transplant(model: Path, out: Path, tokenizer_folder: Path, map_file: Path | None = None) -> dict[str, Any]:
    """Writes the model of a Hugging Face folder with the vocabulary, tokenizer and chat template of another folder.

    Holds the old and the new embedding in memory, otherwise one tensor at a time.

    Args:
        map_file: a vocabulary map from the new tokenizer to the model's; None: the exact one, made here.

    Returns:
        What was done: the content of `transplant.json` in the new folder.

    Raises:
        UserError: `out` is not empty, a damaged source, a map of other vocabularies; before anything is written.
    """
    refuse_existing(out)
    source = HFFolder(model)
    check_tensors(source)
    check_written(source)
    check_copies(source)
    old_tokenizer, new_tokenizer = Tokenizer.load(model), Tokenizer.load(tokenizer_folder)
    old, new = Vocabulary.of(old_tokenizer), Vocabulary.of(new_tokenizer)
    chosen = exact_map(new, old) if map_file is None else _load_map(map_file, new, old)
    # A token that was added to the old tokenizer alone has no row in the model.
    num_old = min(old.size, int(source.config["vocab_size"]))
    table_N = _with_pad_and_unk(chosen.table_S, new_tokenizer, old_tokenizer)
    table_N[table_N >= num_old] = -1
    cut = cutter(old_tokenizer, old)
    plan = plan_rows(table_N, new, lambda content: [i for i in cut(content) if i < num_old])
    config, dropped = _with_ids(source.config, new, new_tokenizer.hf.pad_token_id, [new.eos_id])
    config["vocab_size"] = new.size
    generation: dict[str, Any] = {}
    also: list[str] = []
    if (source.path / GENERATION).is_file():
        ends = [new.eos_id, new.closing_id]
        generation, also = _with_ids(read_json(source.path / GENERATION), new, new_tokenizer.hf.pad_token_id, ends)
    record = {
        "model": str(model),
        "tokenizer": new.content_hash,
        "map": chosen.kind,
        "ids": new.size,
        **plan.counts(),
        "dropped_settings": sorted({*dropped, *also}),
    }
    files = {GENERATION: generation, RECORD: record}
    _write(source, out, tokenizer_folder, plan, num_old, config, files)
    return record


def _load_map(path: Path, new: Vocabulary, old: Vocabulary) -> VocabularyMap:
    loaded = VocabularyMap.load(path)
    if (loaded.source, loaded.target) != (new.content_hash, old.content_hash):
        turned = (loaded.source, loaded.target) == (old.content_hash, new.content_hash)
        raise UserError(
            f"{path}: maps {'in the other direction' if turned else 'other vocabularies'}; "
            f"a transplant needs a map whose source is {new.source} and whose target is {old.source}"
        )
    why = _NO_ROWS.get(loaded.kind)
    if why is not None:
        raise UserError(
            f"{path}: of kind {loaded.kind}, whose old ids {why}; make it with `fusemega align --kind exact`, or leave "
            "it out"
        )
    return loaded


def _with_pad_and_unk(table_N: np.ndarray, new: Tokenizer, old: Tokenizer) -> np.ndarray:
    """A copy of the map's table in which these two roles have their counterparts too; it has bos, eos and the closing
    token."""
    table_N = table_N.astype(np.int64)
    for role in ("pad_token_id", "unk_token_id"):
        here, there = getattr(new.hf, role), getattr(old.hf, role)
        if here is not None and there is not None and table_N[here] < 0:
            table_N[here] = there
    return table_N


def _with_ids(
    settings: Mapping[str, Any], new: Vocabulary, pad_id: int | None, ends: list[int | None]
) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the new vocabulary's ids, and the settings left out because they hold ids of the old one."""
    eos = [i for i in dict.fromkeys(ends) if i is not None]
    ids = {
        "bos_token_id": new.bos_id,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": pad_id,
    } | ({"unk_token_id": new.unk_id} if "unk_token_id" in settings else {})
    foreign = [key for key in settings if key not in ids and (key.endswith("_token_id") or key in _ID_SETTINGS)]
    kept = {key: value for key, value in settings.items() if key not in foreign}
    return kept | ids, [key for key in foreign if settings[key] is not None]


def _write(
    source: HFFolder,
    out: Path,
    tokenizer_folder: Path,
    plan: RowPlan,
    num_old: int,
    config: dict[str, Any],
    files: Mapping[str, dict[str, Any]],
) -> None:
    rules = source.architecture.rules()
    by_rows = {name for rule in rules if isinstance(rule, VocabRows) for name in rule.hf_shapes()}
    # The head of a tied model is left out: the configuration says that it is tied.
    copies = source.architecture.copies()
    infos = []
    for name in source:
        shape = source.shape(name)
        shape = (len(plan.copied_N), *shape[1:]) if name in by_rows else shape
        infos += [] if name in copies else [TensorInfo(name, source.dtype(name), shape)]
    needed = sum(info.nbytes for info in infos)

    def values(shard: list[TensorInfo], done: Callable[[int], None]) -> Iterator[torch.Tensor]:
        for info in shard:
            value = source.read(info.name, whole(source.shape(info.name)))
            yield move_rows(value, plan, num_old) if info.name in by_rows else value
            done(info.nbytes)

    with new_folder(out, needed) as temporary, meter("transplanting", needed) as progress:
        shards = plan_shards(infos, MAX_SHARD_SIZE)
        for file, shard in shards.items():
            write_file(temporary / file, shard, values(shard, progress.add))
        write_index(temporary, shards)
        copy_side_files(tokenizer_folder, temporary)
        (temporary / GENERATION).unlink(missing_ok=True)  # that of the tokenizer's folder; the model's is written below
        write_config(temporary, config)
        for name, content in files.items():
            if content:
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for note in settle(temporary, tokenizer_folder, chats=True):
            say(note)
        made = HFFolder(temporary)
        check_tensors(made)
        write_integrity(temporary)
