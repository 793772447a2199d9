"""A configuration, opened once: what it says of a model, and the rules of all its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusemega.errors import UserError
from fusemega.models.family import Family, HFConfig
from fusemega.models.gated_head import GATING_KEYS, Gating
from fusemega.models.heads import EMBEDDING, HeadKind, class_name, has_head, head_kind, head_rules, is_gated
from fusemega.models.left_out import without_left_out
from fusemega.models.parts import Layer, LayerSpec, Names
from fusemega.models.rules import Replicated, Rule, VocabRows
from fusemega.runtime.text_rope import TextRope


@dataclass(frozen=True)
class Architecture:
    """A checked configuration, from which all code that builds, reads or writes the model takes its facts.

    Attributes:
        hf_config: `config.json` as a mapping.
        family: the model family that it belongs to.
        head: what the model ends in.
        layers: all layers in order, each with its parts.
        transformer_config: keyword arguments of Megatron's TransformerConfig that the architecture decides.
        tied: whether the head is the embedding.
        softcap: the head's logits become softcap * tanh(logits / softcap); None: they stay.
        attention_softcap: the scores of attention become softcap * tanh(scores / softcap); None: they stay.
        embedding_scale: what the embeddings are multiplied by, once it is rounded to their type; None: they stay.
        gating: of a gated head, its sizes.
    """

    hf_config: HFConfig
    family: Family
    head: HeadKind
    layers: tuple[Layer, ...]
    transformer_config: Mapping[str, Any]
    tied: bool
    softcap: float | None
    attention_softcap: float | None = None
    embedding_scale: float | None = None
    gating: Gating | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids in `config.json`, without padding."""
        return int(self.hf_config["vocab_size"])

    @property
    def complete(self) -> bool:
        """Whether every layer has attention and an MLP. transformers knows no other layers."""
        return all(layer.attention is not None and layer.mlp is not None for layer in self.layers)

    @property
    def alike(self) -> bool:
        """Whether all layers have the same parts. Megatron's checkpoints stack the layers of such a model."""
        return len(set(self.layers)) == 1

    @property
    def layers_name(self) -> str:
        """How the names of Hugging Face's tensors of layers begin; the layer's number follows."""
        return f"{self._body}layers."

    @property
    def _body(self) -> str:
        return "" if self.head == "none" else "model."  # transformers' bare model has no module around its body

    def block_tensors(self, layer: int, part: str) -> list[str]:
        """Hugging Face's tensors of one block of a layer, norms included, without the layer's name; none: it lacks it.

        Args:
            layer: its number.
            part: "attention" or "mlp".

        Example:
            >>> from fusemega.models.registry import architecture_of
            >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
            >>> model = architecture_of({"model_type": "llama", "num_attention_heads": 2, **sizes})
            >>> model.block_tensors(0, "mlp")[-1]
            'post_attention_layernorm.weight'
        """
        alone = replace(self.layers[layer], **{other: None for other in ("attention", "mlp") if other != part})
        return [name for rule in alone.rules(Names("", "", "local")) for name in rule.hf_shapes()]

    def inv_freq(self) -> torch.Tensor:
        """Rotary inverse frequencies, float32 [D/2]."""
        return self.family.inv_freq(self.hf_config)

    def text_rope(self) -> TextRope | None:
        """What the rotation of a text has besides; None: nothing."""
        return self.family.text_rope(self.hf_config)

    def local_inv_freq(self) -> torch.Tensor | None:
        """Those of the layers with a sliding window, float32 [D/2]; None: `inv_freq`."""
        return self.family.local_inv_freq(self.hf_config)

    @property
    def norms_after(self) -> bool:
        """Whether each block ends in a norm of what it adds to the stream."""
        blocks = (block for layer in self.layers for block in (layer.attention, layer.mlp) if block is not None)
        return any(len(block.norms) > 1 for block in blocks)

    def rules(self, spec: LayerSpec = "local") -> list[Rule]:
        """One rule for every parameter of the whole model, in the order of Hugging Face's tensors.

        Args:
            spec: implementation of the layers, which decides Megatron's parameter names.

        Example:
            >>> from fusemega.models.registry import architecture_of
            >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
            >>> model = architecture_of({"model_type": "llama", "num_attention_heads": 2, **sizes})
            >>> [rule.megatron for rule in model.rules()[:2]]
            ['embedding.word_embeddings.weight', 'decoder.layers.0.self_attention.linear_qkv.weight']
            >>> list(model.rules()[1].hf_shapes().values())
            [(8, 8), (8, 8), (8, 8)]
        """
        hidden, body = self.transformer_config["hidden_size"], self._body
        names = self.family.names
        embedding = f"{body}{names.embedding}.weight"
        rules: list[Rule] = [VocabRows(EMBEDDING, embedding, (self.vocab_size, hidden))]
        for number, layer in enumerate(self.layers):
            rules += layer.rules(Names(f"{self.layers_name}{number}.", f"decoder.layers.{number}.", spec))
        rules.append(Replicated("decoder.final_layernorm.weight", f"{body}{names.norm}.weight", (hidden,)))
        if self.gating is not None:
            return rules + self.gating.rules(hidden)
        return rules + head_rules(self.head, self.vocab_size, hidden, embedding, names.head, self.tied)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every Hugging Face tensor, by name. A tied head has no tensor of its own."""
        return {name: shape for rule in self.rules() for name, shape in rule.hf_shapes().items()}

    def copies(self) -> dict[str, str]:
        """HF tensors that may be present as an exact copy of another: copy -> original (the head of a tied model)."""
        names = self.family.names
        return {f"{names.head}.weight": f"{self._body}{names.embedding}.weight"} if self.tied else {}

    def ignorable(self, hf_name: str) -> bool:
        """Whether a tensor that no rule names may be left unread (buffers of old checkpoints)."""
        return self.family.ignorable(hf_name)

    def require_head(self, allowed: Sequence[HeadKind], what: str) -> None:
        """Refuses a model whose head is not among `allowed`.

        Args:
            allowed: kinds of heads.
            what: start of the message: the folder of the model.

        Raises:
            UserError: names the class and the allowed ones.
        """
        if self.head not in allowed:
            hf_class = self.family.hf_class
            classes = (class_name(hf_class, kind) for kind in allowed if has_head(hf_class, kind))
            found = class_name(hf_class, self.head)
            raise UserError(f"{what}: config.json has the architecture {found}; allowed here: {', '.join(classes)}")


def open_architecture(hf_config: HFConfig, family: Family) -> Architecture:
    """Checks a configuration of this family and opens it.

    Raises:
        UserError: the family does not support the configuration, its head or its layers.
    """
    gated = is_gated(hf_config)
    others = {"auto_map"} | (GATING_KEYS if gated else frozenset())
    family.check({key: value for key, value in hf_config.items() if key not in others})
    head = head_kind(hf_config, family.hf_class)
    return Architecture(
        hf_config=dict(hf_config),
        family=family,
        head=head,
        layers=without_left_out(family.layers(hf_config), hf_config.get("block_configs")),
        transformer_config=family.transformer_config(hf_config),
        # Only a vocabulary can be the embedding, whatever tie_word_embeddings says of another head.
        tied=head == "vocabulary" and family.tied(hf_config),
        softcap=family.softcap(hf_config),
        attention_softcap=family.attention_softcap(hf_config),
        embedding_scale=family.embedding_scale(hf_config),
        gating=Gating.of(hf_config) if gated else None,
    )
