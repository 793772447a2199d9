"""The small random models of `parity.py`, and the layouts of each."""

from __future__ import annotations

from typing import Any

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
TINY: dict[str, dict[str, Any]] = {
    "tiny-mha-untied": {"vocab_size": 263, "num_attention_heads": 4},
    "tiny-gqa-tied": {"vocab_size": 509, "num_attention_heads": 8, "tie_word_embeddings": True},
    "tiny-llama3-rope": {"vocab_size": 258, "num_attention_heads": 8, "rope_parameters": ROPE_LLAMA3},
    "tiny-head-dim": {"vocab_size": 251, "num_attention_heads": 4, "head_dim": 24},
    "tiny-mistral": {"model_type": "mistral", "vocab_size": 257, "num_attention_heads": 8, "sliding_window": 16},
    "tiny-qwen2": {"model_type": "qwen2", "vocab_size": 263, "num_attention_heads": 8, "tie_word_embeddings": True},
    "tiny-qwen2-window": {
        "model_type": "qwen2",
        "vocab_size": 258,
        "num_attention_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "tiny-qwen3": {"model_type": "qwen3", "vocab_size": 251, "num_attention_heads": 8, "head_dim": 24},
    "tiny-one-kv-head": {"vocab_size": 263, "num_attention_heads": 8, "num_key_value_heads": 1},
    "tiny-qwen2-yarn": {
        "model_type": "qwen2",
        "vocab_size": 257,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    },
    "tiny-dynamic-rope": {
        "vocab_size": 251,
        "num_attention_heads": 8,
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "tiny-phi3": {
        "model_type": "phi3",
        "vocab_size": 258,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 24,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 6.0, 12.0],
        },
    },
    "tiny-gemma2": {
        "model_type": "gemma2",
        "vocab_size": 257,
        "num_attention_heads": 8,
        "head_dim": 24,
        "sliding_window": 16,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "tiny-gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262,
        "num_attention_heads": 8,
        "head_dim": 16,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "tiny-mixtral": {
        "model_type": "mixtral",
        "vocab_size": 257,
        "num_attention_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    "tiny-qwen3-moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 251,
        "num_attention_heads": 8,
        "head_dim": 24,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [2],
    },
}
EXPERTS = ("tiny-mixtral", "tiny-qwen3-moe")

_TP2, _TP4 = ({"tensor_model_parallel_size": size} for size in (2, 4))
_PP2, _PP4 = ({"pipeline_model_parallel_size": size} for size in (2, 4))
_EP2, _EP4 = ({"expert_model_parallel_size": size} for size in (2, 4))
_ETP1, _ETP2 = ({"expert_tensor_parallel_size": size} for size in (1, 2))
_SP = {"sequence_parallel": True}
_VPP2 = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
_ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
# Of four processes; what is left of them is data parallel.
TINY_LAYOUTS: list[dict[str, Any]] = [
    {},
    _TP2,
    _TP2 | _SP,
    _TP4 | _SP,
    _PP2,
    _PP4,
    _TP2 | _SP | _PP2,
    _PP2 | _VPP2,
]
EXPERT_LAYOUTS: list[dict[str, Any]] = [
    {},
    _EP2,
    _EP2 | _ALLGATHER,
    _EP4,
    _EP2 | _ETP2,
    _TP2 | _SP,
    _TP2 | _SP | _EP2,
    _TP2 | _SP | _EP4 | _ETP1,
    _TP4 | _SP | _ETP1,
    _PP2 | _EP2,
    _PP2 | _VPP2 | _EP2,
    _TP2 | _SP | _PP2 | _EP2 | _ETP1,
]
# Of six.
_TP3 = {"tensor_model_parallel_size": 3}
REAL_LAYOUTS: list[dict[str, Any]] = [{}, _TP3, _TP3 | _SP, _PP2, _TP3 | _SP | _PP2]
