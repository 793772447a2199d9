"""One teacher: an open sample store whose rows become targets.

Shapes: P supervised positions of a sample, K ids of a row.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusemega.checkpoint.open_model import weights_hash
from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.fusion.targets import Tail, Targets, renormalised
from fusemega.runtime.console import global_rank
from fusemega.store import Row, Store
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class TeacherConfig(Section):
    """A store of rows, and how its ids become the target's."""

    store: str = Field(description="folder of a sample store, written by `fusemega teach`")
    teacher: str | None = Field(
        None, description="the model that the store must be of, a folder or hub id; reads all its weights once"
    )


class Teacher:
    """An open store whose rows become `Targets`.

    Args:
        config: of the run file.
        where: the config's key, for messages.
        tokenizer: the target's.
        vocab_size: the target's. Models of one tokenizer may pad their vocabularies differently: a teacher with more
            rows is welcome as long as no row lists an id that the target lacks.
        temperature: at which the targets are wanted.
        tail: the mass outside the listed ids: kept as one more outcome, or shared out over the listed ids.

    Raises:
        UserError: no store or map there; a store of another tokenizer, template, mask or model; a map of other
            tokenizers; `tail: residual` or a store of draws at another temperature than the store's.
    """

    def __init__(
        self, config: TeacherConfig, where: str, tokenizer: Tokenizer, vocab_size: int, temperature: float, tail: Tail
    ) -> None:
        self.store = Store.open(config.store)
        self._vocab_size, self._temperature, self._tail = vocab_size, temperature, tail
        manifest = self.store.manifest
        hashes = {"tokenizer": tokenizer.content_hash, "template": tokenizer.template_hash}
        self.store.check(hashes | {"mask_policy": MASK_POLICY})
        sampled = manifest.rows == "sampled"
        if (sampled or tail == "residual") and temperature != manifest.temperature:
            why = "its rows are draws at that one" if sampled else "with tail: residual they must be equal"
            remedy = "" if sampled else " (or use tail: renormalise)"
            raise UserError(
                f"objective.temperature: found {temperature}, and {self.store.path} was stored at "
                f"{manifest.temperature}; {why}{remedy}"
            )
        # One rank reads the weights for all: where it refuses, the launch ends.
        if config.teacher is not None and global_rank() == 0:
            found = weights_hash(config.teacher)
            if found != manifest.weights:
                raise UserError(
                    f"{where}.teacher: {self.store.path} holds rows of other weights than {config.teacher} "
                    f"(store {manifest.weights[:12]}, model {found[:12]})"
                )

    @property
    def k(self) -> int:
        """Most ids that a position lists."""
        return self.store.manifest.entries

    def row(self, sample: Sample, required: bool) -> Row | None:
        """The store's row of a sample.

        Raises:
            UserError: there is none, and it is required.
        """
        row = self.store.get(sample.key)
        if row is None and required:
            raise UserError(self._no_row(sample))
        return row

    def targets(self, row: Row, sample: Sample) -> Targets:
        """The store's row of this very sample, in the target's ids.

        Raises:
            UserError: a row of another tokenization or mask, or with ids beyond the target's vocabulary.
        """
        if row.ids_hash != sample.ids_hash:
            raise UserError(f"{sample.source}: the row in the store {self.store.path} is of other token ids")
        if row.num_tokens != len(sample.positions):
            raise UserError(
                f"{sample.source}: the row in the store {self.store.path} has {row.num_tokens} positions, "
                f"the sample {len(sample.positions)} supervised tokens"
            )
        ids_PK, logp_PK = row.ids_PK.astype(np.int64), row.logp_PK
        if ids_PK.max(initial=-1) >= self._vocab_size:
            raise UserError(
                f"{sample.source}: the row in the store {self.store.path} lists id {ids_PK.max()}, and the model in "
                f"training has a vocabulary of {self._vocab_size}"
            )
        mask_P = np.ones(row.num_tokens, dtype=bool)
        if self._tail == "residual":
            return Targets(ids_PK, logp_PK, row.log_residual_P, mask_P)
        logp_PK = logp_PK.astype(np.float64) * (self.store.manifest.temperature / self._temperature)
        return renormalised(Targets(ids_PK, logp_PK, row.log_residual_P, mask_P))

    def check_data(self, dataset: TokenizedDataset, required: bool) -> None:
        """Reads the first sample's row, and looks for the rows of all.

        Raises:
            UserError: that row does not fit, or some sample has none and rows are required.
        """
        row = self.row(dataset[0], required)
        if row is not None:
            self.targets(row, dataset[0])
        if required:
            for sample in dataset:
                if sample.key not in self.store:
                    raise UserError(self._no_row(sample))

    def _no_row(self, sample: Sample) -> str:
        """What to say of a sample that the store lacks."""
        return (
            f"{sample.source}: no row in the store {self.store.path} (allowed with on_missing: skip); "
            "it was written from other data, or with another seq_length"
        )
