"""One teacher: an open sample store, whose rows are converted to targets with the target model's ids.

Shape suffixes: P supervised positions of a sample, K ids of a row, M positions at which both tokenizations end a token,
S ids of the teacher's tokenizer, V ids of the target's vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from fusemega.align.position_kinds import TARGET_LONGER, position_kinds
from fusemega.align.positions import shared_positions
from fusemega.align.projection import project
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from fusemega.fusion.targets import Tail, Targets, TextEnd, renormalised, text_ends
from fusemega.fusion.teacher_rows import TeacherRows, TeacherRowsConfig
from fusemega.store import Row, Store
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import BEGINS, OF_TEXT, Sample
from fusemega.text.tokenizer import SPACES, Tokenizer


class TeacherStoreConfig(TeacherRowsConfig):
    """A teacher's store, and the map to the target's ids."""

    map: str | None = Field(
        None,
        description="vocabulary map from `fusemega align`; default: none, the store has the target's own tokenizer",
    )
    consistent: bool = Field(
        False,
        description="treat a position at which the target's next token ends after the teacher's next token as "
        "unaligned; only with a map",
    )


class TeacherStore(TeacherRows):
    """An open store whose rows become `Targets`.

    Args:
        config: the store's section of the run file.
        where: the config's key, for messages.
        tokenizer: the target's.
        vocab_size: the target's. Models of one tokenizer may pad their vocabularies differently: a teacher with more
            rows is welcome as long as no row lists an id that the target lacks.
        temperature: the temperature of the targets.
        tail: the mass outside the listed ids: kept as one more outcome, or shared out over the listed ids.
        text_end: what teaches the position before the eos of a plain text: `label` leaves it without a target.

    Attributes:
        vocab_size, where: as given.
        map_file: the path of the map, as given; None without one.

    Raises:
        UserError: no store or map there; a store of another tokenizer, template, mask or model; a map of other
            tokenizers; `tail: residual` or a store of draws at another temperature than the store's.
    """

    def __init__(
        self,
        config: TeacherStoreConfig,
        where: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        temperature: float,
        tail: Tail,
        text_end: TextEnd = "row",
    ) -> None:
        super().__init__(config, where)
        self.vocab_size, self.where, self.map_file = vocab_size, where, config.map
        self._temperature, self._tail = temperature, tail
        self._eos_id = tokenizer.eos_id if text_end == "label" else None
        if config.consistent and config.map is None:
            raise UserError(
                f"{where}.consistent: no effect without {where}.map, because a teacher with the target's tokenizer has "
                "the same next token; leave it out"
            )
        self._map = None
        if config.map is not None:
            self._map = _Map(config.map, self.store, tokenizer, vocab_size, config.consistent)
        else:
            self.store.check({"tokenizer": tokenizer.content_hash, "template": tokenizer.template_hash})
        self.check_temperature(temperature, tail)

    def identity(self, dataset: TokenizedDataset) -> dict[str, str | None]:
        """See `TeacherRows.identity`."""
        return super().identity(dataset) | {"map": None if self._map is None else self._map.content_hash}

    @property
    def cell_V(self) -> np.ndarray | None:
        """int64 [V]: for each id the one that stands for its cell in `targets`; None: each is a cell of its own."""
        return None if self._map is None else self._map.cell_V

    @property
    def map_kind(self) -> str | None:
        """How the map was made; None without one."""
        return None if self._map is None else self._map.kind

    def targets(self, row: Row, sample: Sample) -> Targets:
        """Converts the store's row of this very sample to the target's ids.

        With a map, a position is taught where both tokenizations have a token that ends at its byte. If the map has
        cells, the ids are those that stand for cells (`cell_V`); the number of this partition is left to the caller.

        Raises:
            UserError: a row of another tokenization or mask, or with ids beyond the target's vocabulary.
        """
        logp_PK = row.logp_PK.astype(np.float64)
        if self._tail == "renormalise":
            # log p at the new temperature, up to a constant that `renormalised` takes away.
            logp_PK *= self.store.manifest.temperature / self._temperature
        if self._map is not None:
            targets = self._map.targets(row, logp_PK, sample)
        else:
            self._check_tokens(row, sample)
            ids_PK, mask_P = row.ids_PK.astype(np.int64), np.ones(row.num_tokens, dtype=bool)
            targets = Targets(ids_PK, logp_PK.astype(np.float32), row.log_residual_P, mask_P)
        largest = targets.ids_PK.max(initial=-1)
        if largest >= self.vocab_size:
            raise UserError(
                f"{sample.source}: the row in the store {self.store.path} lists id {largest}, and the model in "
                f"training has a vocabulary of {self.vocab_size}"
            )
        if self._eos_id is not None:
            targets = replace(targets, mask_P=targets.mask_P & ~text_ends(sample, self._eos_id))
        return renormalised(targets) if self._tail == "renormalise" else targets

    def check_data(self, dataset: TokenizedDataset, required: bool) -> None:
        """As `TeacherRows.check_rows`, of rows that become targets."""
        self.check_rows(dataset, required, self.targets)

    def _check_tokens(self, row: Row, sample: Sample) -> None:
        if row.ids_hash != sample.ids_hash:
            raise UserError(f"{sample.source}: the row in the store {self.store.path} has other token ids")
        if row.num_tokens != len(sample.positions):
            raise UserError(
                f"{sample.source}: the row in the store {self.store.path} has {row.num_tokens} positions, "
                f"the sample {len(sample.positions)} supervised tokens"
            )


class _Map:
    """A vocabulary map at work: rows of one tokenizer's store for samples of another tokenizer."""

    def __init__(self, path: str, store: Store, tokenizer: Tokenizer, vocab_size: int, consistent: bool) -> None:
        self._consistent = consistent
        self._map = loaded = VocabularyMap.load(Path(path))
        self.content_hash, self.kind = loaded.content_hash, loaded.kind
        scorer = store.manifest.tokenizer, f"that of the store {store.path}"
        ours = tokenizer.content_hash, tokenizer.source
        loaded.check(path, scorer, ours, target_ids=tokenizer.num_ids)
        tables = np.stack([loaded.table_S, loaded.marked_S, loaded.unmarked_S])
        self.cell_V: np.ndarray | None = None
        if len(loaded.cell_T):
            # Ids that only the model has are cells of their own, ids that it lacks are in none.
            self.cell_V = np.arange(vocab_size)
            inside = min(vocab_size, len(loaded.cell_T))
            self.cell_V[:inside] = loaded.cell_T[:inside]
        largest = max(tables.max(initial=-1), -1 if self.cell_V is None else self.cell_V.max(initial=-1))
        if largest >= vocab_size:
            raise UserError(
                f"{path}: the map contains id {largest}, and the model in training has a vocabulary of {vocab_size}"
            )
        # A model may have more rows than its tokenizer has ids; those map to no id (-1).
        spare = max(0, store.manifest.vocab_size - loaded.source_size)
        self._chat_tables = np.pad(tables, ((0, 0), (0, spare)), constant_values=-1)
        # At the end of a plain text eos becomes eos, even if the source also closes turns with it.
        self._text_tables = self._chat_tables.copy()
        if loaded.source_eos >= 0 and loaded.target_eos < vocab_size:
            eos = loaded.target_eos
            self._text_tables[:, loaded.source_eos] = eos if self.cell_V is None or eos < 0 else self.cell_V[eos]
        self._tokenizer = tokenizer

    def targets(self, row: Row, logp_PK: np.ndarray, sample: Sample) -> Targets:
        """Targets where a position of the row and one of the sample end at the same byte; nothing elsewhere."""
        positions_P = sample.positions
        source_M, target_M = shared_positions(row.end_bytes, sample.end_bytes[positions_P])
        of_text = bool(sample.is_place(OF_TEXT).any())
        choice_M = np.zeros(len(target_M), dtype=np.int64)
        for m in np.flatnonzero(sample.is_place(BEGINS)[positions_P[target_M]]):
            choice_M[m] = self._first_table(sample, int(positions_P[target_M[m]]), of_text)
        ids_MK, logp_MK, log_residual_M = project(
            row.ids_PK[source_M],
            logp_PK[source_M],
            row.log_residual_P[source_M],
            self._text_tables if of_text else self._chat_tables,
            choice_M,
        )
        targets = Targets.nothing(len(positions_P), row.ids_PK.shape[1])
        targets.ids_PK[target_M], targets.logp_PK[target_M] = ids_MK, logp_MK
        targets.log_residual_P[target_M] = log_residual_M
        targets.mask_P[target_M] = (ids_MK >= 0).any(1)
        kind_M = position_kinds(row.end_bytes, source_M, sample, target_M)
        if self._consistent:
            targets.mask_P[target_M[kind_M == TARGET_LONGER]] = False
        kind_P = np.full(len(positions_P), -1, dtype=np.int8)
        kind_P[target_M] = kind_M
        return replace(targets, kind_P=kind_P)

    def _first_table(self, sample: Sample, position: int, of_text: bool) -> int:
        """Which table a content's first token takes: 1 from "Hello" to "▁Hello", 2 the other way, 0 neither.

        The target's own token says whether it carries a space that is not in the content. For the source only its
        habit is known, and that it adds no space before a content that begins with one.
        """
        loaded, label = self._map, int(sample.ids[position + 1])
        adds = loaded.target_marks_text if of_text else loaded.target_marks_start
        theirs = loaded.source_marks_text if of_text else loaded.source_marks_start
        width = int(self._tokenizer.token_num_bytes[label])
        end, before = int(sample.end_bytes[position + 1]), int(sample.end_bytes[position])
        if width and end >= 0:
            form = self._tokenizer.token(label)
            adds = width == end - before + 1 and form.startswith(SPACES)
            theirs = theirs and not form[int(adds) :].startswith(SPACES)
        return 0 if adds == theirs else 1 if adds else 2
