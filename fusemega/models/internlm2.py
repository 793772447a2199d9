"""The InternLM2 family: InternLM2 and 2.5. A Llama with names of its own, and one matrix of query, key and value.

transformers has no class for it. Published folders bring their code, which is never run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from fusemega.errors import choose
from fusemega.models.dense import DenseDecoder
from fusemega.models.family import HFConfig, ModelNames
from fusemega.models.parts import Attention, GatedMLP, Norm
from fusemega.models.rules import ColumnParallel, Rule


@dataclass(frozen=True)
class GroupedAttention(Attention):
    """`wqkv` [(N + 2G) * D, H]: for each group its query heads, then its key, then its value, as Megatron has them."""

    module: ClassVar[str] = "attention"
    output: ClassVar[str] = "wo"

    def qkv(self, megatron: str, hf: str, kind: str) -> Rule:
        """See `Attention.qkv`."""
        rows = (self.heads + 2 * self.groups) * self.head_dim
        return ColumnParallel(megatron, f"{hf}wqkv.{kind}", (rows, self.hidden))


@dataclass(frozen=True)
class InternMLP(GatedMLP):
    """Gate w1, up w3, down w2."""

    module: ClassVar[str] = "feed_forward"
    gate: ClassVar[str] = "w1"
    up: ClassVar[str] = "w3"
    down: ClassVar[str] = "w2"


class InternLM2(DenseDecoder):
    """`model_type` internlm2: its rope is plain, linear or dynamic."""

    model_types: tuple[str, ...] = ("internlm2",)
    hf_class = "InternLM2"
    auto_map: Mapping[str, str] = MappingProxyType(
        {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        }
    )
    brings_code = True
    names = ModelNames(embedding="tok_embeddings", head="output")
    known = frozenset({"attn_implementation"})
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": (False,), "head_dim": (None,)}
    attention_part = GroupedAttention
    mlp_part = InternMLP

    def rope(self, hf_config: HFConfig, *, local: bool = False) -> dict[str, Any]:
        """See `DenseDecoder.rope`."""
        parameters = super().rope(hf_config)
        choose("config.json: rope_scaling.type", parameters["rope_type"], ("default", "linear", "dynamic"))
        return parameters

    def norms(self, hidden: int) -> tuple[tuple[Norm, ...], tuple[Norm, ...]]:
        """See `DenseDecoder.norms`."""
        (attention,), (mlp,) = super().norms(hidden)
        return (
            (Norm("attention_norm", attention.local, attention.fused, hidden),),
            (Norm("ffn_norm", mlp.local, mlp.fused, hidden),),
        )
