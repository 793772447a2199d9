"""What the run files of `teach`, `eval` and `score` share."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.config import Section
from fusemega.models.heads import HeadKind
from fusemega.passes.batches import RowShape
from fusemega.runtime.parallel import ParallelConfig, environment_rank
from fusemega.text.data import DataConfig


class PassRun(Section):
    """What every forward-only run file says."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    micro_batch_size: int = Field(1, ge=1, le=1 << 16, description="rows of data.seq_length tokens in one forward pass")

    @model_validator(mode="after")
    def _rows_divide(self) -> PassRun:
        """data.seq_length, and its product with micro_batch_size, must be multiples of what the layout and FP8 need."""
        keys = ("data.seq_length", "micro_batch_size")
        self.parallel.check_rows(self.data.seq_length, self.micro_batch_size, keys)
        self.model.check_row(self.data.seq_length * self.micro_batch_size, " x ".join(keys), self.parallel)
        return self

    def open(self, heads: Sequence[HeadKind] = ("vocabulary",)) -> ModelSource:
        """The model, opened and checked; nothing is allocated yet. Arguments and errors as `ModelSource`."""
        source = ModelSource(self.model, self.parallel, environment_rank()[1], self.data.chat_template, heads)
        source.note_length(self.data.seq_length)
        return source

    def row_shape(self, source: ModelSource) -> RowShape:
        """Packed rows of `data.seq_length` tokens."""
        unit = self.model.row_unit(self.parallel)
        return RowShape(self.data.seq_length, self.micro_batch_size, True, source.pad_id, unit, source.unscored_id)
