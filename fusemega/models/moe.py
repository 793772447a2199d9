"""Decoders whose MLPs are experts, in all layers or in some: Mixtral, and Qwen3's (`qwen3_moe`).

A router's logits give each token `num_experts_per_tok` experts of its layer; their outputs are added with weights that
a softmax over all experts gives, of the chosen ones alone where they are to add up to 1. No expert drops a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fusemega.errors import UserError
from fusemega.models.dense import DenseDecoder
from fusemega.models.family import HFConfig, require_int
from fusemega.models.mistral import Mistral
from fusemega.models.parts import ExpertNames, Experts, GatedMLP, Layer
from fusemega.models.qwen import Qwen3

_KNOWN = frozenset({"num_experts_per_tok", "num_local_experts", "output_router_logits", "router_aux_loss_coef"})
_LARGEST_COEFFICIENT = 1e3


class _Experts(DenseDecoder):
    """What a family with experts adds to a dense one, from which a subclass inherits too.

    Attributes:
        expert_names: Hugging Face's.
        expert_ffn: the key that gives the feed-forward size of an expert.
    """

    expert_names: ClassVar[ExpertNames]
    expert_ffn: ClassVar[str]

    def has_experts(self, hf_config: HFConfig) -> Sequence[bool]:
        """For each layer, whether its MLP is experts.

        Raises:
            UserError: the keys that say so are malformed.
        """
        return [True] * require_int(hf_config, "num_hidden_layers")

    def normalised(self, hf_config: HFConfig) -> bool:
        """Whether the weights of a token's experts are made to add up to 1."""
        return True

    def experts(self, hf_config: HFConfig) -> tuple[int, int, int]:
        """(Experts of a layer, experts of a token, feed-forward size of one).

        Raises:
            UserError: one of them is malformed, or more experts for a token than there are.
        """
        hf_config = {**self.defaults, **hf_config}
        count = require_int(hf_config, "num_local_experts")
        chosen = require_int(hf_config, "num_experts_per_tok")
        if chosen > count:
            raise UserError(f"config.json: num_experts_per_tok = {chosen}, and the model has {count} experts")
        return count, chosen, require_int(hf_config, self.expert_ffn)

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        super().check(hf_config)
        self.experts(hf_config)
        self.balancing(hf_config)
        if not any(self.has_experts(hf_config)):
            raise UserError("config.json: no layer has experts; allowed: a model of the dense family")
        if not isinstance(hf_config.get("norm_topk_prob", False), bool):
            raise UserError(f"config.json: norm_topk_prob = {hf_config['norm_topk_prob']!r}, expected true or false")

    def balancing(self, hf_config: HFConfig) -> float:
        """See `Family.balancing`. transformers adds it to the loss where the router's logits are put out."""
        used, coefficient = hf_config.get("output_router_logits", False), hf_config.get("router_aux_loss_coef", 0.001)
        if not isinstance(used, bool):
            raise UserError(f"config.json: output_router_logits = {used!r}, expected true or false")
        number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
        if not number or not 0 <= coefficient < _LARGEST_COEFFICIENT:
            raise UserError(f"config.json: router_aux_loss_coef = {coefficient!r}, expected a number of at least 0")
        return float(coefficient) if used else 0.0

    def transformer_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """See `Family.transformer_config`."""
        count, chosen, ffn = self.experts(hf_config)
        return {
            **super().transformer_config(hf_config),
            "num_moe_experts": count,
            "moe_router_topk": chosen,
            "moe_ffn_hidden_size": ffn,
            # Softmax over all experts or over the chosen ones: the latter is the former, made to add up to 1.
            "moe_router_pre_softmax": not self.normalised(hf_config),
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
        }

    def layers(self, hf_config: HFConfig) -> Sequence[Layer]:
        """See `Family.layers`."""
        count, _, ffn = self.experts(hf_config)

        def with_experts(layer: Layer) -> Layer:
            assert isinstance(layer.mlp, GatedMLP)
            norms = tuple(replace(norm, fused=None) for norm in layer.mlp.norms)
            return replace(layer, mlp=Experts(layer.mlp.hidden, ffn, count, self.expert_names, norms))

        dense = super().layers(hf_config)
        here = self.has_experts(hf_config)
        return [with_experts(layer) if has else layer for layer, has in zip(dense, here, strict=True)]


class Mixtral(_Experts, Mistral):
    """`model_type` mixtral: all layers have experts."""

    model_types: tuple[str, ...] = ("mixtral",)
    hf_class = "Mixtral"
    known = Mistral.known | _KNOWN
    required_values = {"router_jitter_noise": (0, None)}
    defaults = {
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
    }
    expert_names = ExpertNames("block_sparse_moe", "w1", "w3", "w2")
    expert_ffn = "intermediate_size"

    def rope(self, hf_config: HFConfig, *, local: bool = False) -> dict[str, Any]:
        """See `DenseDecoder.rope`. Where no key gives the base, it is a million."""
        return super().rope({"rope_theta": 1e6, **hf_config}, local=local)


class Qwen3Moe(_Experts, Qwen3):
    """`model_type` qwen3_moe: as qwen3, with experts in every `decoder_sparse_step`-th layer that is not among
    `mlp_only_layers`. transformers writes `num_experts` as `num_local_experts`."""

    model_types: tuple[str, ...] = ("qwen3_moe",)
    hf_class = "Qwen3Moe"
    known = (
        (Qwen3.known - {"layer_types"})
        | _KNOWN
        | frozenset(
            {"num_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
        )
    )
    defaults = {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    }
    expert_names = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
    expert_ffn = "moe_intermediate_size"

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """See `DenseDecoder.windows`: of all layers or of none, whatever `max_window_layers` says."""
        return super().windows({**hf_config, "max_window_layers": 0})

    def normalised(self, hf_config: HFConfig) -> bool:
        """See `_Experts.normalised`."""
        return bool(hf_config.get("norm_topk_prob", False))

    def experts(self, hf_config: HFConfig) -> tuple[int, int, int]:
        """See `_Experts.experts`."""
        names = ("num_experts", "num_local_experts")
        given = {name: require_int(hf_config, name) for name in names if hf_config.get(name) is not None}
        if len(set(given.values())) > 1:
            raise UserError(f"config.json: {' and '.join(f'{name} = {n}' for name, n in given.items())} contradict")
        count = next(iter(given.values()), 128)
        return super().experts({**hf_config, "num_local_experts": count})

    def has_experts(self, hf_config: HFConfig) -> Sequence[bool]:
        """See `_Experts.has_experts`."""
        hf_config = {**self.defaults, **hf_config}
        layers = require_int(hf_config, "num_hidden_layers")
        step = require_int(hf_config, "decoder_sparse_step")
        dense = hf_config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(type(n) is not int for n in dense):
            raise UserError(f"config.json: mlp_only_layers = {dense!r}, expected a list of layers")
        return [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
