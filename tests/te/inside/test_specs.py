"""Transformer Engine's layer spec beside the local one: the same weights under other names, the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.packed_seq_params import PackedSeqParams

from fusemega.checkpoint.torch_dist import load_model, save_model
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models.build import GPT, build_model, init_random, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import World
from fusemega.runtime.precision import LOCAL, Kernels
from fusemega.runtime.segments import known
from tests.checkpoint.conftest import SETTINGS, save_llama
from tests.distributed.launch import run_ranks

TE = Kernels(transformer_engine=True)
DELAYED = Kernels(transformer_engine=True, fp8={"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 3})
CONFIG: dict[str, Any] = {"model_type": "llama", **SETTINGS}


def drawn(world: World, kernels: Kernels, seed: int = 3, dtype: torch.dtype = torch.float32) -> GPT:
    model = build_model(architecture_of(CONFIG), world, dtype, kernels)
    init_random(model, world, seed)
    return model


def by_hf_name(model: GPT, world: World) -> dict[str, torch.nn.Parameter]:
    return {next(iter(placement.rule.hf_shapes())): placement.parameter for placement in placements(model, world)}


def sharded(model: GPT) -> dict[str, tuple[Any, ...]]:
    """Key and place of every weight's shard."""
    found = {}
    for value in model.sharded_state_dict().values():
        if hasattr(value, "key") and not value.key.endswith("_extra_state"):
            made = value.build() if isinstance(value, ShardedTensorFactory) else value
            parts = made.values() if isinstance(made, dict) else made if isinstance(made, list) else [made]
            for part in parts:
                found[f"{part.key} {part.global_offset}"] = (part.global_shape, part.local_shape, part.dtype)
    return found


def test_weights_have_the_same_shapes_and_marks(world: World) -> None:
    local, te = (by_hf_name(drawn(world, kernels), world) for kernels in (LOCAL, TE))
    assert local.keys() == te.keys() and len(te) == 15
    for name, parameter in te.items():
        assert torch.equal(parameter, local[name])
        for mark in ("tensor_model_parallel", "partition_dim"):
            assert getattr(parameter, mark, None) == getattr(local[name], mark, None), f"{name}: {mark}"
        assert bool(getattr(parameter, "sequence_parallel", False)) is False


def test_norms_are_fused(world: World) -> None:
    names = {name for name, _ in drawn(world, TE).named_parameters()}
    assert "chunks.0.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    assert "chunks.0.decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    assert not [name for name in names if "input_layernorm" in name or "pre_mlp_layernorm" in name]


def test_shards_have_the_same_keys_and_places(world: World) -> None:
    local, te = (sharded(drawn(world, kernels)) for kernels in (LOCAL, TE))
    assert te == local and len(te) > 15


def test_hugging_face_and_back_is_bitwise(world: World, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", dtype=torch.bfloat16)
    model = build_model(HFFolder(folder).architecture, world, torch.bfloat16, TE)
    load_hf(model, folder, world)
    export_hf(model, tmp_path / "out", folder, world)
    assert HFFolder(tmp_path / "out").content_hash() == HFFolder(folder).content_hash()


@pytest.mark.parametrize(
    ("saved", "loaded"), [(LOCAL, TE), (TE, LOCAL), (TE, TE), (LOCAL, DELAYED), (DELAYED, LOCAL), (DELAYED, TE)]
)
def test_checkpoints_load_bitwise_into_either(saved: Kernels, loaded: Kernels, world: World, tmp_path: Path) -> None:
    source, target = (drawn(world, kernels, seed, torch.bfloat16) for kernels, seed in ((saved, 3), (loaded, 4)))
    before = by_hf_name(source, world)
    assert not torch.equal(by_hf_name(target, world)["lm_head.weight"], before["lm_head.weight"])
    save_model(source, tmp_path)
    load_model(target, tmp_path)
    for name, parameter in by_hf_name(target, world).items():
        assert torch.equal(parameter, before[name]), name


def scales(model: GPT) -> Any:
    return model.chunks[0].decoder.layers[1].mlp.linear_fc1.fp8_meta


def test_delayed_scaling_keeps_its_scales_and_no_other_model_unpickles_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.module import base

    source = drawn(world, DELAYED)
    with torch.no_grad(), get_fp8_context(source.config):  # as the first forward pass does
        source.chunks[0].decoder.layers[1].mlp.linear_fc1.init_fp8_metadata()
    scales(source)["scaling_fwd"].scale.fill_(8.0)
    scales(source)["scaling_bwd"].amax_history.fill_(5.0)
    save_model(source, tmp_path)

    target = drawn(world, DELAYED)
    load_model(target, tmp_path)
    assert scales(target)["scaling_fwd"].scale.eq(8.0).all()
    assert scales(target)["scaling_bwd"].amax_history.eq(5.0).all()
    assert len(scales(target)["scaling_bwd"].amax_history) == 3

    monkeypatch.setattr(base.pickle, "loads", lambda data: pytest.fail("unpickled"))
    load_model(drawn(world, TE), tmp_path)
    load_model(drawn(world, LOCAL), tmp_path)


def test_bf16_logits_are_those_of_local_layers(world: World) -> None:
    texts = [list(range(n)) for n in (7, 1, 12)]
    local, te = (dense_logits(drawn(world, kernels), world, texts) for kernels in (LOCAL, TE))
    assert local is not None and te is not None and local.abs().max() > 0.01
    torch.testing.assert_close(te, local, atol=1e-6, rtol=0)


SIZES = SETTINGS | {"num_hidden_layers": 4, "rms_norm_eps": 1e-5}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_the_same_weights_shards_and_logits(model_type: str, world: World, tmp_path: Path) -> None:
    config = {"model_type": model_type, **SIZES, **FAMILIES[model_type]}
    local, te = (build_model(architecture_of(config), world, torch.float32, kernels) for kernels in (LOCAL, TE))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.normal_(std=0.3)
    (tmp_path / "source").mkdir()
    export_hf(local, tmp_path / "local", tmp_path / "source", world)
    load_hf(te, tmp_path / "local", world)
    export_hf(te, tmp_path / "te", tmp_path / "source", world)
    assert HFFolder(tmp_path / "te").content_hash() == HFFolder(tmp_path / "local").content_hash()
    assert sharded(te) == sharded(local)
    texts = [list(range(n)) for n in (17, 1, 6)]
    wanted, got = (dense_logits(model, world, texts) for model in (local, te))
    assert wanted is not None and got is not None and wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    # A prompt of 6 tokens with responses of 3 and 4, and a text of 2.
    bounds, prefixes = (0, 6, 9, 13, 15), ((0, 0), (0, 6), (0, 6), (0, 0))
    cu = known(torch.tensor(bounds, dtype=torch.int32), bounds, prefixes)
    row = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=10, max_seqlen_kv=10)
    positions = torch.tensor([*range(9), *range(6, 10), 0, 1])[None]
    with torch.no_grad():  # torch has the backward pass of this attention on GPUs only
        wanted, got = (
            model.eval().chunks[0](torch.arange(15)[None], positions, None, packed_seq_params=row)
            for model in (local, te)
        )
    assert wanted.shape == (15, 1, SIZES["hidden_size"]) and wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_two_ranks_with_sequence_parallelism(tmp_path: Path) -> None:
    save_llama(tmp_path / "model", dtype=torch.bfloat16)
    for found in run_ranks(Path(__file__).parent / "worker_tp2.py", 2, str(tmp_path)):
        assert found["marks"]["local"] == found["marks"]["te"] and found["marks"]["te"]
        assert found["shards"]["local"] == found["shards"]["te"]
        assert found["logit_difference"] <= 1e-5 < found["largest_logit"]
        assert found["same_bits"] and found["resharded"]
