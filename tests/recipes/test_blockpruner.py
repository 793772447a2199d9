"""The recipe that prunes and heals: its graph, what it refuses, and (marker full) its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tiny
from fusemega import cli
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.recipes.registry import read_recipe, run_recipe
from tests.prune.conftest import order_of

RECIPE: dict[str, Any] = {
    "recipe": "blockpruner",
    "output_dir": "out",
    "load": "whole",
    "model": {"dtype": "fp32"},
    "blocks": 2,
    "order": "order.json",
    "data": "data.jsonl",
    "seq_length": 64,
    "held_out": "data.jsonl",
    "heal": {"lambda": 0.2, "control": True},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 1, "global_batch_size": 2},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, text, and an order."""
    monkeypatch.chdir(tmp_path)
    data = tiny.write_chat(Path("data.jsonl"), rows=4, characters=60)
    tiny.write_model(Path("whole"), data, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    order_of("mlp 0, mha 1, mlp 2").write(Path("order.json"))
    return tmp_path


def written(**changes: Any) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in (RECIPE | changes).items() if v is not None}))
    return "recipe.yaml"


def test_the_stages_and_their_settings(place: Path) -> None:
    recipe, settings = read_recipe(written(export="remote-code"))
    graph = recipe.graph(settings)
    assert [stage.name for stage in graph.stages] == [
        "prune-apply", "teach-whole", "control", "healed", "eval-whole", "eval-pruned", "eval-control", "eval-healed",
    ]  # fmt: skip
    stages = {stage.name: stage for stage in graph.stages}
    words = " ".join(stages["prune-apply"].argv)
    assert words == "prune apply whole order.json out/pruned --blocks 2 --export remote-code"
    assert stages["healed"].settings["objective"] == {"name": "distill", "store": "out/stores/whole", "lambda": 0.2}
    assert stages["control"].settings["objective"] == {"name": "sft"}
    assert graph.needs["healed"] == ["prune-apply", "teach-whole"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": None}, "order and search: give one of them"),
        ({"search": {}}, "order and search: give one of them"),
        ({"order": None, "search": {"blocks": 3}}, "search.blocks: the recipe says it"),
        ({"export": "plane"}, "unknown name 'plane'; allowed: plain, nemotron-nas, remote-code"),
        ({"model": {"load": "x"}}, "load is a key of its own"),
        ({"training": RECIPE["training"] | {"export_hf": False}}, "training.export_hf: false"),
    ],
)
def test_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(written(**changes))


@pytest.mark.full
@pytest.mark.parametrize(("export", "blocks"), [("plain", 2), ("remote-code", 3), ("nemotron-nas", 3)])
def test_prunes_and_heals(place: Path, export: str, blocks: int) -> None:
    recipe, settings = read_recipe(written(export=export, blocks=blocks))
    lines = run_recipe(recipe, settings)
    assert lines[-1] == "the result is out/healed/hf"
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["removed"] == ["mlp 0", "mha 1", "mlp 2"][:blocks]
    assert set(summary["bits_per_byte"]) == {"whole", "pruned", "control", "healed"}
    pruned, healed = HFFolder("out/pruned"), HFFolder("out/healed/hf")
    assert pruned.architecture.layers == healed.architecture.layers
    assert pruned.config["model_type"] == healed.config["model_type"]


SEARCH = {"data": {"path": "data.jsonl", "seq_length": 64}, "windows": "rows", "constraint": "plain"}


def test_a_search_is_a_stage_and_its_run_file_is_checked(place: Path) -> None:
    recipe, settings = read_recipe(written(order=None, search=SEARCH, nproc=2))
    search, apply, *_ = recipe.graph(settings).stages
    assert search.words() == ["prune", "search", "out/prune-search.yaml", "--nproc", "2"]
    assert (search.settings["blocks"], search.settings["output"]) == (2, "out/order")
    assert apply.inputs["order"] == search.outputs["order"] == "out/order/order.json"
    recipe, settings = read_recipe(written(order=None, search=SEARCH | {"measure": "perplexety"}))
    with pytest.raises(UserError, match="stage prune-search: measure"):
        recipe.graph(settings)


@pytest.mark.full
def test_searches_prunes_and_heals(place: Path) -> None:
    recipe, settings = read_recipe(written(order=None, search=SEARCH, heal={}, held_out=None))
    assert run_recipe(recipe, settings)[-1] == "the result is out/healed/hf"
    assert HFFolder("out/healed/hf").architecture.complete
    assert len(HFFolder("out/healed/hf").architecture.layers) == 2


def test_the_command_prunes_and_says_what_it_did(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["prune", "apply", "whole", "order.json", "pruned", "--blocks", "2"])
    assert not end.value.code
    out, said = capsys.readouterr()
    assert json.loads(out)["layers"] == [[0, 1], [2, 2]]
    assert "2 blocks removed" in said
