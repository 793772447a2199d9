"""Small models with experts under every layout of four ranks, against transformers: logits, gradients, bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fusemega.hf.folder import HFFolder
from tests.distributed.launch import run_ranks
from tests.distributed.test_families import Reference, assert_gradients, written
from tests.distributed.workers.families import MATRICES, SEQUENCES

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "vocab_size": 101, "num_local_experts": 8, "sliding_window": 6},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 99,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [2],
        "tie_word_embeddings": True,
    },
}
_FUSED = re.compile(r"(.*\.)mlp\.experts\.(gate_up_proj|down_proj)")


def in_files(name: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers holds the experts of a layer in two tensors; its files have three for each expert."""
    block, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2") if name == "mixtral" else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    out = {}
    for key, value in values.items():
        match = _FUSED.fullmatch(key)
        if match is None:
            out[key.replace("mlp.gate.", f"{block}.gate.")] = value
            continue
        for number, expert in enumerate(value):
            parts = {down: expert} if match[2] == "down_proj" else dict(zip((gate, up), expert.chunk(2), strict=True))
            out |= {f"{match[1]}{block}.experts.{number}.{part}.weight": matrix for part, matrix in parts.items()}
    return out


@pytest.mark.parametrize("matrix", ["experts", pytest.param("more experts", marks=pytest.mark.full)])
def test_logits_gradients_and_bits(tmp_path: Path, matrix: str) -> None:
    references = written(tmp_path, MODELS)
    ranks = run_ranks("families.py", 4, str(tmp_path), matrix)
    for name, reference in references.items():
        for layout in MATRICES[matrix]:
            check(tmp_path / name, layout, reference, [result[f"{name} {layout}"] for result in ranks])


def check(folder: Path, layout: str, reference: Reference, ranks: list[dict[str, Any]]) -> None:
    """What came out of one model in one layout."""
    made = folder.with_name(f"{folder.name}.{layout}")
    assert HFFolder(made).content_hash() == HFFolder(folder).content_hash()
    if "CP" not in layout:
        assert reference.logits_SV.abs().max() > 1
        torch.testing.assert_close(torch.load(f"{made}.logits.pt"), reference.logits_SV, atol=1e-4, rtol=1e-5)
    assert_gradients(Path(f"{made}.gradients"), in_files(folder.name, reference.gradients))
    if folder.name in SEQUENCES:
        assert_gradients(Path(f"{made}.sequences"), in_files(folder.name, reference.sequences))
        assert_gradients(Path(f"{made}.groups"), in_files(folder.name, reference.groups))
    for seen in ranks:
        assert seen["unequal"] == 0  # what tensor-parallel ranks hold twice has one gradient
        assert seen["norm"] == pytest.approx(reference.norm, rel=1e-5)
        assert all(error < 1e-5 for error in seen["hidden"].values())
