"""Run files of `fusemega prune search` and `fusemega prune eval`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fusemega.config import Section, choose_section
from fusemega.prune.calibration import Windows
from fusemega.prune.constraint import Constraint
from fusemega.prune.order import OrderType
from fusemega.scoring.run_file import PassRun

CrossEntropy = Literal["fp32", "bf16_reference"]
MeasureName = Literal[
    "perplexity", "js_divergence", "block_influence", "relative_magnitude", "angular_distance", "random"
]
SEARCHED = ("perplexity", "js_divergence")  # measured by masking each block; the others in one pass
BY_LAYER = ("block_influence", "relative_magnitude")  # of a block, or of a whole layer
Granularity = Literal["layer", "block"]


class SearchSettings(Section):
    """`name` picks the search."""

    name: str


class ExactSearch(SearchSettings):
    """Every block that is left is measured in every round."""

    name: Literal["exact"] = "exact"
    early_stop: bool = Field(
        True, description="end a block's run once its sum exceeds the lowest one so far; changes no order"
    )


class TopM(SearchSettings):
    """Approximate: after the first round only the m blocks that cost least when they were last measured."""

    name: Literal["top_m"] = "top_m"
    m: int = Field(ge=1, description="blocks that are measured in each round after the first")


class Racing(SearchSettings):
    """Approximate: all blocks run on a share of the data, the best of them on a larger one, and so on (successive
    halving)."""

    name: Literal["racing"] = "racing"
    first_share: float = Field(0.25, gt=0, le=1, description="share of the micro-batches that all blocks are run on")
    keep: float = Field(0.5, gt=0, lt=1, description="share of the blocks that go on; their share of the data doubles")


SEARCHES: dict[str, type[SearchSettings]] = {"exact": ExactSearch, "top_m": TopM, "racing": Racing}


class CalibratedRun(PassRun):
    """What both run files say of the data."""

    windows: Windows = Field(
        "joined",
        description="joined: the rows' texts, joined by two newlines, tokenized once and cut into windows of "
        "data.seq_length, the remainder dropped; rows: each row on its own, with the tokens that training would learn",
    )
    samples: int | None = Field(None, ge=1, description="rows that are drawn with `seed`; default: all of them")
    seed: int = Field(42, description="of the draw of rows, and of measure: random")
    ce: CrossEntropy = Field(
        "fp32",
        description="arithmetic of the cross-entropy; bf16_reference: logits and losses rounded to bf16, as in the "
        "authors' code",
    )

    @model_validator(mode="after")
    def _in_one_piece(self) -> CalibratedRun:
        """No virtual_pipeline_model_parallel_size, no expert_model_parallel_size and no model.fp8. ce: bf16_reference
        needs a whole head, so a tensor_model_parallel_size of 1."""
        if self.parallel.virtual_pipeline_model_parallel_size is not None:
            raise ValueError("parallel.virtual_pipeline_model_parallel_size: not supported here; leave it out")
        if self.parallel.expert_model_parallel_size > 1:  # its ranks compute in step, and those of a search do not
            raise ValueError("parallel.expert_model_parallel_size: not supported here; leave it out")
        if self.model.fp8 is not None:
            raise ValueError("model.fp8: not supported here: blocks are run one by one; leave it out")
        if self.ce == "bf16_reference" and self.parallel.tensor_model_parallel_size > 1:
            raise ValueError("ce: bf16_reference needs parallel.tensor_model_parallel_size 1; or use ce: fp32")
        return self

    @model_validator(mode="after")
    def _data_acts(self) -> CalibratedRun:
        """windows: joined has no use for data.max_length, data.truncation and data.chat_template."""
        if self.windows == "joined":
            for name in ("max_length", "truncation", "chat_template"):
                if getattr(self.data, name) != type(self.data).model_fields[name].default:
                    raise ValueError(f"data.{name}: no effect with windows: joined; leave it out")
        return self


class PruneRun(CalibratedRun):
    """Run file of `fusemega prune search`."""

    type: OrderType = Field("mix", description="blocks that may be removed: attention (mha), MLP (mlp), or both (mix)")
    blocks: int = Field(ge=1, description="how many are removed")
    constraint: Constraint = Field(
        "none",
        description="plain: what is left at the end can be paired to ordinary layers, attention then MLP; each round "
        "removes two neighbouring blocks",
    )
    measure: MeasureName = Field(
        "perplexity",
        description="what is least when the least important block is removed. perplexity and js_divergence mask every "
        "block; the others rank blocks by one pass of the whole model, or by none",
    )
    search: SerializeAsAny[SearchSettings] = Field(
        ExactSearch(), description="of perplexity and js_divergence; `name` picks it: exact, top_m or racing"
    )
    granularity: Granularity | None = Field(
        None,
        description="of block_influence and relative_magnitude: rank whole layers (default, as published) or blocks",
    )
    cache_mib: int | None = Field(
        None,
        ge=0,
        description="memory of a rank for the inputs of blocks; with less than they need, some are computed again; "
        "default: as much as they need",
    )
    compare: str | None = Field(None, description="an order file; how the new order differs from it is printed")
    output: str = Field(
        description="folder for order.json, authors.json, rounds.jsonl and report.html; an interrupted search goes on "
        "where it stopped"
    )

    @field_validator("search", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return choose_section(SEARCHES, {"name": "exact", **value}, "search.") if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _settings_act(self) -> PruneRun:
        """search belongs to perplexity and js_divergence, granularity to block_influence and relative_magnitude,
        constraint to perplexity and js_divergence. Whole layers need type: mix and an even number of blocks.
        constraint: plain needs type: mix."""
        if self.measure not in SEARCHED:
            for name, value in (("search", self.search), ("constraint", self.constraint)):
                if value != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: no effect with measure: {self.measure}; leave it out")
        if self.granularity is not None and self.measure not in BY_LAYER:
            raise ValueError(f"granularity: no effect with measure: {self.measure}; leave it out")
        if self.constraint == "plain" and self.type != "mix":
            raise ValueError(f"constraint: plain needs type: mix: with type {self.type} no pairs are left")
        if self.whole_layers and (self.type != "mix" or self.blocks % 2):
            raise ValueError(
                f"measure: {self.measure} ranks whole layers: type must be mix and blocks even (found {self.type}, "
                f"{self.blocks})" + ("; or set granularity: block" if self.measure in BY_LAYER else "")
            )
        return self

    @property
    def whole_layers(self) -> bool:
        """Whether both blocks of a layer are removed together."""
        by_layer = self.measure in BY_LAYER and self.granularity in (None, "layer")
        return by_layer or self.measure == "angular_distance"


class PruneEvalRun(CalibratedRun):
    """Run file of `fusemega prune eval`."""

    order: str = Field(description="order file, of `fusemega prune search` or in the authors' form")
    counts: list[int] | None = Field(
        None, description="numbers of removed blocks to measure; default: 0 and every number up to the order's"
    )
    output: str | None = Field(None, description="JSON file for the result; default: print it only")

    @field_validator("counts")
    @classmethod
    def _ascending(cls, counts: list[int] | None) -> list[int] | None:
        if counts is not None and (not counts or sorted(set(counts)) != counts or counts[0] < 0):
            raise ValueError("expected different numbers from 0, in ascending order")
        return counts
