"""Chooses the implementation of the layers, and whether their matrix products run in FP8.

Only Transformer Engine has FP8. Without it megatron-core accepts the settings, checks nothing and computes in bf16. So
unavailable settings are refused here, with the reason, before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.runtime.kernel_packages import FP8_RECIPES, recipe_problem, transformer_engine_problem
from fusemega.runtime.layout import ParallelConfig

# The sizes of an FP8 product are multiples of this (megatron-core's fp8_utils.py:168).
_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# Under sequence parallelism Transformer Engine gathers quantized activations, and takes whole blocks only
# (assert_dim_for_all_gather in its utils.py).
_GATHERED_ALIGNMENT = _ALIGNMENT | {"blockwise": 128}
_DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")


@dataclass(frozen=True)
class Kernels:
    """What a model's layers are built of, after `Precision` has checked it against this machine.

    Attributes:
        transformer_engine: whether they are Transformer Engine's modules; else megatron-core's and torch's.
        fp8: TransformerConfig's fields about FP8; empty for none.
    """

    transformer_engine: bool = False
    fp8: Mapping[str, Any] = field(default_factory=dict)

    def transformer_config(self) -> dict[str, Any]:
        """Keyword arguments of TransformerConfig."""
        return {"transformer_impl": "transformer_engine" if self.transformer_engine else "local", **self.fp8}

    def __str__(self) -> str:
        fp8 = f", FP8 {self.fp8['fp8']} ({self.fp8['fp8_recipe']})" if self.fp8 else ""
        return ("Transformer Engine's layers" if self.transformer_engine else "local layers") + fp8


LOCAL = Kernels()


class Precision(Section):
    """The part of a run file's `model` that decides how its layers compute. Names are Megatron's."""

    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="dtype of parameters and activations; gradients are fp32"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto",
        description="implementation of the layers; auto: Transformer Engine if it works here and dtype is bf16, "
        "otherwise local",
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None, description="run the layers' matrix products in FP8; hybrid uses e5m2 for gradients"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        None, description="how FP8 scales are computed; default with fp8: delayed"
    )
    fp8_margin: int | None = Field(None, ge=0, description="delayed: scales are divided by 2 ** margin; default 0")
    fp8_amax_history_len: int | None = Field(
        None, ge=1, description="delayed: length of the history of maxima, in steps; default 1"
    )
    fp8_amax_compute_algo: Literal["most_recent", "max"] | None = Field(
        None, description="delayed: which maximum of the history is used; default most_recent"
    )

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Precision:
        recipe = self.fp8_recipe or "delayed"
        given = [name for name in ("fp8_recipe", *_DELAYED_ONLY) if getattr(self, name) is not None]
        if self.fp8 is None and given:
            raise ValueError(f"{given[0]} has no effect without fp8; set fp8: hybrid, or leave it out")
        if recipe != "delayed" and given[1:]:
            raise ValueError(f"{given[1]} has no effect with fp8_recipe {recipe}; it belongs to delayed")
        if self.fp8 is not None and self.transformer_impl == "local":
            raise ValueError("fp8 needs transformer_impl transformer_engine or auto; local layers would ignore it")
        if self.fp8 is not None and self.dtype == "fp32":
            raise ValueError("fp8 needs dtype bf16; found fp32")
        if self.transformer_impl == "transformer_engine" and self.dtype == "fp32":
            raise ValueError("transformer_impl transformer_engine multiplies fp32 in TF32; fp32 needs local or auto")
        return self

    def fp8_settings(self) -> dict[str, Any]:
        """TransformerConfig's fields about FP8; empty without it."""
        if self.fp8 is None:
            return {}
        given = {name: getattr(self, name) for name in _DELAYED_ONLY if getattr(self, name) is not None}
        return {"fp8": self.fp8, "fp8_recipe": self.fp8_recipe or "delayed", **given}

    def kernels(self) -> Kernels:
        """The implementation of the layers on this machine.

        Raises:
            UserError: FP8 or Transformer Engine is asked for and does not work here, or not with this recipe.
        """
        if self.transformer_impl == "local" or self.dtype == "fp32":
            return LOCAL
        problem = transformer_engine_problem()
        settings = self.fp8_settings()
        if problem is not None:
            if settings:
                raise UserError(f"model.fp8: {self.fp8} is not available: {problem}; without fp8 the run is bf16")
            if self.transformer_impl == "transformer_engine":
                raise UserError(f"model.transformer_impl: {problem}; allowed here: auto, local")
            return LOCAL
        if settings:
            problem = recipe_problem(settings["fp8_recipe"])
            if problem is not None:
                usable = [recipe for recipe in FP8_RECIPES if recipe_problem(recipe) is None]
                raise UserError(
                    f"model.fp8_recipe: {settings['fp8_recipe']} cannot run on this GPU: {problem}; "
                    f"allowed here: {', '.join(usable) or 'no FP8 recipe'}"
                )
        return Kernels(transformer_engine=True, fp8=settings)

    def check_layers(self, config: Mapping[str, Any], parallel: ParallelConfig) -> None:
        """Refuses a model whose layers FP8 cannot run.

        Args:
            config: TransformerConfig's fields that the architecture decides.
            parallel: a layout that divides them.

        Raises:
            UserError: experts; or the first width, on one tensor-parallel rank, that is no multiple of what is needed.
        """
        if self.fp8 is None:
            return
        if "num_moe_experts" in config:
            raise UserError(
                f"model.fp8: {self.fp8}, and this model has experts, whose products have not been tried in FP8; "
                "allowed: leave it out"
            )
        recipe, tp_size = self.fp8_recipe or "delayed", parallel.tensor_model_parallel_size
        heads, groups, head_dim = (config[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))
        unit = _ALIGNMENT[recipe]
        widths = {
            "the hidden size": (config["hidden_size"], self._gathered(parallel)[recipe]),
            "the feed-forward size of a tensor-parallel rank": (config["ffn_hidden_size"] // tp_size, unit),
            "the width of a tensor-parallel rank's heads": (heads * head_dim // tp_size, unit),
            "the width of a tensor-parallel rank's queries, keys and values": (
                (heads + 2 * groups) * head_dim // tp_size,
                unit,
            ),
        }
        for name, (width, needed) in widths.items():
            if width % needed:
                raise UserError(f"model.fp8_recipe: {recipe} needs multiples of {needed} here, and {name} is {width}")

    def check_row(self, tokens: int, what: str, parallel: ParallelConfig) -> None:
        """Refuses a micro-batch of `tokens` tokens that FP8 cannot run.

        Raises:
            ValueError: names `what` the tokens are the product of; pydantic makes it the run file's error.
        """
        if self.fp8 is not None and tokens % (unit := self.row_unit(parallel)):
            recipe = self.fp8_recipe or "delayed"
            raise ValueError(f"{what} = {tokens} is not a multiple of {unit}, which fp8_recipe {recipe} needs here")

    def row_unit(self, parallel: ParallelConfig) -> int:
        """A micro-batch's tokens must be a multiple of this: of what the layout and FP8 need of its shards."""
        if self.fp8 is None:
            return parallel.row_unit
        shard = self._gathered(parallel)[self.fp8_recipe or "delayed"]
        return math.lcm(parallel.row_unit, shard * parallel.activation_split)

    def _gathered(self, parallel: ParallelConfig) -> Mapping[str, int]:
        return _GATHERED_ALIGNMENT if parallel.sequence_parallel else _ALIGNMENT
