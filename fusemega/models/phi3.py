"""The Phi-3 family: Phi-3-mini and medium, Phi-3.5-mini, Phi-4 and Phi-4-mini. Query, key and value are one matrix, and
gate and up are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusemega.errors import choose
from fusemega.models.dense import DenseDecoder
from fusemega.models.family import HFConfig, one_window
from fusemega.models.parts import Attention, GatedMLP
from fusemega.models.rope import ORIGINAL, PARTIAL, rope_parameters
from fusemega.models.rules import QKV, Rule

_LONGROPE = ("longrope", "su", "yarn")  # the last two are old names of it in this family
_NONE = (0, None)


@dataclass(frozen=True)
class OneMatrixAttention(Attention):
    """`qkv_proj` [(N + 2G) * D, H]: all query heads, then all keys, then all values."""

    def qkv(self, megatron: str, hf: str, kind: str) -> Rule:
        """See `Attention.qkv`."""
        name = f"{hf}qkv_proj.{kind}"
        return QKV(megatron, name, name, name, self.heads, self.groups, self.head_dim, (self.hidden,))


@dataclass(frozen=True)
class OneMatrixMLP(GatedMLP):
    """`gate_up_proj` [2F, H]."""

    gate: ClassVar[str] = "gate_up_proj"
    up: ClassVar[str] = "gate_up_proj"


class Phi3(DenseDecoder):
    """`model_type` phi3: a window in all layers or none; a part of each head may be rotated (`partial_rotary_factor`).

    With `rope_scaling` of type longrope a text of more than `original_max_position_embeddings` tokens is rotated by
    `long_factor`, a shorter one by `short_factor`, as transformers does for a text alone.
    """

    model_types: tuple[str, ...] = ("phi3",)
    hf_class = "Phi3"
    brings_code = True  # of the time before transformers had the class
    known = frozenset({"sliding_window", ORIGINAL, PARTIAL})
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "resid_pdrop": _NONE,
        "embd_pdrop": _NONE,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    }
    defaults: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, ORIGINAL: 4096}
    attention_part = OneMatrixAttention
    mlp_part = OneMatrixMLP

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """See `DenseDecoder.windows`."""
        return one_window(hf_config)

    def rope(self, hf_config: HFConfig, *, local: bool = False) -> dict[str, Any]:
        """See `DenseDecoder.rope`."""
        hf_config = {**self.defaults, **hf_config}
        key = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
        given = hf_config.get(key) or {}
        if not isinstance(given, Mapping):
            return rope_parameters(hf_config)  # raises
        kind = str(given.get("rope_type") or given.get("type") or "default")
        choose(f"config.json: {key}.rope_type", kind, ("default", *_LONGROPE))
        kind = "longrope" if kind in _LONGROPE else kind
        share = given.get(PARTIAL, hf_config.get(PARTIAL))
        own = {**given, "rope_type": kind, PARTIAL: 1.0 if share is None else share}
        if kind == "longrope":
            own[ORIGINAL] = hf_config[ORIGINAL]  # the key beside wins over one inside
        return rope_parameters({**hf_config, key: own}, partial=True)

    def longest_text(self, hf_config: HFConfig) -> int:
        """See `Family.longest_text`. Published configurations give the length with scaling."""
        return int({**self.defaults, **hf_config}["max_position_embeddings"] or 4096)
