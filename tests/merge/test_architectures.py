"""Models of one family that compute otherwise are not merged, whatever the names and shapes of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.merge.plan import _check_architecture


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gemma2", {"final_logit_softcapping": 20.0}, "softcap is 20.0, and 30.0 in"),
        ("gemma2", {"attn_logit_softcapping": None}, "attention_softcap is None, and 50.0 in"),
        ("gemma3_text", {"rope_local_base_freq": 20000.0}, "rotary positions differ"),
    ],
)
def test_models_that_compute_otherwise_are_not_merged(
    model_type: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    for name, settings in (("one", {}), ("same", {}), ("other", change)):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **settings))
        model.save_pretrained(tmp_path / name)
    one, same, other = (HFFolder(tmp_path / name) for name in ("one", "same", "other"))
    _check_architecture([one, same])
    with pytest.raises(UserError, match=message):
        _check_architecture([one, other])
