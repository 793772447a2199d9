"""The interface of a model family, and the checks of Hugging Face configurations that families share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fusemega.errors import UserError, choose, nearest
from fusemega.models.parts import Layer
from fusemega.runtime.text_rope import TextRope

HFConfig = Mapping[str, Any]


@dataclass(frozen=True)
class ModelNames:
    """Hugging Face's names of the tensors outside layers, without ".weight"; the first two in the model's body."""

    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"


class Family(Protocol):
    """One model family. Each method takes the whole `config.json` as a mapping and may raise UserError.

    Attributes:
        model_types: the values of `model_type` that belong to the family.
        hf_class: how transformers' names of its classes begin ("Llama").
        auto_map: where transformers finds classes that it does not have itself, in code that travels with the folder
            and that fusemega never runs; empty: it has them.
        brings_code: whether published folders bring their own code, which `auto_map` of config.json names and nobody
            here runs.
        names: of the tensors outside layers.
    """

    model_types: tuple[str, ...]
    hf_class: str
    auto_map: Mapping[str, str]
    brings_code: bool
    names: ModelNames

    def check(self, hf_config: HFConfig) -> None:
        """Refuses a configuration this family would compute wrongly.

        Raises:
            UserError: a key is missing, unknown, or has a value that changes the mathematics.
        """

    def transformer_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig that the architecture decides."""

    def inv_freq(self, hf_config: HFConfig) -> torch.Tensor:
        """Rotary inverse frequencies, float32 [D/2]."""

    def local_inv_freq(self, hf_config: HFConfig) -> torch.Tensor | None:
        """Those of the layers with a sliding window; None: `inv_freq`."""

    def longest_text(self, hf_config: HFConfig) -> int:
        """The longest text, in positions, for which the rope is meant, its scaling included."""

    def text_rope(self, hf_config: HFConfig) -> TextRope | None:
        """What the rotation of a text has besides; None: nothing."""

    def layers(self, hf_config: HFConfig) -> Sequence[Layer]:
        """All layers with all their parts; `left_out.without_left_out` then removes what `block_configs` leaves out."""

    def tied(self, hf_config: HFConfig) -> bool:
        """Whether the head is the embedding."""

    def softcap(self, hf_config: HFConfig) -> float | None:
        """The cap of the head's logits, which become softcap * tanh(logits / softcap); None: they stay."""

    def attention_softcap(self, hf_config: HFConfig) -> float | None:
        """The cap of attention's scores, which become softcap * tanh(scores / softcap); None: they stay."""

    def embedding_scale(self, hf_config: HFConfig) -> float | None:
        """What the embeddings are multiplied by, once it is rounded to their type; None: they stay."""

    def balancing(self, hf_config: HFConfig) -> float:
        """The coefficient of the loss by which transformers balances experts in training; 0: there is none."""

    def ignorable(self, hf_name: str) -> bool:
        """Whether a tensor that no rule names may be left unread (buffers of old checkpoints)."""


# Keys that say how to store, find, generate with or serve a model, and never what it computes.
HARMLESS_KEYS = frozenset(
    """
    _name_or_path _model_name_or_path _from_model_config architectures model_type transformers_version dtype torch_dtype
    use_cache initializer_range max_position_embeddings max_sequence_length pretraining_tp tokenizer_class name_or_path
    return_dict return_dict_in_generate output_attentions output_hidden_states output_scores torchscript
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix use_bfloat16
    chunk_size_feed_forward is_decoder max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss is_llama_config transformers.js_config unsloth_fixed unsloth_version
    _attn_implementation_autoset
    """.split()  # noqa: SIM905  (a paragraph reads better than a hundred lines)
)
# Keys of any configuration that must keep the value which means "nothing unusual".
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
}


# Of `model_type`s whose every n-th layer sees the whole text and the others a window, where no `layer_types` say so: n,
# unless `sliding_window_pattern` gives it.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3_text": 6}
PRUNED = "pruned_"
"""How the `model_type` of models without some of their blocks begins (`pruned.py`)."""
FULL, SLIDING = "full_attention", "sliding_attention"

# No model is larger. Without these limits a mistaken size would cost memory and time before a missing tensor shows it.
_LARGEST = 1 << 31
_LARGEST_OF = {"num_hidden_layers": 10_000, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16}
_LARGEST_OF |= {"head_dim": 1 << 16, "hidden_size": 1 << 24, "intermediate_size": 1 << 26}


def check_keys(hf_config: HFConfig, known: Collection[str], required_values: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a key that is neither known nor harmless, or has a value that is not accepted.

    Args:
        hf_config: the configuration.
        known: keys the family reads and checks itself.
        required_values: for some keys, the only values for which the family's mathematics is right.

    Raises:
        UserError: names the key, its value and what is allowed.
    """
    accepted = {key: values for key, values in NEUTRAL_VALUES.items() if key not in known} | dict(required_values)
    for key, value in hf_config.items():
        if key in accepted:
            if value not in accepted[key]:
                allowed = " or ".join(repr(a) for a in accepted[key])
                raise UserError(
                    f"config.json: {key} = {value!r} changes what the model computes and is not supported; "
                    f"allowed: {allowed}"
                )
        elif key not in known and key not in HARMLESS_KEYS and not key.endswith("_token_id"):
            hint = nearest(key, [*known, *accepted])
            raise UserError(
                f"config.json: unknown key {key!r} (= {value!r}){hint}: it may change what the model computes, so it "
                f"is not ignored; remove it if it does not"
            )


def check_token_ids(hf_config: HFConfig) -> None:
    """Refuses a key such as eos_token_id whose value is not an id, a list of ids or null (old models have -1)."""
    for key, value in hf_config.items():
        if key.endswith("_token_id") and value is not None:
            for found in value if isinstance(value, list) else [value]:
                if type(found) is not int or not -1 <= found < _LARGEST:
                    raise UserError(f"config.json: {key} = {value!r}, expected a token's id, or a list of them")


def require_number(hf_config: HFConfig, key: str, below: float) -> None:
    """Refuses a key that is present and not a number above 0 and less than `below`."""
    value = hf_config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < below):
        raise UserError(f"config.json: {key} = {value!r}, expected a positive number below {below:g}")


def require_int(hf_config: HFConfig, key: str, default: int | None = None, *, minimum: int = 1) -> int:
    """An integer of the configuration, of at least `minimum`; `default` stands for an absent key or null.

    Raises:
        UserError: missing, no such integer, or larger than any model has.
    """
    value = hf_config.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json: {key} is missing")
    largest = _LARGEST_OF.get(key, _LARGEST)
    if type(value) is int and value > largest:
        raise UserError(f"config.json: {key} = {value!r} is more than any model has; allowed: {largest}")
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        expected = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        raise UserError(f"config.json: {key} = {value!r}, expected {expected}")
    return value


def layer_types(hf_config: HFConfig) -> list[str] | None:
    """For each layer, whether it sees the whole text or a window, as the configuration says; None: it does not.

    Raises:
        UserError: not a list of such names, one for each layer.
    """
    layers = require_int(hf_config, "num_hidden_layers")
    types = hf_config.get("layer_types")
    if types is None:
        every = _WINDOW_PATTERNS.get(str(hf_config.get("model_type")).removeprefix(PRUNED))
        if every is None:
            return None
        every = require_int(hf_config, "sliding_window_pattern", every)
        return [SLIDING if layer % every else FULL for layer in range(1, layers + 1)]
    if not isinstance(types, list) or len(types) != layers:
        raise UserError(f"config.json: layer_types = {types!r}, expected a list of {layers} names, one for each layer")
    for kind in types:
        choose("config.json: layer_types", str(kind), (FULL, SLIDING))
    return list(types)


def one_window(hf_config: HFConfig) -> list[int | None]:
    """For each layer, `sliding_window`; None where that is null or absent."""
    unlimited = hf_config.get("sliding_window") is None
    window = None if unlimited else require_int(hf_config, "sliding_window")
    return [window] * require_int(hf_config, "num_hidden_layers")


def keep_layers(hf_config: HFConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model with only these layers, numbered from 0, in this order.

    Settings of single layers (`layer_types`, `block_configs`, and the first layer that has a window) move with their
    layers.
    """
    out = {**hf_config, "num_hidden_layers": len(kept)}
    if isinstance(hf_config.get("mlp_only_layers"), list) or hf_config.get("decoder_sparse_step", 1) != 1:
        out |= dense_layers(hf_config, kept)
    if "layer_types" not in hf_config and (pattern := layer_types(hf_config)) is not None:
        hf_config = {**hf_config, "layer_types": pattern}  # what is left does not follow it any more
    for key in ("layer_types", "block_configs"):
        if isinstance(hf_config.get(key), list):
            out[key] = [hf_config[key][layer] for layer in kept]
    if isinstance(hf_config.get("max_window_layers"), int):
        out["max_window_layers"] = sum(layer < hf_config["max_window_layers"] for layer in kept)
    return out


def dense_layers(hf_config: HFConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The keys that say which layers of a model with experts have none, for layers with the MLPs of these."""
    step, dense = hf_config.get("decoder_sparse_step") or 1, hf_config.get("mlp_only_layers") or []
    without = [layer in dense or (layer + 1) % step != 0 for layer in kept]
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [number for number, has_none in enumerate(without) if has_none],
    }
