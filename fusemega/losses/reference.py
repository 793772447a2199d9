"""The reference of an objective: a frozen model's log-probability of each sequence, from a store or in the job.

log pi_ref(y | x) is a constant of the data. `fusemega teach` with `rows: none` computes it once, for any number of runs
in any layout, and the run then holds one model. `in_job` keeps the reference as a second, frozen model instead, which
runs over each micro-batch first.

Shape suffixes: S sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fusemega.checkpoint.open_model import ModelConfig, weights_hash
from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.passes.frozen import Request
from fusemega.passes.micro_batch import MicroBatch
from fusemega.store import Store
from fusemega.store.missing import why_missing
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer

NAME = "reference"
_FIELD = "reference_logp"


class ReferenceSettings(Section):
    """`reference:` of an objective: exactly one of `store` and `in_job`."""

    store: str | None = Field(
        None, description="sample store of the reference, written by `fusemega teach` (with `rows: none`, or any other)"
    )
    in_job: ModelConfig | None = Field(
        None, description="the reference itself, a second model that runs in the same layout; without fp8"
    )
    same_model: bool = Field(
        True,
        description="training starts from the reference: before the first update the model's log-probabilities have "
        "to be the reference's; false: it starts from another model, and nothing is compared",
    )

    @field_validator("in_job")
    @classmethod
    def _no_fp8(cls, model: ModelConfig | None) -> ModelConfig | None:
        if model is not None and model.fp8 is not None:
            raise ValueError("fp8 is for the model in training; a reference runs in bf16 or fp32")
        return model

    @model_validator(mode="after")
    def _one_of_both(self) -> ReferenceSettings:
        """Exactly one of store and in_job is given."""
        if (self.store is None) == (self.in_job is None):
            raise ValueError("give exactly one of store and in_job")
        return self


class Reference:
    """An objective's reference, opened and checked.

    An objective adds `fields` to its `sequence_fields`, has `frozen` among its `frozen`, calls `check` from
    `check_data`, and takes `logp` in its loss. It keeps the reference in its attribute `reference`, where the trainer
    finds it.

    Args:
        settings: the section.
        tokenizer: that of the model in training.
        where: the section's key, for messages.

    Attributes:
        settings, where: as given.
        frozen: the frozen models to ask, for `Objective.frozen`; empty for a store.

    Raises:
        UserError: no store there; one of another tokenizer, template or mask, or in another vocabulary.
    """

    def __init__(self, settings: ReferenceSettings, tokenizer: Tokenizer, where: str = "objective.reference") -> None:
        self.settings, self.where = settings, where
        self.frozen: Mapping[str, Request] = {}
        self._store: Store | None = None
        if settings.in_job is not None:
            self.frozen = {NAME: Request(settings.in_job, "logp")}
        elif settings.store is not None:
            self._store = store = Store.open(settings.store)
            if store.manifest.projected is not None:
                raise UserError(
                    f"{where}.store: {store.path} was made by `fusemega project`: its log-probabilities are of another "
                    "tokenizer's tokens; run `fusemega teach` with the reference"
                )
            store.check(
                {
                    "mask_policy": MASK_POLICY,
                    "tokenizer": tokenizer.content_hash,
                    "template": tokenizer.template_hash,
                }
            )

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        """Content in place of the section's paths, for `Objective.identity`: of a store the log-probabilities of the
        samples, of a model its weights and precision."""
        if self._store is not None:
            return {"store": f"{self._store.manifest.hash.hex()}-{self._store.rows_hash(dataset.keys)}"}
        assert self.settings.in_job is not None
        precision = self.settings.in_job.model_dump(mode="json", exclude={"load", "trust_remote_code"})
        return {"in_job": {"weights": weights_hash(self.settings.in_job.load), **precision}}

    def check(self, dataset: TokenizedDataset) -> None:
        """Refuses data of which the store lacks a sample, or has it as other tokens.

        Raises:
            UserError: names the first such row.
        """
        if self._store is None:
            return
        for i, key in enumerate(dataset.keys):
            if key not in self._store:
                reason = why_missing(self._store, dataset, i)
                raise UserError(f"{dataset[i].source}: no row in {self.where}.store {self._store.path}: {reason}")
            self._logp(dataset[i])

    def fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """What the reference adds to `Objective.sequence_fields`: of a store the float64 scalar, else nothing.

        Raises:
            UserError: as `check`.
        """
        return {} if self._store is None else {_FIELD: np.array(self._logp(sample), dtype=np.float64)}

    def logp(self, batch: MicroBatch) -> Tensor:
        """[S]: the reference's log-probability of each sequence's supervised tokens, summed; without gradient.

        Float64 from a store, else of the reference's own output (fp32 or wider).
        """
        found = batch.sequence_fields[_FIELD] if self._store is not None else batch.answers[NAME]
        assert isinstance(found, Tensor)
        return found

    def _logp(self, sample: Sample) -> float:
        assert self._store is not None
        entry = self._store.entry(sample.key)
        where = f"{sample.source}: the row in {self.where}.store {self._store.path}"
        if entry is None:
            raise UserError(f"{sample.source}: no row in {self.where}.store {self._store.path}")
        if entry["ids_hash"].tobytes() != sample.ids_hash:
            raise UserError(f"{where} has other token ids")
        if (found := int(entry["positions"])) != len(sample.positions):
            raise UserError(f"{where} has {found} positions, the sample {len(sample.positions)} supervised tokens")
        return float(entry["sum_logp"])
