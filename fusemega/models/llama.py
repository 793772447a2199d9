"""The Llama family: Llama 1 to 3.2, and what shares its `model_type`: SmolLM2, SOLAR, Yi."""

from __future__ import annotations

from fusemega.models.dense import DenseDecoder


class Llama(DenseDecoder):
    """`model_type` llama: the unchanged dense decoder."""

    model_types: tuple[str, ...] = ("llama",)
    hf_class = "Llama"
    required_values = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "rope_interleaved": (False,),
    }
