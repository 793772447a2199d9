"""From prompts to a threshold, on prompts whose right switcher is known; what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fusemega.cli import main
from fusemega.errors import UserError
from fusemega.switch.calibrate import calibrate, scored
from fusemega.switch.curve import gain_over_random, sweep
from fusemega.switch.evaluate import evaluate_switch, table
from fusemega.switch.features import features, read_features
from fusemega.switch.label import label
from fusemega.switch.labels import Labels, read_labels
from fusemega.switch.modes import Modes
from fusemega.switch.run_file import SwitchRun, TrainSettings
from fusemega.switch.switcher import Switcher
from fusemega.switch.train import check_classes, fit, split, train
from tests.switch.conftest import LONG_RATES, SHORT_RATES, ScriptedEngine, level_of, switch_run, write_questions


def labelled(rates: np.ndarray, tokens: np.ndarray, keys: list[str] | None = None) -> Labels:
    count = len(rates)
    names = keys or [f"{i:032x}" for i in range(count)]
    messages = tuple([{"role": "user", "content": str(i)}] for i in range(count))
    return Labels(
        Path("labels.jsonl"), tuple(names), messages, rates, tokens, np.full((count, 2), 8), (None,) * count, "x", {}
    )


def test_a_trained_switcher_reaches_the_known_curve() -> None:
    """Features of noise and of the difficulty; labels of 8 draws. The right switcher knows the true rates."""
    random = np.random.default_rng(11)
    count, size = 2400, 24
    difficulty = random.random(count)
    true = np.stack([1 / (1 + np.exp(12 * (difficulty - 0.5))), 0.95 - 0.25 * difficulty], axis=1)
    tokens = np.stack([np.full(count, 20.0), 100 + 200 * difficulty], axis=1)
    rates = random.binomial(8, true) / 8
    direction = random.normal(size=size)
    features_NH = random.normal(size=(count, size)) + 4 * difficulty[:, None] * direction
    seen, new = np.arange(1600), np.arange(1600, count)
    labels = labelled(rates[seen], tokens[seen])
    settings = TrainSettings(hidden_sizes=[64, 32], lr=1e-3, seeds=[0], max_epochs=60, patience=15)
    network, found = fit(features_NH[seen], labels, *split(labels, 0.1), settings)
    assert found.losses[0] < 0.5 * found.constant_loss
    scores = network(torch.from_numpy(features_NH[new]).float()).detach().numpy()
    on = rates[new], tokens[new]
    right = sweep(true[new, 1] - true[new, 0], *on, resamples=400)
    trained = sweep(scores[:, 1] - scores[:, 0], *on, resamples=400)
    blind = sweep(random.random(len(new)), *on, resamples=400)
    gains = [gain_over_random(curve, *on) for curve in (right, trained, blind)]
    assert gains[1] > 0.9 * gains[0] > 0.05 and abs(gains[2]) < 0.1 * gains[0]
    # At every cost the known curve lies within the trained one's 95 % band, up to a hundredth.
    grid = np.linspace(on[1].mean(0)[0], on[1].mean(0)[1], 25)[1:-1]
    order = np.argsort(trained.tokens_T)
    upper = np.interp(grid, trained.tokens_T[order], trained.accuracy_band_T2[order, 1])
    known = np.interp(grid, np.sort(right.tokens_T), right.accuracy_T[np.argsort(right.tokens_T)])
    assert (known <= upper + 0.01).all()
    order = np.argsort(blind.tokens_T)
    missed = np.interp(grid, blind.tokens_T[order], blind.accuracy_band_T2[order, 1])
    assert (known > missed + 0.01).mean() > 0.7, "choosing at random does not reach it"


@pytest.fixture(scope="module")
def finished(switch_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SwitchRun, dict]:
    """A run with labels, features, a switcher and a threshold, on the tiny model's hidden states."""
    folder = tmp_path_factory.mktemp("switch-run")
    write_questions(folder / "train.jsonl", 270)
    write_questions(folder / "calibration.jsonl", 90, 1000)
    write_questions(folder / "test.jsonl", 180, 2000)
    run = switch_run(
        folder,
        switch_model,
        calibration_prompts={"path": str(folder / "calibration.jsonl")},
        test_prompts={"path": str(folder / "test.jsonl")},
        features={"seq_length": 256, "short_answers": True},
    )
    found = label(run, ScriptedEngine)
    features(run)
    train(run)
    calibrate(run, max_accuracy_loss=0.05)
    return run, {name: each.model_dump() for name, each in found.items()}


def test_labels(finished: tuple[SwitchRun, dict]) -> None:
    run, counts = finished
    labels = read_labels(run.labels_file("train"))
    assert len(labels) == 270 == counts["train"]["prompts"] and counts["test"]["prompts"] == 180
    levels = np.array([level_of(messages[-1]["content"]) for messages in labels.messages])
    for level in range(9):
        expected = (SHORT_RATES[level], LONG_RATES[level])
        np.testing.assert_allclose(labels.rates_NM[levels == level].mean(0), expected, atol=0.12)
    assert (labels.tokens_NM[:, 0] == 5).all() and (labels.tokens_NM[:, 1] == 50 + 10 * levels).all()
    assert counts["train"]["responses"] == {"short": 2160, "long": 2160} and counts["train"]["undecided"]["long"] == 0
    before = ScriptedEngine.asked
    again = label(run, ScriptedEngine)
    assert ScriptedEngine.asked == before and {n: e.model_dump() for n, e in again.items()} == counts


def test_labels_go_on_where_they_were_cut(finished: tuple[SwitchRun, dict], tmp_path: Path) -> None:
    """The engine fails after forty responses; those that were recorded are not asked for again."""
    run, _ = finished
    run = run.model_copy(
        update={"output_dir": str(tmp_path / "run"), "prompts": run.test_prompts, "test_prompts": None}
    )
    run = run.model_copy(update={"calibration_prompts": None})
    before = ScriptedEngine.asked

    class Failing(ScriptedEngine):
        def generate(self, *arguments: Any, **more: Any) -> Any:
            for number, response in enumerate(super().generate(*arguments, **more)):
                if number == 40:
                    raise RuntimeError("the server is gone")
                yield response

    with pytest.raises(RuntimeError, match="the server is gone"):
        label(run, Failing)
    ScriptedEngine.asked = 0
    found = label(run, ScriptedEngine)
    asked, ScriptedEngine.asked = ScriptedEngine.asked, before
    assert asked == sum(found["train"].responses.values()) - 40


def test_a_command_refuses_with_status_2(
    finished: tuple[SwitchRun, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    path = tmp_path / "switch.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)))
    for words, error in (
        (["calibrate", str(path), "--token-budget", "4"], "no threshold costs 4 tokens or fewer; the nearest is"),
        (["calibrate", str(path)], "--token-budget"),
        (["eval", str(path), "switcher=nowhere"], "switcher: unknown key"),
        (["train", str(path), "output_dir=nowhere"], "nowhere/labels"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["switch", *words])
        captured = capsys.readouterr()
        assert end.value.code == 2 and error in captured.err, captured.err


def test_the_switcher_and_other_choices(finished: tuple[SwitchRun, dict]) -> None:
    run, _ = finished
    switcher = Switcher.load(run.switcher)
    assert switcher.config.chosen is not None and switcher.config.chosen["max_accuracy_loss"] == 0.05
    found = evaluate_switch(run)
    assert found.prompts == 180 and found.measured_on == "test_prompts"
    oracle, trained = found.choices["oracle"], found.choices["switcher"]
    assert oracle.gain > 0.05 and trained.gain > 0.7 * oracle.gain
    assert found.tokens_saved > 0.1 and found.accuracy_lost < 0.12
    assert set(found.choices) == {"switcher", "text classifier", "perplexity of the short answer", "oracle"}
    assert found.choices["text classifier"].gain > 0.7 * oracle.gain, "the words say it all here"
    page = (run.out / "eval" / "report.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    said = json.loads((run.out / "eval" / "eval.json").read_text())
    assert said["choices"]["switcher"]["curve"][0]["long_share"] == 0
    assert "fewer tokens than long only" in table(found) and "random" in table(found)
    encoder = run.baselines.model_copy(update={"sentence_encoder": run.model.load})
    again = evaluate_switch(run.model_copy(update={"baselines": encoder}))  # replaces its own folder
    assert again.choices["sentence encoder"].gain > 0.5 * oracle.gain


def test_budgets_that_no_threshold_meets(finished: tuple[SwitchRun, dict]) -> None:
    run, _ = finished
    before = Switcher.load(run.switcher).config
    with pytest.raises(UserError, match=r"no threshold costs 4 tokens or fewer; the nearest is .* with 5.0 tokens"):
        calibrate(run, token_budget=4)
    with pytest.raises(UserError, match=r"no threshold is as accurate as .*; the nearest is"):
        calibrate(run, max_accuracy_loss=-0.9)
    with pytest.raises(UserError, match="give one of"):
        calibrate(run, token_budget=4, threshold=0.1)
    (run.out / "run.yaml").write_text(run.model_dump_json(exclude={"engine"}))
    with pytest.raises(SystemExit) as ended:
        main(["switch", "calibrate", str(run.out / "run.yaml"), "--token-budget", "4"])
    assert ended.value.code == 2
    assert Switcher.load(run.switcher).config == before, "nothing was changed"
    cheap = calibrate(run, token_budget=20)
    assert cheap.tokens <= 20 and cheap.accuracy > cheap.short_only[0] and cheap.prompts == 90
    scores = scored(run, Switcher.load(run.switcher), read_labels(run.labels_file("calibration")))
    gains = scores[:, 1] - scores[:, 0]
    assert (gains >= cheap.threshold).mean() == pytest.approx(cheap.long_share), "between scores, the same choices"
    assert np.abs(gains - cheap.threshold).min() > 0
    assert calibrate(run, threshold=1.0).tokens == 5 and calibrate(run, threshold=-1.0).long_share == 1


def test_another_model_or_template_is_refused(finished: tuple[SwitchRun, dict], tmp_path: Path) -> None:
    run, _ = finished
    switcher = Switcher.load(run.switcher)
    other = tmp_path / "other.jinja"
    other.write_text((Path(run.model.load) / "chat_template.jinja").read_text() + " ")
    modes = Modes(run.modes.model_copy(update={"chat_template": str(other)}), run.model.load)
    with pytest.raises(UserError, match="trained for another chat template than that of there"):
        switcher.check_modes(modes, "there")
    switcher.check_modes(Modes(run.modes, run.model.load), "there")
    with pytest.raises(UserError, match="trained for another model than there"):
        switcher.check_weights("0" * 32, "there")
    _, manifest = read_features(run.features_store, read_labels(run.labels_file("test")).keys, run.out)
    with pytest.raises(UserError, match="its weights is 'other', and the switcher"):
        switcher.check_features(manifest.model_copy(update={"weights": "other"}), run.features_store)
    with pytest.raises(UserError, match="lacks 1 of the 1 prompts"):
        read_features(run.features_store, ["0" * 32], run.out)


def test_labels_of_one_class_only() -> None:
    rates = np.tile([[0.5, 0.5]], (40, 1))
    tokens = np.ones((40, 2))
    with pytest.raises(
        UserError, match="one class only: the long mode is right more often on none .* use the short mode"
    ):
        check_classes(labelled(rates, tokens))
    with pytest.raises(
        UserError, match="one class only: the long mode is right more often on each .* use the long mode"
    ):
        check_classes(labelled(rates + [[0, 0.5]], tokens))
    with pytest.raises(UserError, match="leave 36 for training and 4 for validation; allowed: at least 8 each"):
        split(labelled(rates, tokens), 0.1)


def test_an_early_stop_only_when_asked(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 18)
    run = switch_run(tmp_path, switch_model, labels={"sampling": {"n": 8}, "early_stop": 3})
    before = ScriptedEngine.asked
    found = label(run, ScriptedEngine)["train"]
    spent = ScriptedEngine.asked - before
    assert 2 * 18 * 3 <= spent < 2 * 18 * 8 and sum(found.responses.values()) == spent
    labels = read_labels(run.labels_file("train"))
    assert set(labels.counts_NM.flatten().tolist()) == {3, 8}
    settled = labels.counts_NM == 3
    assert np.isin(labels.rates_NM[settled], [0, 1]).all()


def test_what_cannot_be_labelled(switch_model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "2+2?"}) + "\n")
    with pytest.raises(UserError, match="train.jsonl:1: the row has neither answer nor tests"):
        label(switch_run(tmp_path, switch_model), ScriptedEngine)
    write_questions(tmp_path / "train.jsonl", 9)
    run = switch_run(tmp_path, switch_model, test_prompts={"path": str(tmp_path / "train.jsonl")})
    with pytest.raises(UserError, match="the prompt is in train too, and 8 more; sets must be apart"):
        label(run, ScriptedEngine)
    with pytest.raises(UserError, match="early_stop: 8, and sampling.n is 8"):
        switch_run(tmp_path, switch_model, labels={"early_stop": 8})
    with pytest.raises(UserError, match="no labels; run `fusemega switch label` first"):
        train(switch_run(tmp_path, switch_model))
    assert not (tmp_path / "out").exists()
