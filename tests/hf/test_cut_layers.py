"""Layers left out of a model whose configuration speaks of single layers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusemega.hf.cut_layers import cut_layers
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import World
from tests.checkpoint.conftest import SETTINGS

FULL, WINDOWED = "full_attention", "sliding_attention"


def test_each_layer_keeps_its_window_and_transformers_agrees(world: World, tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 3, "layer_types": [FULL, WINDOWED, FULL, WINDOWED]}
    config = AutoConfig.for_model("qwen2", **SETTINGS | {"num_hidden_layers": 4} | windows)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    cut_layers(tmp_path / "whole", tmp_path / "cut", {0, 3}, world)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert cut.config.layer_types == [WINDOWED, FULL]
    settings = architecture_of(cut.config.to_dict()).transformer_config
    assert (settings["window_size"], settings["window_attn_skip_freq"]) == ((2, 0), [1, 0])
    whole.model.layers = whole.model.layers[1:3]
    whole.config.num_hidden_layers, whole.config.layer_types = 2, [WINDOWED, FULL]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
