"""Recipes from prompts to a trained model: the graph, what is refused before it begins, and the stages in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tiny
from fusemega.errors import UserError
from fusemega.pipeline.scope import Scope
from fusemega.pipeline.verdict import plan
from fusemega.recipes.divide import divide, hold_out
from fusemega.recipes.registry import read_recipe

DOMAINS = ("instruction", "maths")
ENGINE = {"name": "transformers", "load": "model", "dtype": "fp32", "batch_size": 2}
TRAINED = {
    "seq_length": 512,
    "optimizer": {"lr": 1e-5},
    "training": {"train_iters": 2, "global_batch_size": 2},
}
RECIPE: dict[str, Any] = {
    "recipe": "fusechat3",
    "output_dir": "out",
    "target": "model",
    "model": {"dtype": "fp32"},
    "prompts": "prompts.jsonl",
    "sources": {
        "warm": {"engine": ENGINE, "sampling": {"temperature": 1.0}},
        "cool": {"engine": ENGINE, "sampling": {"temperature": 0.7, "top_p": 0.9}},
    },
    "sampling": {"n": 2, "max_tokens": 6},
    "keep_length": True,
    "reward": {"model": {"load": "rewarding", "dtype": "fp32", "seq_length": 512}},
    "sft": TRAINED,
    "preference": TRAINED,
    "evaluation": {"held_out": 0.3},
}


def prompts(domain: str | None, *texts: str) -> list[dict[str, Any]]:
    named = {} if domain is None else {"domain": domain}
    return [{"prompt": [{"role": "user", "content": text}], **named} for text in texts]


def write(path: Path | str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that can be opened, prompts, and a recipe."""
    monkeypatch.chdir(tmp_path)
    write("prompts.jsonl", prompts("instruction", "a", "b") + prompts("maths", "1+1?"))
    data = tiny.write_chat(Path("data.jsonl"), rows=2, characters=40)
    for name in ("model", "rewarding"):
        tiny.write_model(Path(name), data, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return tmp_path


def graph_of(*overrides: str) -> Any:
    recipe, settings = read_recipe("recipe.yaml", list(overrides))
    return recipe.graph(settings)


MAIN = ["sample-warm", "sample-cool", "collect-sources", "score-sources", "select-sources", "sft"]
LAST = ["held-out", "teach-reference", "preference"]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["recipe=fusechat3"], ["prompts", *MAIN, *LAST]),
        (["recipe=fuserl"], ["prompts", *MAIN, *LAST]),
        (
            ["recipe=wrpo"],
            ["prompts", *MAIN, "sample-own", "collect-own", "score-own", "select-own", *LAST],
        ),
        (
            ["recipe=fuserl", "preference.objective={loss_type: simpo, gamma_beta_ratio: 0.3}"],
            ["prompts", *MAIN, "held-out", "preference"],
        ),
    ],
)
def test_stages_of_a_recipe(place: Path, overrides: list[str], stages: list[str]) -> None:
    graph = graph_of(*overrides)
    names = [stage.name for stage in graph.stages]
    measured = [f"eval-held-out-{model}" for model in ("target", "sft", "preference")]
    assert names == [*stages, *measured]
    assert graph.needs["preference"][:2] == ["sft", "held-out"] and graph.needs["sft"] == ["select-sources"]
    assert not Path("out").exists()
    settings = {stage.name: stage.settings for stage in graph.stages}
    # Between the stages nothing is rounded; the result has the target's dtype.
    exported = [settings[name]["training"]["export_dtype"] for name in ("sft", "preference")]
    assert exported == ["fp32", "fp32"]


def test_a_domain_is_a_part_with_its_own_number_of_responses(place: Path) -> None:
    graph = graph_of("domains={instruction: {}, maths: {n: 8}}", "sources.cool.domains=[maths]")
    sampled = {s.name: s.settings["sampling"]["n"] for s in graph.stages if s.name.startswith("sample")}
    assert sampled == {"sample-warm-instruction": 2, "sample-warm-maths": 8, "sample-cool-maths": 8}
    assert graph.needs["collect-instruction"] == ["prompts", "sample-warm-instruction"]
    assert graph.needs["score-sources"] == ["collect-instruction", "collect-maths"]
    assert graph.named("--until", "sample") == list(sampled)
    left = {name for name, one in plan(graph, Scope.of(graph, "collect-maths", None)).items() if one.action != "leave"}
    assert left == {"prompts", "sample-warm-maths", "sample-cool-maths", "collect-maths"}


RULES = [{"name": "length", "max": 40}]
JUDGE = {"engine": {"name": "openai", "base_url": "http://localhost:1/v1", "model": "judge"}}


@pytest.mark.parametrize(
    ("reward", "stage"), [({"rules": RULES}, "rules-sources"), ({"judge": JUDGE}, "judge-sources")]
)
def test_what_is_verified_rewarded_and_measured(place: Path, reward: dict[str, Any], stage: str) -> None:
    write("sums.jsonl", [{"question": "1+1?", "answer": "2"}])
    tasks = {"tasks": {"sums": {"name": "gsm8k", "data": {"path": "sums.jsonl"}}}}
    recipe = RECIPE | {"reward": reward, "verify": {"workers": 1}, "evaluation": {"tasks": tasks}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    graph = graph_of()
    assert graph.needs[stage] == ["verify-sources"] and graph.needs["select-sources"] == [stage]
    settings = {one.name: one.settings for one in graph.stages}
    assert settings["tasks-sft"]["engine"] == {"dtype": "fp32", "name": "transformers", "load": "out/sft/hf"}
    measured = {one.name: set(one.inputs) for one in graph.stages if one.name.startswith("tasks-")}
    assert measured == {f"tasks-{model}": {"model", "tasks.sums"} for model in ("target", "sft", "preference")}
    with pytest.raises(UserError, match="engine: each model is run in this process"):
        graph_of("evaluation.tasks.engine.load=model")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sources.cool.domains=[math]"], "unknown name 'math'; allowed: none, because the recipe has no domains"),
        (["domains.maths={}", "sources.cool.domains=[math]"], "unknown name 'math' (did you mean 'maths'?)"),
        (["sources={target: {responses: x.jsonl}}"], "sources: 'target' names files"),
        (["sources={a: {}}"], "sources.a: give exactly one of engine and responses"),
        (["sources={a: {engine: {name: transformer}}}"], "unknown name 'transformer' (did you mean 'transformers'?)"),
        (["sources.cool.sampling.temperatur=1"], "sources.cool.sampling.temperatur: unknown key (did you mean"),
        (["sources.cool.sampling.temperature=0"], "sources.cool.sampling."),
        (["reward.judge={}"], "reward: give exactly one of model, judge and rules"),
        (["preference.objective.bta=1"], "stage preference: objective.bta: unknown key"),
        (["sft.training.export_hf=false"], "training.export_hf: false"),
        (["evaluation.training.interval=1", "evaluation.held_out=0"], "there are no held-out rows to score"),
        (["select.min_margin=2"], "select: max_margin 0.1 is less than min_margin"),
        (["prompts=prompt.jsonl"], "prompt.jsonl: no such file or folder, and no stage makes it"),
        (["sources={a: {responses: x.jsonl}}"], "x.jsonl: no such file or folder"),
        (["recipe=wrpo", "own.engine={name: transformers, load: model}"], "own.engine: load is the SFT model"),
        (["recipe=wrpo", "select.target=own"], "select.target: the recipe sets it"),
        (["recipe=fuserl", "sft.objective.alpha=1"], "sft.objective.alpha: give select.alpha"),
        (["recipe=fusechat"], "unknown name 'fusechat' (did you mean 'fusechat3'?)"),
    ],
)
def test_mistakes_are_named_before_anything_runs(place: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        graph_of(*overrides)
    assert words in str(refused.value)
    assert not Path("out").exists()


def test_prompts_are_divided_by_domain(tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", str(tmp_path / "all.jsonl")
    write(path, prompts("instruction", "a", "b", "a") + prompts("maths", "1+1?"))
    domains = {name: str(tmp_path / f"{name}.jsonl") for name in DOMAINS}
    assert divide({"path": str(path)}, out, domains) == {"all": 3, "instruction": 2, "maths": 1}
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert rows == prompts("instruction", "a", "b") + prompts("maths", "1+1?")
    assert [json.loads(Path(domains["maths"]).read_text())] == prompts("maths", "1+1?")
    assert divide({"path": str(path)}, out, {}) == {"all": 3}
    with pytest.raises(UserError, match=r"prompts.jsonl:4: the row has the domain 'maths' \(did you mean 'math'\?\)"):
        divide({"path": str(path)}, out, {"instruction": "x", "math": "y"})
    with pytest.raises(UserError, match=r"domains.code: 3 prompts, and none of this domain"):
        divide({"path": str(path)}, out, {**domains, "code": "x"})
    write(path, prompts(None, "a"))
    with pytest.raises(UserError, match=r"prompts.jsonl:1: the row has no domain; allowed by `domains`: instruction"):
        divide({"path": str(path)}, out, domains)


def test_held_out_rows_depend_on_their_prompts_alone(tmp_path: Path) -> None:
    def responses(i: int) -> list[dict[str, Any]]:
        return [{"text": f"{name}{i}", "reward": reward} for name, reward in (("good", 2), ("bad", -1), ("fair", 1))]

    rows = [{**row, "responses": responses(i)} for i, row in enumerate(prompts(None, *"abcdefghij"))]
    found = []
    for order in (rows, rows[::-1]):
        write(tmp_path / "rows.jsonl", order)
        files = {key: tmp_path / f"{key}.jsonl" for key in ("kept", "held", "pairs")}
        told = hold_out(str(tmp_path / "rows.jsonl"), 0.3, **{key: str(path) for key, path in files.items()})
        assert told == {"kept": 7, "held": 3}
        kept, held, pairs = ([json.loads(line) for line in path.read_text().splitlines()] for path in files.values())
        assert [row for row in order if row in held] == held and [row for row in order if row not in held] == kept
        found.append(sorted(json.dumps(row) for row in held))
    assert found[0] == found[1]
    assert [pair["chosen"][0]["content"][:4] for pair in pairs] == ["good"] * 3
    assert [pair["rejected"][0]["content"][:3] for pair in pairs] == ["bad"] * 3
    write(tmp_path / "rows.jsonl", rows[:1])
    with pytest.raises(UserError, match="1 rows, of which evaluation.held_out takes at least one"):
        hold_out(str(tmp_path / "rows.jsonl"), 0.3, "a", "b", "c")
