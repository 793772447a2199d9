"""`model_type` nemotron-nas: a Llama some of whose layers lack attention or MLP (`left_out.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusemega.errors import UserError
from fusemega.models.family import HFConfig
from fusemega.models.left_out import first_sizes
from fusemega.models.llama import Llama
from fusemega.models.parts import Layer
from fusemega.models.travelling_code import auto_map

MODEL_TYPE = "nemotron-nas"


class NemotronNas(Llama):
    """Read where all layers have blocks of the same sizes. `qkv_bias` gives query, key and value a bias.

    Published folders leave `num_key_value_heads` and `intermediate_size` to the blocks. Their `auto_map` is not used.
    """

    model_types: tuple[str, ...] = (MODEL_TYPE,)
    hf_class = "DeciLM"
    auto_map: Mapping[str, str] = auto_map(hf_class)
    known = frozenset({"qkv_bias"})

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        bias = hf_config.get("qkv_bias")
        if bias not in (None, False, True):
            raise UserError(f"config.json: qkv_bias = {bias!r}, expected true or false")
        super().check(_filled(hf_config))

    def transformer_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """See `Family.transformer_config`."""
        return super().transformer_config(_filled(hf_config)) | {"add_qkv_bias": bool(hf_config.get("qkv_bias"))}

    def layers(self, hf_config: HFConfig) -> Sequence[Layer]:
        """See `Family.layers`."""
        (layer,) = set(super().layers(_filled(hf_config)))
        assert layer.attention is not None
        layer = replace(layer, attention=replace(layer.attention, bias=bool(hf_config.get("qkv_bias"))))
        return [layer] * int(hf_config["num_hidden_layers"])


def _filled(hf_config: HFConfig) -> Mapping[str, Any]:
    """The configuration with the sizes that it leaves to `block_configs`."""
    found = first_sizes(hf_config)
    return {**hf_config, **{key: size for key, size in found.items() if hf_config.get(key) is None}}
