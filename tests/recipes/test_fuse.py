"""FuseChat's graph: who needs whom, what is printed, what another setting would rerun. Nothing is run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml

from benchmarks import tiny
from fusemega import cli
from fusemega.errors import UserError
from fusemega.pipeline.record import Contents, StageRecord, made_from, write_record
from fusemega.pipeline.verdict import plan
from fusemega.recipes.registry import read_recipe
from fusemega.recipes.steps import Steps

RECIPE = {
    "output_dir": "out",
    "nproc": 2,
    "target": "target",
    "sources": {"alike": "alike", "other": "other"},
    "model": {"dtype": "fp32"},
    "data": "data.jsonl",
    "held_out": "data.jsonl",
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 1, "global_batch_size": 2},
    "merge": {"merge_method": "linear"},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a target, a source of its tokenizer and one of another."""
    monkeypatch.chdir(tmp_path)
    data = tiny.write_chat(Path("data.jsonl"), rows=4, characters=60)
    for name, size in (("target", 300), ("alike", 300), ("other", 280)):
        tiny.write_model(Path(name), data, vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert not end.value.code
    return capsys.readouterr().out


def test_who_needs_whom_and_what_reruns(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, settings = read_recipe("recipe.yaml")
    graph = recipe.graph(settings)
    assert graph.needs == {
        "split": [],
        "teach-target": ["split"],
        "teach-alike": ["split"],
        "teach-other": ["split"],
        "align-other": [],
        "target-alike": ["split", "teach-target", "teach-alike"],
        "target-other": ["split", "teach-target", "teach-other", "align-other"],
        "merge": ["target-alike", "target-other"],
        "eval-target": [],
        "eval-alike": [],
        "eval-other": [],
        "eval-target-alike": ["target-alike"],
        "eval-target-other": ["target-other"],
        "eval-merged": ["merge"],
    }
    assert "\n    $ fusemega teach out/teach-alike.yaml --nproc 2\n" in said(capsys, "show", "stages", "recipe.yaml")
    # What is merged stays in fp32 and is rounded once, at the end.
    runs_of = {stage.name: stage.settings for stage in graph.stages}
    assert runs_of["target-alike"]["training"]["export_dtype"] == "fp32" and runs_of["merge"]["dtype"] == "float32"
    dry = said(capsys, "run", "recipe.yaml", "--dry-run")
    assert dry.count("run: new") == 14 and "$ fusemega merge out/merge.yaml out/merged --resume\n" in dry
    assert not Path("out").exists()
    for stage in graph.stages:  # as if all had run
        for path in map(Path, stage.outputs.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stage.name))
    for stage in graph.stages:
        contents = Contents(graph)
        inputs, outputs = ({name: contents.of(p) for name, p in of.items()} for of in (stage.inputs, stage.outputs))
        write_record(graph, stage, StageRecord("finished", made_from(stage), inputs, [], outputs))
    for overrides, reruns in (
        ([], []),
        (["align.kind=exact"], ["align-other", "target-other", "merge", "eval-target-other", "eval-merged"]),
        (
            ["sources.alike.load=alike", "sources.alike.teach.top_k=3"],
            ["teach-alike", "target-alike", "merge", "eval-target-alike", "eval-merged"],
        ),
        (["sources.third=alike"], ["split", "teach-third", "target-third", "merge", "eval-third"]),
        (["output_dir=./out"], []),
    ):
        found = plan(recipe.graph(read_recipe("recipe.yaml", overrides)[1]))
        runs = {name: one.reason for name, one in found.items() if one.action == "run"}
        if overrides == ["sources.third=alike"]:
            assert set(reruns) <= runs.keys() and "align-other" not in runs and "eval-other" not in runs
            assert runs["teach-target"] == "its input data (of split) may change"
        else:
            assert list(runs) == reruns, runs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor_model_parallel_size=3", "nproc=3"], "tensor_model_parallel_size: 3 does not divide"),
        (["parallel.tensor_model_parallel_size=2", "nproc=3"], "does not divide the 3 process"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_before_any_stage(
    place: Path, overrides: list[str], message: str
) -> None:
    recipe, settings = read_recipe("recipe.yaml", overrides)
    with pytest.raises(UserError, match=message):
        recipe.graph(settings)


def test_the_module_names_the_command() -> None:
    with pytest.raises(SystemExit, match="fusemega run RECIPE.yaml"):
        runpy.run_module("fusemega.recipes.fusion", run_name="__main__")


def test_the_reference_of_a_loss_is_an_input_of_its_stage(tmp_path: Path) -> None:
    steps = Steps(tmp_path, nproc=1, parallel={}, model={"dtype": "fp32"})
    (tmp_path / "model").mkdir()
    data, model = {"path": "pairs.jsonl"}, str(tmp_path / "model")
    store = steps.teach("reference", model, data, rows="none")
    for name, reference in (("stored", {"store": store}), ("beside", {"in_job": {"load": model}})):
        steps.train(name, model, data, {"name": "dpo", "reference": reference}, {}, {})
    taught, stored, beside = steps.stages
    assert stored.inputs["reference"] == taught.outputs["store"] and beside.inputs["reference"] == model
