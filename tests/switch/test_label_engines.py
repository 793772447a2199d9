"""How engines are told the modes, and what of a response is verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusemega.errors import UserError
from fusemega.sampling.engine import SampleRequest, SamplingSettings
from fusemega.sampling.engines import OpenAISettings, TransformersSettings
from fusemega.sampling.prompts import Prompts
from fusemega.switch.families import LONG, SHORT
from fusemega.switch.label import ModeEngine, _without_reasoning, engine_settings, label
from fusemega.switch.labels import read_labels
from fusemega.switch.modes import Modes, ModesConfig
from fusemega.switch.run_file import LabelSettings
from fusemega.switch.verdicts import verifiable
from tests.switch.conftest import OPEN, TURN, ScriptedEngine, switch_run, write_questions

SERVER = {"name": "openai", "base_url": "http://localhost:1/v1", "model": "m", "extra_body": {"min_p": 0.1}}


def test_a_model_in_this_process(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 3)
    labels = {"sampling": {"n": 2, "max_tokens": 6}, "max_tokens_short": 3}
    run = switch_run(tmp_path, switch_model, labels=labels)
    found = label(run)["train"]
    assert found.responses == {"short": 6, "long": 6} and found.tokens["short"] <= 3 < found.tokens["long"] <= 6
    made = {
        mode: json.loads((tmp_path / f"out/labels/train/{mode}.jsonl.settings.json").read_text())
        for mode in (SHORT, LONG)
    }
    assert made[SHORT]["engine"]["template_variables"] == {"enable_thinking": False}
    assert made[LONG]["engine"]["template_variables"] == {"enable_thinking": True}
    rows = [json.loads(line) for line in (tmp_path / "out/labels/train/short.jsonl").read_text().splitlines()]
    modes = Modes(run.modes, switch_model)
    assert {row["prompt_tokens"] for row in rows} == {len(modes.ids(row["prompt"], SHORT, "")) for row in rows}
    assert (read_labels(run.labels_file("train")).rates_NM == 0).all()


def test_what_a_server_is_told(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 1)
    run = switch_run(tmp_path, switch_model, engine=SERVER | {"extra_body": {"chat_template_kwargs": {"a": 1}}})
    modes = Modes(run.modes, switch_model)
    for mode, value in ((SHORT, False), (LONG, True)):
        settings = engine_settings(run, modes, mode)
        assert isinstance(settings, OpenAISettings)
        assert settings.extra_body == {"chat_template_kwargs": {"a": 1, "enable_thinking": value}}


def test_an_empty_block(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 1)
    file = tmp_path / "keeps.jinja"
    file.write_text(TURN + OPEN + "{% endif %}{# </think> #}")
    run = switch_run(tmp_path, switch_model, modes={"chat_template": str(file)}, engine=SERVER)
    modes = Modes(ModesConfig(chat_template=str(file)), switch_model)
    short, long = (engine_settings(run, modes, mode) for mode in (SHORT, LONG))
    assert isinstance(short, OpenAISettings) and isinstance(long, OpenAISettings)
    assert short.extra_body == {"min_p": 0.1, "add_generation_prompt": False, "continue_final_message": True}
    assert long.extra_body == {"min_p": 0.1}
    own = engine_settings(switch_run(tmp_path, switch_model, modes={"chat_template": str(file)}), modes, SHORT)
    assert isinstance(own, TransformersSettings) and own.opens_with == "<think>\n\n</think>\n\n"
    asked: list[SampleRequest] = []

    class Recorder:
        identity = {"name": "openai"}

        def prepare(self) -> None: ...

        def generate(self, requests, settings, skip=frozenset()):  # type: ignore[no-untyped-def]
            asked.extend(requests)
            return iter(())

    messages = ({"role": "user", "content": "2+2?"},)
    for mode in (SHORT, LONG):
        list(ModeEngine(Recorder(), mode, modes).generate([SampleRequest("k", messages)], SamplingSettings()))
    assert asked[0].messages == (*messages, {"role": "assistant", "content": "<think>\n\n</think>\n\n"})
    assert asked[1].messages == messages and asked[0].key == "k"


def test_a_mode_of_ones_own_is_refused(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 1)
    engine = {"name": "transformers", "load": str(switch_model), "template_variables": {"enable_thinking": True}}
    with pytest.raises(UserError, match="set by the modes here; leave them out"):
        label(switch_run(tmp_path, switch_model, engine=engine), ScriptedEngine)


@pytest.mark.parametrize(
    ("text", "cut", "begins", "answer"),
    [
        ("<think>1</think>2", False, False, "2"),
        ("1</think>2", True, True, "2"),
        ("<think>it is 7, or", True, False, ""),
        ("it is 7, or", True, True, ""),
        ("it is 7, or", True, False, "it is 7, or"),
        ("it is 7", False, True, "it is 7"),
    ],
)
def test_what_is_verified(text: str, cut: bool, begins: bool, answer: str) -> None:
    assert _without_reasoning(text, cut, begins) == answer


def test_prompts_that_nothing_verifies(tmp_path: Path, switch_model: Path) -> None:
    path = write_questions(tmp_path / "train.jsonl", 3)
    path.write_text(path.read_text() + json.dumps({"prompt": "Hi"}) + "\n")
    run = switch_run(tmp_path, switch_model, labels={"unverifiable": "skip"})
    assert label(run, ScriptedEngine)["train"].prompts == 3
    with pytest.raises(UserError, match="neither answer nor tests"):
        label(switch_run(tmp_path, switch_model), ScriptedEngine)
    with pytest.raises(UserError, match="neither answer nor tests"):
        only = Prompts({"k": next(iter(_read(tmp_path)))}, 1)
        verifiable(only, LabelSettings(unverifiable="skip"), "train")


def _read(folder: Path):  # type: ignore[no-untyped-def]
    from fusemega.sampling.prompts import PromptsConfig, read_prompts

    (folder / "one.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n")
    return read_prompts(PromptsConfig(path=str(folder / "one.jsonl"))).by_key.values()
