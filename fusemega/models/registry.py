"""Which family a Hugging Face configuration belongs to. A new family is one file and one entry here."""

from __future__ import annotations

from collections.abc import Mapping

from fusemega.errors import UserError, choose
from fusemega.models.architecture import Architecture, open_architecture
from fusemega.models.family import Family, HFConfig
from fusemega.models.gemma import Gemma2, Gemma3Text
from fusemega.models.heads import is_gated
from fusemega.models.internlm2 import InternLM2
from fusemega.models.llama import Llama
from fusemega.models.mistral import Mistral
from fusemega.models.moe import Mixtral, Qwen3Moe
from fusemega.models.nemotron_nas import NemotronNas
from fusemega.models.phi3 import Phi3
from fusemega.models.pruned import pruned
from fusemega.models.qwen import Qwen2, Qwen3

_DENSE: tuple[Family, ...] = (Llama(), Mistral(), Qwen2(), Qwen3(), Gemma2(), Gemma3Text())
_EXPERTS: tuple[Family, ...] = (Mixtral(), Qwen3Moe())
_NOT_READ = {
    "gemma3": "it is the model of images and text; allowed: its text model alone, a Gemma3ForCausalLM of model_type "
    "gemma3_text, in a folder of its own",
}
_OTHER_FORMS: tuple[Family, ...] = (Phi3(), InternLM2())  # their weights have forms that `pruned` has no code for
FAMILIES: tuple[Family, ...] = (
    *(*_DENSE, *_EXPERTS, *_OTHER_FORMS),
    NemotronNas(),
    *(pruned(family) for family in _DENSE),
)


def architecture_of(hf_config: HFConfig) -> Architecture:
    """Opens a configuration with the family that its `model_type` names.

    Raises:
        UserError: `model_type` is missing or unknown, `auto_map` asks for code, or the family refuses a key.

    Example:
        >>> architecture_of({"model_type": "llama", "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4}).head
        'vocabulary'
    """
    by_type = {model_type: family for family in FAMILIES for model_type in family.model_types}
    model_type = hf_config.get("model_type")
    if model_type is None:
        raise UserError(f"config.json: model_type is missing; supported: {', '.join(sorted(by_type))}")
    if (reason := _NOT_READ.get(str(model_type))) is not None:
        raise UserError(f"config.json: model_type {model_type!r} is not read: {reason}")
    family = by_type[choose("config.json: model_type", str(model_type), by_type)]
    if hf_config.get("auto_map") and not is_gated(hf_config) and not (family.auto_map or family.brings_code):
        raise UserError("config.json: auto_map asks for the folder's own Python code, which is never run")
    return open_architecture({key: value for key, value in hf_config.items() if key != "auto_map"}, family)


def auto_map_of(hf_config: HFConfig) -> Mapping[str, str] | None:
    """`auto_map` that a configuration is written with (see `Family.auto_map`); empty: none; None: the one it has."""
    for family in FAMILIES:
        if hf_config.get("model_type") in family.model_types:
            return family.auto_map if family.auto_map or family.brings_code else None
    return None
