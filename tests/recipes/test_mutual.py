"""Mutual-Taught before anything runs: its graph, what is refused; and its stages in Python."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusemega.errors import UserError
from fusemega.pipeline.call import main
from fusemega.pipeline.record import Contents, StageRecord, made_from, write_record
from fusemega.pipeline.run import Outcome
from fusemega.pipeline.stage import Stop
from fusemega.pipeline.verdict import plan_lines
from fusemega.recipes.mutual_policy import Answers, checkpoints_of, choose_policy, split_prompts
from fusemega.recipes.mutual_reward import make_reward_set
from fusemega.recipes.registry import read_recipe
from fusemega.sampling.prompts import prompt_key
from fusemega.switch.run_file import LabelSettings
from tests.recipes.small import write_tiny_models
from tests.recipes.test_implicit import prompts, write

TRAINED: dict[str, Any] = {
    "seq_length": 256,
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 2, "global_batch_size": 2},
}
MUTUAL: dict[str, Any] = {
    "recipe": "mutual_taught",
    "output_dir": "out",
    "target": "model",
    "model": {"dtype": "fp32"},
    "prompts": "prompts.jsonl",
    "splits": {"selection": 4},
    "reward_model": {"load": "rewarding", "dtype": "fp32", "seq_length": 256},
    "engine": {"name": "transformers", "dtype": "fp32", "batch_size": 1},
    "sampling": {"n": 3, "max_tokens": 12, "temperature": 0.8, "top_p": 0.95},
    "keep_length": True,  # a model of random weights seldom ends a response
    "tau": 0.0,
    "policy": {**TRAINED, "training": {**TRAINED["training"], "save_interval": 1}},
    "reward": TRAINED,
    "evaluation": {"held_out": 0.3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny_models()
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "rewarding"):
        (tmp_path / name).symlink_to(models / name)
    write("prompts.jsonl", prompts(None, *(f"{i}?" for i in range(16))))
    Path("recipe.yaml").write_text(yaml.safe_dump(MUTUAL, sort_keys=False))
    return tmp_path


def graph_of(*overrides: str) -> Any:
    recipe, settings = read_recipe("recipe.yaml", list(overrides))
    return recipe.graph(settings)


def of_policy(t: int) -> list[str]:
    first = [f"{stage}-policy-{t}" for stage in ("sample", "collect", "score", "select", "teach")]
    return [*first, f"policy-{t}", f"compare-{t}", f"choose-{t}", f"eval-drift-{t}-start"]


def of_reward(t: int) -> list[str]:
    first = [f"sample-reward-{t}-new", f"sample-reward-{t}-old", f"collect-reward-{t}", f"score-reward-{t}"]
    return [*first, f"pairs-reward-{t}", f"reward-{t}", f"score-held-out-{t}"]


def test_the_graph_has_every_iteration_that_may_come(place: Path) -> None:
    graph = graph_of()
    assert [s.name for s in graph.stages] == [
        "splits", *of_policy(1), *of_reward(1), *of_policy(2), "eval-drift-2-before",
    ]  # fmt: skip
    assert graph.needs["compare-1"] == ["policy-1", "splits"]
    assert graph.needs["choose-1"] == ["policy-1", "compare-1"]
    assert graph.needs["sample-reward-1-new"] == ["splits", "choose-1"]
    assert graph.needs["sample-reward-1-old"] == ["splits", "choose-1"], "not before it is needed"
    assert graph.needs["pairs-reward-1"] == ["score-reward-1", "select-policy-1"]
    assert graph.needs["sample-policy-2"] == ["splits", "choose-1"]
    assert "reward-1" in graph.needs["score-policy-2"] and "reward-1" in graph.needs["compare-2"]
    assert not Path("out").exists()


def test_the_reward_model_always_starts_from_the_base(place: Path) -> None:
    write("pairs.jsonl", [])
    graph = graph_of("iterations=3", "last_reward=true", "evaluation.pairs=pairs.jsonl")
    settings = {stage.name: stage.settings for stage in graph.stages}
    for t in (1, 2, 3):
        assert settings[f"reward-{t}"]["model"]["load"] == "rewarding"
        assert settings[f"reward-{t}"]["objective"] == {"name": "reward"}
        assert len(settings[f"pairs-reward-{t}"]["ranked"]) == t, "the ranked pairs of every E step so far"
    # The policy goes on from the one before, which is the reference; r_{t-1} ranks and compares.
    assert [settings[f"policy-{t}"]["model"]["load"] for t in (1, 2, 3)] == [
        "model",
        "out/policies/1",
        "out/policies/2",
    ]
    assert [settings[f"teach-policy-{t}"]["model"]["load"] for t in (1, 2)] == ["model", "out/policies/1"]
    for stage in ("score-policy-2", "score-reward-2"):
        assert settings[stage]["model"]["load"] == "out/reward-1/hf"
    assert settings["compare-3"]["reward"]["load"] == "out/reward-2/hf"
    scored = [settings[f"score-pairs-{t}"]["model"]["load"] for t in range(4)]
    assert scored == ["rewarding", *(f"out/reward-{t}/hf" for t in (1, 2, 3))]
    # Nothing is rounded between policies; the last one is as its checkpoints were when they were compared.
    for engine, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        stages = graph_of("iterations=2", f"engine.dtype={engine}").stages
        dtypes = {
            stage.name: stage.settings["dtype"] for stage in stages if stage.name.startswith(("choose", "compare"))
        }
        assert dtypes == {"compare-1": dtype, "choose-1": "float32", "compare-2": dtype, "choose-2": dtype}
    assert settings["policy-2"]["training"]["export_dtype"] == "fp32"
    # Two policies that are compared do not share their draws.
    seeds = [settings[f"sample-reward-1-{part}"]["sampling"].get("seed", 0) for part in ("new", "old")]
    assert seeds[0] != seeds[1]


def test_a_server_is_asked_for_each_policy_by_its_folder(place: Path) -> None:
    recipe = {**MUTUAL, "engine": {"name": "openai", "base_url": "http://localhost:1/v1"}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    graph = graph_of()
    settings = {stage.name: stage.settings for stage in graph.stages}
    assert settings["sample-policy-1"]["engine"]["model"] == "model"
    assert settings["sample-policy-2"]["engine"]["model"] == "out/policies/1"
    assert graph.needs["sample-policy-2"] == ["splits", "choose-1"], "there has to be something to serve"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tau=1.2"], "tau: Input should be less than or equal to 1"),
        (["tau=-0.1"], "tau: Input should be greater than or equal to 0"),
        (["sampling.n=1"], "sampling.n: 1, and a pair has two responses"),
        (["engine.load=model"], "engine: load is the policy, which changes"),
        (["engine.name=transformer"], "unknown name 'transformer' (did you mean 'transformers'?)"),
        (["policy.training.keep_checkpoints=1"], "training.keep_checkpoints: every checkpoint may be the next policy"),
        (["policy.training.save_interval=null"], "training.save_interval: required"),
        (["policy.objective.bta=1"], "stage policy-1: objective.bta: unknown key"),
        (["policy.training.export_hf=false"], "training.export_hf: false"),
        (
            ["reward_model.load=model"],
            "the M step trains a model with one score; allowed: ...ForSequenceClassification",
        ),
        (["mix=-1"], "mix: "),
        (["splits.selecton=3"], "splits.selecton: unknown key (did you mean 'selection'?)"),
        (["recipe=mutual_tought"], "unknown name 'mutual_tought' (did you mean 'mutual_taught'?)"),
        (["prompts=nowhere.jsonl"], "stage splits: input prompts.0: nowhere.jsonl: no such file"),
    ],
)
def test_mistakes_are_named_before_anything_runs(place: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        graph_of(*overrides)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("out").exists()


def test_a_reward_model_of_another_template_is_refused_unless_that_is_intended(place: Path, models: Path) -> None:
    Path("rewarding").unlink()
    Path("rewarding").mkdir()
    for path in (models / "rewarding").iterdir():
        (Path("rewarding") / path.name).symlink_to(path)
    file = Path("rewarding/chat_template.jinja")
    file.unlink()
    template = (models / "rewarding" / "chat_template.jinja").read_text()
    file.write_text(template.replace("<|im_end|>", "<|end|>"))
    with pytest.raises(
        UserError, match=r"reward_model.load: rewarding: its chat template writes '.*<\|end\|>.*' where"
    ):
        graph_of()
    assert graph_of("reward_model.template=own").stages
    file.unlink()
    with pytest.raises(UserError, match="reward_model.load: rewarding: the tokenizer has no chat template"):
        graph_of()


def test_prompts_are_divided_and_written_down(place: Path) -> None:
    names = ("selection", "policy-1", "policy-2", "reward-1")
    files = {name: f"prompts/{name}.jsonl" for name in names}
    Path("prompts").mkdir()
    sizes = {"selection": 4, "policy": None, "reward": None, "policies": 2, "rewards": 1}
    told = split_prompts({"path": "prompts.jsonl"}, 7, sizes, files, "prompts/splits.json")
    assert told == {"selection": 4, "policy-1": 4, "policy-2": 4, "reward-1": 4, "in no portion": 0}
    record = json.loads(Path("prompts/splits.json").read_text())
    keys = {
        name: [prompt_key(json.loads(line)["prompt"]) for line in Path(file).read_text().splitlines()]
        for name, file in files.items()
    }
    assert record == {"seed": 7, "portions": keys}
    assert len({key for portion in keys.values() for key in portion}) == 16
    with pytest.raises(UserError, match="splits: 16 prompts, and the portions need 43 or more"):
        split_prompts({"path": "prompts.jsonl"}, 7, sizes | {"selection": 40}, files, "prompts/splits.json")


def test_every_checkpoint_is_wanted_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i}) + "\n" for i in range(1, 8)))
    for iteration in (3, 6, 7):
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    assert list(checkpoints_of(tmp_path, 3)) == [3, 6, 7]
    assert list(checkpoints_of(tmp_path, 7)) == [7] and list(checkpoints_of(tmp_path, 9)) == [7]
    (tmp_path / "checkpoints" / "iter_0000006").rmdir()
    with pytest.raises(UserError, match="no checkpoint of iteration 6; there are: 3, 7"):
        checkpoints_of(tmp_path, 3)


def test_a_policy_checkpoint_that_is_missing_ends_with_status_2(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the stage is called by hand; before anything is sampled."""
    stage = next(stage for stage in graph_of().stages if stage.name == "compare-1")
    Path("out/policy-1/checkpoints/iter_0000001").mkdir(parents=True)
    rows = "".join(json.dumps({"iteration": i}) + "\n" for i in (1, 2))
    Path("out/policy-1/metrics.jsonl").write_text(rows)
    Path("compare.yaml").write_text(yaml.safe_dump({"function": stage.function, "arguments": stage.settings}))
    assert main(["compare.yaml"]) == 2
    said = capsys.readouterr().err
    assert said == "error: out/policy-1/checkpoints: no checkpoint of iteration 2; there are: 1\n"
    assert not Path("out/compared").exists()


def test_empty_responses_lose_and_refused_prompts_do_not_count(tmp_path: Path) -> None:
    new = Answers({"a": 1.0, "b": None, "c": 0.5, "d": None}, [3, 0, 5, 0], 1)
    old = Answers({"a": 0.5, "b": 0.0, "d": None, "e": 1.0}, [2, 2, 0, 1], 0)
    found = new.against(old, "new")
    assert (found["wins"], found["ties"], found["losses"], found["rate"]) == (1, 1, 1, 0.5)
    assert new.facts() == {"mean_reward": 0.75, "mean_tokens": 2.0, "empty": 2, "cut": 1}
    with pytest.raises(UserError, match="new: no prompt has a response of both policies"):
        new.against(Answers({"x": 1.0}, [1], 0), "new")


def test_below_tau_the_policy_before_stays_and_the_rest_is_not_needed(place: Path) -> None:
    """The policy that cannot improve: its checkpoints win as often as they lose."""
    wins = {"candidates": [{"checkpoint": 1, "rate": 0.5}, {"checkpoint": 2, "rate": 0.52}]}
    Path("wins.json").write_text(json.dumps(wins))
    with pytest.raises(Stop) as stop:
        choose_policy(2, "wins.json", "policy-2/hf", 0.6, None, "policies/2", "answers.jsonl")
    assert stop.value.reason == "stopped at 2, win rate 0.5200 < tau 0.6" and not Path("policies").exists()
    # The graph after such a stop, in iteration 1.
    recipe, settings = read_recipe("recipe.yaml", ["tau=0.6"])
    graph = recipe.graph(settings)
    stages = {stage.name: stage for stage in graph.stages}
    done = [*("splits", *of_policy(1)[:-1])]
    for name in done:
        for output in stages[name].outputs.values():
            path = Path(output)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "select-policy-1":
                path.mkdir()
                path = path / "preference.jsonl"
            if name != "choose-1" and not path.exists():
                path.write_text(json.dumps(name))
    contents = Contents(graph)
    for name in done:
        stage = stages[name]
        inputs = {key: contents.of(path) for key, path in stage.inputs.items()}
        if name == "choose-1":
            record = StageRecord(
                "stopped", made_from(stage), inputs, [], reason="stopped at 1, win rate 0.5200 < tau 0.6"
            )
        else:
            outputs = {key: contents.of(path) for key, path in stage.outputs.items()}
            record = StageRecord("finished", made_from(stage), inputs, [], outputs)
        write_record(graph, stage, record)
    lines = [" ".join(line.split()) for line in plan_lines(graph)]
    why = "stopped at 1, win rate 0.5200 < tau 0.6"
    assert f"choose-1 stopped: {why}" in lines
    unneeded = [*of_reward(1), *of_policy(2), "eval-drift-1-start", "eval-drift-2-before"]
    assert sorted(line for line in lines if "not needed" in line) == sorted(f"{n} not needed: {why}" for n in unneeded)
    assert not any("run:" in line for line in lines)
    assert replace(Outcome(), stopped={"choose-1": why}).why_not_needed("choose-1") == why


def rewarded(*rows: tuple[str, str, float, str, float]) -> list[dict[str, Any]]:
    """Rows of (prompt, new text, its reward, old text, its reward)."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "responses": [{"text": new, "source": "policy-1"}, {"text": old, "source": "policy-0"}],
            "rewards": [r_new, r_old],
        }
        for prompt, new, r_new, old, r_old in rows
    ]


ASKED: dict[str, Any] = {"new": "policy-1", "old": "policy-0", "mix": 1.0, "held_out": 0.0, "seed": 3, "held": None}


def test_the_reward_set_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old rewards 0, 2, 0, 2: eps is 1. dr is 1, -0.5, -1 and 0; the last pair has equal texts."""
    monkeypatch.chdir(tmp_path)
    write(
        "rewarded.jsonl",
        rewarded(("a", "n", 1, "o", 0), ("b", "n", 1.5, "o", 2), ("c", "n", -1, "o", 0), ("d", "s", 2, "s", 2)),
    )
    ranked = [
        {**row, "chosen": [{"role": "assistant", "content": "y"}], "rejected": [], "score_chosen": 1.0}
        for row in prompts(None, *"uvwxyz")
    ]
    write("ranked-1.jsonl", ranked[:4])
    write("ranked-2.jsonl", ranked[4:])
    files = {"rewarded": "rewarded.jsonl", "pairs": "pairs.jsonl", "train": "train.jsonl"}
    asked = ASKED | files | {"ranked": ["ranked-1.jsonl", "ranked-2.jsonl"]}
    told = make_reward_set(**asked)
    assert {key: told[key] for key in ("pairs", "epsilon", "same_text", "kept", "kept_negative", "dropped")} == {
        "pairs": 4, "epsilon": 1.0, "same_text": 1, "kept": 2, "kept_negative": 1, "dropped": 1,
    }  # fmt: skip
    assert (told["pseudo_trained_on"], told["ranked_trained_on"], told["ranked_there"]) == (2, 2, 6)
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert [(pair["difference"], pair["kept"], pair["same_text"]) for pair in pairs] == [
        (1.0, True, False), (-0.5, True, False), (-1.0, False, False), (0.0, False, True),
    ]  # fmt: skip
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows), "no rewards, which `score` would refuse"
    pseudo = [row for row in rows if row["chosen"][0]["content"] == "n"]
    assert len(rows) == 4 and sorted(row["prompt"][0]["content"] for row in pseudo) == ["a", "b"]
    assert all(row["rejected"][0]["content"] == "o" for row in pseudo)
    assert make_reward_set(**asked | {"mix": None})["ranked_trained_on"] == 6
    assert make_reward_set(**asked | {"mix": 0})["ranked_trained_on"] == 0
    # One is held out, of which the reward model before is asked.
    told = make_reward_set(**asked | {"held_out": 0.5, "held": "held.jsonl"})
    held = [json.loads(line) for line in Path("held.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert len(held) == told["held_out"] == 1 and held[0] not in kept and told["pseudo_trained_on"] == 1
    assert told["held_out_accuracy_before"] == float(held[0]["prompt"][0]["content"] == "a")


def test_a_reward_set_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ASKED | {"rewarded": "rewarded.jsonl", "pairs": "p.jsonl", "train": "t.jsonl", "ranked": []}
    write("rewarded.jsonl", rewarded(("a", "n", 0, "o", 1), ("b", "n", 0, "o", 1)))
    with pytest.raises(UserError, match=r"0 of 2 pseudo-pairs are believed \(eps 0; 0 have two equal responses\)"):
        make_reward_set(**asked)
    write("rewarded.jsonl", rewarded(("a", "n", 2, "o", 1)))
    with pytest.raises(UserError, match="1 of 1 pseudo-pairs are believed .* 2 or more are needed"):
        make_reward_set(**asked | {"held_out": 0.5, "held": "h.jsonl"})
    write("rewarded.jsonl", rewarded(("a", "n", math.nan, "o", 1)))
    with pytest.raises(UserError, match="a reward is a finite number"):
        make_reward_set(**asked)
    with pytest.raises(UserError, match="no prompt has a response of both policy-9 and policy-0"):
        make_reward_set(**asked | {"new": "policy-9"})


def test_a_part_of_sampling_keeps_the_other_defaults(place: Path) -> None:
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["sampling"] = {"n": 4}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    sampling = read_recipe("recipe.yaml", [])[1].sampling
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.max_tokens) == (4, 0.8, 0.95, 2048)
    assert LabelSettings.model_validate({"sampling": {"temperature": 0.7}}).sampling.n == 8
