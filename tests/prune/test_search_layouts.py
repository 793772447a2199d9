"""Under every layout the search finds the same order with the same perplexities, and every measure the same blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusemega.hf.cut_layers import cut_layers
from fusemega.prune.run_file import PruneRun
from fusemega.prune.search import search
from fusemega.runtime.parallel import ParallelConfig, initialize
from tests.distributed.launch import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
FULL_RUNS: dict[str, Any] = {"search": {"name": "exact", "early_stop": False}}
LAYOUTS: dict[str, Any] = {
    "DP2": [{}, FULL_RUNS],
    "TP2SP": [TP2 | {"sequence_parallel": True}, {}],
    "PP2 plain": [PP2, {"constraint": "plain", "blocks": 4}],
    "PP2 uneven": [PP2 | {"num_layers_in_first_pipeline_stage": 1}, {"cache_mib": 0}],
    "CP2": [{"context_parallel_size": 2}, {}],
    "DP2 racing": [{}, {"search": {"name": "racing"}}],
    "PP2 influence": [PP2, {"measure": "block_influence", "granularity": "block"}],
    "PP2 angle": [PP2, {"measure": "angular_distance", "blocks": 4}],
    "TP2 js": [TP2, {"measure": "js_divergence"}],
}


def test_as_in_one_process(work: Path, make_run: Callable[..., PruneRun]) -> None:
    everywhere = run_ranks("prune_search.py", 2, str(work), json.dumps(LAYOUTS))
    assert everywhere[0] == everywhere[1], "every rank gets the result"
    alone = {name: search(make_run(**changes))[0] for name, (_, changes) in LAYOUTS.items()}
    for name, wanted in alone.items():
        found = everywhere[0][name]
        assert found["order"] == wanted.order, name
        assert found["perplexities"] == pytest.approx(wanted.perplexities, rel=1e-4)
        assert found["dense"] == pytest.approx(wanted.dense_perplexity, rel=1e-4)
        assert list(found["evaluated"].values()) == pytest.approx(
            [wanted.dense_perplexity, wanted.perplexities[2]], rel=1e-4
        )
    # Candidates are dealt over replicas: each is run once. The whole model runs on both.
    windows = alone["DP2"].work.head_runs // (1 + 8 + 7 + 6)
    assert everywhere[0]["DP2"]["head_runs"] == windows * (2 + 8 + 7 + 6)


@pytest.mark.full
def test_real_weights_on_three_ranks(
    tmp_path: Path, work: Path, make_run: Callable[..., PruneRun], smollm2_folder: Path
) -> None:
    cut_layers(smollm2_folder, tmp_path / "model", range(3, 27), initialize(ParallelConfig()))
    (tmp_path / "texts.jsonl").symlink_to(work / "texts.jsonl")
    layouts = {"TP3": [{"tensor_model_parallel_size": 3}, {}]}
    (found, *_) = run_ranks("prune_search.py", 3, str(tmp_path), json.dumps(layouts))
    wanted, _ = search(make_run(model={"load": str(tmp_path / "model")}))
    assert found["TP3"]["order"] == wanted.order
    assert found["TP3"]["perplexities"] == pytest.approx(wanted.perplexities, rel=1e-4)
