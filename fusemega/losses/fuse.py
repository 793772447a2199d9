"""Distribution fusion: several teachers' stored rows become one target for each position; the loss is that of
`distill`.

    P_t = fusion(P_1t, ..., P_Jt)        L as in `fusemega.losses.distill` with p_t = P_t

FuseLLM (arXiv:2401.10491) and FuseChat (arXiv:2402.16107). The target's own initial distribution can be one of the
teachers: a store that `fusemega teach` wrote with the model that training starts from. The teachers' weights are
computed from numbers in the stores, outside the training step.

A mixture of teachers whose maps have different cells is one over the finest cells that are unions of each teacher's;
with `min_ce`, a sample has the cells of its teacher.

Shape suffixes: J teachers, P supervised positions of a sample, V ids of the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from fusemega.config import Section
from fusemega.fusion.evidence import warn_of_bad_rows
from fusemega.fusion.functions import FUNCTIONS, rewards
from fusemega.fusion.partitions import Partitions, coarsened, joined
from fusemega.fusion.targets import Targets
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.losses.distill import Taught, TaughtSettings
from fusemega.losses.registry import register

if TYPE_CHECKING:
    from fusemega.store import Row
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer


class FusionConfig(Section):
    """How several teachers' distributions are combined."""

    function: Literal["min_ce", "avg_ce", "blend"] = Field(
        "min_ce",
        description="min_ce: the teacher with the smallest cross-entropy on the sample; avg_ce: a mixture "
        "weighted by cross-entropy; blend: a mixture weighted by the probability of the label",
    )
    ce_per: Literal["byte", "token"] = Field(
        "byte",
        description="unit of the cross-entropies of min_ce and avg_ce; token (FuseLLM) favours tokenizers with "
        "shorter tokens",
    )
    decide_in: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision in which cross-entropies are compared; bf16 in FuseLLM and FuseChat"
    )

    @model_validator(mode="after")
    def _settings_act(self) -> FusionConfig:
        """blend does not compare cross-entropies, so ce_per and decide_in are refused."""
        if self.function == "blend" and (idle := sorted(self.model_fields_set - {"function"})):
            raise ValueError(f"{idle[0]} has no effect on blend, which compares no cross-entropies; leave it out")
        return self


@register("fuse")
class Fuse(Taught):
    """The stored rows of several teachers, combined.

    Args:
        settings: as in the run file.
        teachers: the open stores, in the order of `settings.teachers`.
    """

    class Settings(TaughtSettings):
        name: Literal["fuse"] = "fuse"
        teachers: list[TeacherStoreConfig] = Field(
            min_length=1, description="teacher stores; ties go to the first listed"
        )
        fusion: FusionConfig = FusionConfig()

        @field_validator("teachers")
        @classmethod
        def _stores_differ(cls, teachers: list[TeacherStoreConfig]) -> list[TeacherStoreConfig]:
            stores = [teacher.store for teacher in teachers]
            for store in stores:
                if stores.count(store) > 1:
                    raise ValueError(f"the store {store} is given twice")
            return teachers

    def __init__(self, settings: Fuse.Settings, teachers: list[TeacherStore]) -> None:
        ks, vocab_size = [teacher.k for teacher in teachers], teachers[0].vocab_size
        cells = [teacher.cell_V for teacher in teachers]
        # min_ce keeps the ids and cells of one teacher; a mixture has the ids of all, in cells that all can state.
        self._joined_V = None if settings.fusion.function == "min_ce" else joined(cells, vocab_size)
        if settings.fusion.function == "min_ce":
            super().__init__(settings, max(ks), Partitions(cells, vocab_size), teachers)
        else:
            super().__init__(settings, sum(ks), Partitions([self._joined_V] * len(teachers), vocab_size), teachers)
        self.teachers, self._fusion = teachers, settings.fusion

    @classmethod
    def build(cls, settings: Fuse.Settings, tokenizer: Tokenizer, vocab_size: int) -> Fuse:
        common = tokenizer, vocab_size, settings.temperature, settings.tail, settings.text_end
        named = ((f"objective.teachers.{i}", config) for i, config in enumerate(settings.teachers))
        return cls(settings, [TeacherStore(config, where, *common) for where, config in named])

    def targets(self, sample: Sample) -> Targets | None:
        """With `on_missing: skip`, only the teachers that have a row of the sample are combined."""
        found: list[tuple[int, Row]] = []
        for j, teacher in enumerate(self.teachers):
            row = teacher.row(sample, self.settings.on_missing == "error")
            if row is not None:
                found.append((j, row))
        if not found:
            return None
        rewards_J = rewards(np.array([self._cross_entropy(row) for _, row in found]), self._fusion.decide_in == "bf16")
        if self._fusion.function == "min_ce":  # so only the chosen teacher's row is aligned
            found, rewards_J = [found[int(np.argmax(rewards_J))]], rewards_J.max(keepdims=True)
        parts = [
            replace(self.teachers[j].targets(row, sample), partition=self._partitions.numbers[j]) for j, row in found
        ]
        labels_P = sample.ids[sample.positions + 1].astype(np.int64)
        if self._joined_V is not None:
            parts, labels_P = [coarsened(part, self._joined_V) for part in parts], self._joined_V[labels_P]
        return FUNCTIONS[self._fusion.function](parts, rewards_J, labels_P)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        return {"teachers": [teacher.identity(dataset) for teacher in self.teachers]}

    def check_data(self, dataset: TokenizedDataset) -> None:
        for teacher in self.teachers:
            teacher.check_data(dataset, self.settings.on_missing == "error")
            warn_of_bad_rows(teacher, dataset)

    def _cross_entropy(self, row: Row) -> float:
        """Nats a byte or a token, as `ce_per` says. Closing tokens have no bytes: a text without any counts as one."""
        return row.cross_entropy if self._fusion.ce_per == "token" else -row.sum_logp / max(row.num_bytes, 1)
