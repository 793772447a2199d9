"""One model under many layouts of four ranks: the same weights in, out and drawn, and a checkpoint that reshards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusemega.hf.folder import HFFolder
from tests.checkpoint.conftest import save_llama
from tests.distributed.launch import run_ranks

LAYOUTS = ["TP1PP1", "TP2PP1", "TP4PP1", "TP1PP2", "TP1PP4", "TP2PP2", "TP2PP2 virtual", "TP1PP2 uneven"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    work = tmp_path_factory.mktemp("weights")
    for kind in ("tied", "untied"):
        save_llama(
            work / f"model-{kind}",
            tie_word_embeddings=kind == "tied",
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2 if kind == "tied" else 1,  # fewer than ranks of TP 4, and of TP 2
        )
    return work, run_ranks("weights.py", 4, str(work))


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_weights_it_read(
    ranks: tuple[Path, list[dict[str, Any]]], kind: str, layout: str
) -> None:
    work, results = ranks
    assert results[0][f"{kind} {layout}"]["loaded_hash"] == HFFolder(work / f"model-{kind}").content_hash()
    assert all(result[f"{kind} {layout}"]["padding"] for result in results)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_random_weights_are_the_same_under_every_layout(ranks: tuple[Path, list[dict[str, Any]]], kind: str) -> None:
    work, results = ranks
    hashes = {results[0][f"{kind} {layout}"]["random_hash"] for layout in LAYOUTS}
    assert len(hashes) == 1
    assert hashes != {HFFolder(work / f"model-{kind}").content_hash()}


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(ranks: tuple[Path, list[dict[str, Any]]], kind: str, layout: str) -> None:
    work, results = ranks
    hf = AutoModelForCausalLM.from_pretrained(work / f"model-{kind}", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = torch.cat([hf(torch.arange(n)[None]).logits[0] for n in (9, 7)]).double().sum(1)
    seen = [result[f"{kind} {layout}"]["logits"] for result in results]
    last_stage = [sums for sums in seen if sums is not None]
    assert len(last_stage) == 4 // int(layout[5])
    for sums in last_stage:
        torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), wanted, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_norm_counts_split_matrices_on_every_rank(
    ranks: tuple[Path, list[dict[str, Any]]], layout: str
) -> None:
    _, results = ranks
    tp, pp = int(layout[2]), int(layout[5])
    for rank, result in enumerate(results):
        seen = result[f"untied {layout}"]
        stage = rank * pp // 4
        layers = (1, 3)[stage] if "uneven" in layout else 4 // pp
        matrices = 4 * layers + (stage == 0) + (stage == pp - 1)
        norms = 2 * layers + (stage == pp - 1)
        assert seen["split"] == matrices
        assert seen["counted"] == matrices + (norms if rank % tp == 0 else 0)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_imports_load_as_the_folder_does(ranks: tuple[Path, list[dict[str, Any]]], kind: str, layout: str) -> None:
    """Of the streaming import, and of what megatron-core wrote under TP 2 x PP 2: into every layout and its padding."""
    _, results = ranks
    assert [result[f"{kind} {layout}"]["loads_equal"] for result in results] == [[True, True]] * 4


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("other", ["megatron", "saved", "exported"])
def test_what_any_layout_has_written_is_read_without_a_model(
    ranks: tuple[Path, list[dict[str, Any]]], kind: str, other: str
) -> None:
    _, results = ranks
    found = results[0][f"{kind} {other}"]
    assert found["identical"] and found["tensors"] == (38 if kind == "tied" else 39)
