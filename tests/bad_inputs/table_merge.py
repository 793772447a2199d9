"""What a merge, and a LoRA adapter, are refused for."""

from __future__ import annotations

from tests.bad_inputs.damage import copied, gone, put
from tests.bad_inputs.run import Bad, kind

_t, _w = kind("tokenizer"), kind("weights")
_LORA = put("lora/adapter_config.json", '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
_MERGE = "merge out --method linear --models model copy"

TABLE: list[Bad] = [
    _t(
        "no evidence of a vocabulary",
        _MERGE,
        "copy: no tokenizer's files there",
        copied("model", "copy"),
        gone("copy/tokenizer.json"),
    ),
    _w("an adapter as a model", "convert import lora out", "lora: a LoRA adapter, not a model", _LORA),
    _w(
        "an adapter without weights",
        "convert merge-adapter model lora out",
        "adapter_model.safetensors: missing",
        _LORA,
    ),
    _w(
        "an adapter's patterns in a list",
        "convert merge-adapter model lora out",
        "adapter_config.json: rank_pattern is ['q_proj']; expected an object",
        put("lora/adapter_config.json", '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": ["q_proj"]}'),
    ),
]
