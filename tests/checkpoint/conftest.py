"""One process as a world of its own, and small folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusemega.runtime.parallel import ParallelConfig, World, initialize

SETTINGS: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def world() -> World:
    """A world of this one process."""
    return initialize(ParallelConfig())


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "20KB", **settings: Any) -> Path:
    """A random Llama in `folder`, in several shards; `settings` replace or extend SETTINGS."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SETTINGS | settings))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fp32, untied model in several shards."""
    return save_llama(tmp_path / "model")
