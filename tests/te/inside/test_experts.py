"""Layers of experts: grouped products beside experts that are computed one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusemega.checkpoint.torch_dist_files import places
from fusemega.hf.folder import HFFolder
from fusemega.models.build import build_model
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import World
from tests.checkpoint.conftest import SETTINGS
from tests.distributed.launch import run_ranks
from tests.te.inside.test_specs import TE, sharded

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
    | {"mlp_only_layers": [1], "norm_topk_prob": False},
}


def test_two_ranks_have_the_same_weights_shards_logits_and_gradients(tmp_path: Path) -> None:
    for number, (name, settings) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SETTINGS, **settings)).float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.3)
        model.save_pretrained(tmp_path / name)
    for rank, found in enumerate(run_ranks(Path(__file__).parent / "worker_experts.py", 2, str(tmp_path))):
        for case, seen in found.items():
            assert not seen["marks"] and seen["shards"] and seen["loaded"], (rank, case, seen)
            assert seen["logits"] <= 1e-5 < seen["largest"], (rank, case, seen)
            assert seen["gradients"] <= 1e-5 and seen["te_norm"] == pytest.approx(seen["norm"], rel=1e-5), (case, seen)
            name, layout = case.split(" ", 1)
            exported = HFFolder(tmp_path / f"{name}.{layout}")
            assert exported.content_hash() == HFFolder(tmp_path / name).content_hash(), case
        assert any(seen["unused"] for seen in found.values())  # an expert without a token


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_writes_the_keys_that_grouped_products_read(name: str, world: World) -> None:
    architecture = architecture_of({"model_type": name, **SETTINGS, **MODELS[name]})
    model = build_model(architecture, world, torch.float32, TE)
    keys = {key.rsplit(" ", 1)[0].split(" ")[0] for key in sharded(model)}
    assert keys == {place.key for place in places(architecture)}
