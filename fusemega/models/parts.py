"""The parts of a decoder layer: which weights each has, under Hugging Face's names and Megatron's.

A layer is attention or nothing, then an MLP or nothing. Each block has its own norms, so a layer that lacks a block
lacks them too. A new kind of part is a class here with its rules; a family says which parts its layers have.

Shape suffixes: H hidden, F feed-forward, E experts, N query heads, G key/value groups, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from fusemega.models.rules import QKV, GateUp, OfExpert, Replicated, RowParallel, Rule

LayerSpec = Literal["local", "transformer_engine"]
"""Implementation of a layer's modules. The two differ in where the norms are, and so in their names."""
MLPKind = Literal["mlp", "experts"]
"""What computes a layer's MLP block."""


@dataclass(frozen=True)
class Names:
    """How the names of a layer's tensors begin, Hugging Face's and Megatron's; and the implementation of the latter.

    Example:
        >>> Names("model.layers.3.", "decoder.layers.3.", "local")
        Names(hf='model.layers.3.', megatron='decoder.layers.3.', spec='local')
    """

    hf: str
    megatron: str
    spec: LayerSpec


class Part(ABC):
    """Something that a layer has."""

    @abstractmethod
    def rules(self, names: Names) -> list[Rule]:
        """One rule a parameter, in the order of Hugging Face's tensors."""


@dataclass(frozen=True)
class Norm(Part):
    """An RMSNorm over the hidden size, weight [H].

    Attributes:
        hf: its module in the Hugging Face layer.
        local: its module in Megatron's layer.
        fused: the linear layer that Transformer Engine's spec fuses it into; None: it stays a module.
        size: H.
    """

    hf: str
    local: str
    fused: str | None
    size: int

    def rules(self, names: Names) -> list[Rule]:
        """See `Part.rules`."""
        alone = names.spec == "local" or self.fused is None
        parameter = f"{self.local}.weight" if alone else f"{self.fused}.layer_norm_weight"
        return [Replicated(names.megatron + parameter, f"{names.hf}{self.hf}.weight", (self.size,))]


@dataclass(frozen=True)
class Attention(Part):
    """Grouped-query attention: q [N*D, H], k and v [G*D, H], output [H, N*D].

    Attributes:
        hidden, heads, groups, head_dim: H, N, G, D.
        bias: whether query, key and value have a bias.
        qk_norm: whether queries and keys pass an RMSNorm over D.
        norms: the norms that belong to this block.
        module, output: Hugging Face's names of the block in its layer, and of the output matrix in the block.
    """

    module: ClassVar[str] = "self_attn"
    output: ClassVar[str] = "o_proj"

    hidden: int
    heads: int
    groups: int
    head_dim: int
    bias: bool
    qk_norm: bool
    norms: tuple[Norm, ...]

    def rules(self, names: Names) -> list[Rule]:
        """See `Part.rules`; without those of its norms."""
        hf, megatron = f"{names.hf}{self.module}.", f"{names.megatron}self_attention."
        rules = [self.qkv(f"{megatron}linear_qkv.weight", hf, "weight")]
        if self.bias:
            rules.append(self.qkv(f"{megatron}linear_qkv.bias", hf, "bias"))
        out_shape = (self.hidden, self.heads * self.head_dim)
        rules.append(RowParallel(f"{megatron}linear_proj.weight", f"{hf}{self.output}.weight", out_shape))
        if self.qk_norm:
            rules += [
                Replicated(f"{megatron}{name}_layernorm.weight", f"{hf}{name}_norm.weight", (self.head_dim,))
                for name in "qk"
            ]
        return rules

    def qkv(self, megatron: str, hf: str, kind: str) -> Rule:
        """The rule of query, key and value.

        Args:
            megatron: the parameter.
            hf: how the names of the block's tensors begin.
            kind: "weight" or "bias".
        """
        q, k, v = (f"{hf}{name}_proj.{kind}" for name in "qkv")
        columns = (self.hidden,) if kind == "weight" else ()
        return QKV(megatron, q, k, v, self.heads, self.groups, self.head_dim, columns)


@dataclass(frozen=True)
class GatedMLP(Part):
    """A gated MLP: gate and up [F, H], down [H, F].

    Attributes:
        hidden, ffn: H, F.
        norms: the norms that belong to this block.
        module, gate, up, down: Hugging Face's names of the block and its matrices; gate and up may be one.
    """

    module: ClassVar[str] = "mlp"
    gate: ClassVar[str] = "gate_proj"
    up: ClassVar[str] = "up_proj"
    down: ClassVar[str] = "down_proj"

    hidden: int
    ffn: int
    norms: tuple[Norm, ...]

    def rules(self, names: Names) -> list[Rule]:
        """See `Part.rules`; without those of its norms."""
        hf, megatron = f"{names.hf}{self.module}.", f"{names.megatron}mlp."
        shape = (self.ffn, self.hidden)
        return [
            GateUp(f"{megatron}linear_fc1.weight", f"{hf}{self.gate}.weight", f"{hf}{self.up}.weight", shape),
            RowParallel(f"{megatron}linear_fc2.weight", f"{hf}{self.down}.weight", shape[::-1]),
        ]


@dataclass(frozen=True)
class ExpertNames:
    """How Hugging Face names the tensors of a family's experts.

    Attributes:
        block: the module in the layer that has router and experts.
        gate, up, down: the matrices of an expert.
    """

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Experts(Part):
    """A router [E, H], and E gated MLPs of which each token passes a few: gate and up [F, H], down [H, F].

    Attributes:
        hidden, ffn: H, F of one expert.
        experts: E.
        names: Hugging Face's.
        norms: the norms that belong to this block.
    """

    hidden: int
    ffn: int
    experts: int
    names: ExpertNames
    norms: tuple[Norm, ...]

    def rules(self, names: Names) -> list[Rule]:
        """See `Part.rules`; without those of its norms."""
        hf, megatron, of = f"{names.hf}{self.names.block}.", f"{names.megatron}mlp.", self.names
        shape = (self.ffn, self.hidden)
        rules: list[Rule] = [Replicated(f"{megatron}router.weight", f"{hf}gate.weight", (self.experts, self.hidden))]
        local = names.spec == "local"
        for number in range(self.experts):
            # Local experts are modules; Transformer Engine's grouped products have the weights of all in one.
            before = f"{megatron}experts.local_experts.{number}." if local else f"{megatron}experts."
            last = "weight" if local else f"weight{number}"
            gate, up, down = (f"{hf}experts.{number}.{name}.weight" for name in (of.gate, of.up, of.down))
            for rule in (
                GateUp(f"{before}linear_fc1.{last}", gate, up, shape),
                RowParallel(f"{before}linear_fc2.{last}", down, shape[::-1]),
            ):
                rules.append(OfExpert.of(rule, number, self.experts))
        return rules


@dataclass(frozen=True)
class Layer:
    """x <- x + attention(norm(x)), then x <- x + mlp(norm(x)); a part that is None is left out with its norms.

    A block with two norms ends in the second: x <- x + norm(attention(norm(x))).
    """

    attention: Attention | None
    mlp: GatedMLP | Experts | None

    @property
    def blocks(self) -> tuple[bool, MLPKind | None]:
        """Whether it has attention, and which kind of MLP."""
        kind: MLPKind = "experts" if isinstance(self.mlp, Experts) else "mlp"
        return self.attention is not None, None if self.mlp is None else kind

    def rules(self, names: Names) -> list[Rule]:
        """One rule for every parameter of the layer; norms come last, as in transformers' modules."""
        blocks = [block for block in (self.attention, self.mlp) if block is not None]
        parts = [*blocks, *(norm for block in blocks for norm in block.norms)]
        return [rule for part in parts for rule in part.rules(names)]
