"""Which family a Hugging Face configuration belongs to. A new family is one file and one entry here."""

from __future__ import annotations

from fusemega.errors import UserError, choose
from fusemega.models.family import Family, HFConfig
from fusemega.models.llama import Llama
from fusemega.models.mistral import Mistral
from fusemega.models.qwen import Qwen2, Qwen3

FAMILIES: tuple[Family, ...] = (Llama(), Mistral(), Qwen2(), Qwen3())


def family_of(hf_config: HFConfig) -> Family:
    """The family of a configuration, after it has checked it.

    Raises:
        UserError: `model_type` is missing or unknown, code is asked for (`auto_map`), or the family refuses a key.
    """
    by_type = {model_type: family for family in FAMILIES for model_type in family.model_types}
    model_type = hf_config.get("model_type")
    if model_type is None:
        raise UserError(f"config.json: model_type is missing; supported: {', '.join(sorted(by_type))}")
    family = by_type[choose("config.json: model_type", str(model_type), by_type)]
    if hf_config.get("auto_map"):
        raise UserError("config.json: auto_map asks for the folder's own Python code, which is never run")
    family.check({key: value for key, value in hf_config.items() if key != "auto_map"})
    return family
