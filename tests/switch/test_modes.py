"""The two modes of each family, as their templates render them; templates without a second mode are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusemega.errors import UserError
from fusemega.fixtures import tokenizers
from fusemega.fixtures.packages import AssetMissing
from fusemega.switch.families import LONG, SHORT, families, users_choice
from fusemega.switch.modes import Modes, ModesConfig
from tests.switch.conftest import ENABLE, OPEN, TURN

ASKED = [{"role": "user", "content": "2+2?"}]
# What the published templates do with the switch, in their words; the rest of them does not depend on it.
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% for m in messages %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<A>{% if not thinking %}</think>{% else %}<think>{% endif %}{% endif %}"
)
GPT_OSS = (
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}<|im_start|>system\n"
    "Reasoning: {{ reasoning_effort }}<|im_end|>\n" + TURN + OPEN + "{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
KEEPS = TURN + OPEN + "{% endif %}{# answers after </think> #}"


def opened(folder: Path, template: str, tmp_path: Path, **config: str) -> Modes:
    file = tmp_path / "template.jinja"
    file.write_text(template, encoding="utf-8")
    return Modes(ModesConfig(chat_template=str(file), **config), folder)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "name", "short", "long", "request_short", "request_long", "shared"),
    [
        (
            ENABLE,
            "enable_thinking",
            "assistant\n<think>\n\n</think>\n\n",
            "assistant\n",
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"chat_template_kwargs": {"enable_thinking": True}},
            True,
        ),
        (
            DEEPSEEK,
            "thinking",
            "<A></think>",
            "<A><think>",
            {"chat_template_kwargs": {"thinking": False}},
            {"chat_template_kwargs": {"thinking": True}},
            True,
        ),
        (
            GPT_OSS,
            "reasoning_effort",
            "assistant\n",
            "assistant\n",
            {"reasoning_effort": "low"},
            {"reasoning_effort": "high"},
            False,
        ),
        (R1, "empty_think", "<A><think>\n\n</think>\n\n", "<A><think>\n", None, {}, True),
        (KEEPS, "empty_think", "assistant\n<think>\n\n</think>\n\n", "assistant\n", None, {}, True),
    ],
)
def test_each_family_is_found_and_rendered(
    switch_model: Path,
    tmp_path: Path,
    template: str,
    name: str,
    short: str,
    long: str,
    request_short: dict | None,
    request_long: dict,
    shared: bool,
) -> None:
    modes = opened(switch_model, template, tmp_path)
    assert modes.name == name and modes.shared is shared
    rendered = {mode: modes.render(ASKED, mode) for mode in (SHORT, LONG)}
    assert rendered[SHORT].endswith(short) and rendered[LONG].endswith(long) and rendered[SHORT] != rendered[LONG]
    for mode, text in rendered.items():
        assert modes.tokenizer.hf.decode(modes.ids(ASKED, mode, "here")) == text
    prefill = modes.tokenizer.hf.decode(modes.prefill(ASKED, "here"))
    assert rendered[LONG].startswith(prefill) and "2+2?" in prefill
    assert (rendered[SHORT].startswith(prefill) and len(prefill) < len(rendered[SHORT])) is shared
    body = {"model": "m", "messages": ASKED, "chat_template_kwargs": {"other": 1}}
    sent = {mode: modes.request(body, mode) for mode in (SHORT, LONG)}
    assert body == {"model": "m", "messages": ASKED, "chat_template_kwargs": {"other": 1}}, "the request is not changed"
    for mode, expected in ((SHORT, request_short), (LONG, request_long)):
        if expected is not None:
            merged = {**body, **expected}
            merged["chat_template_kwargs"] = {"other": 1} | expected.get("chat_template_kwargs", {})
            assert sent[mode] == merged
    if name == "empty_think":
        assert sent[SHORT]["messages"] == [*ASKED, {"role": "assistant", "content": modes.opens_with}]
        assert sent[SHORT]["continue_final_message"] and sent[SHORT]["add_generation_prompt"] is False
    else:
        assert modes.request({"messages": []}, SHORT).keys() > {"messages"}, "off is said, not left out"
    assert modes.begins_thinking is (rendered[LONG].rstrip().endswith("<think>"))


def test_a_server_cannot_be_told_where_the_template_drops_the_block(switch_model: Path, tmp_path: Path) -> None:
    opened(switch_model, KEEPS, tmp_path).check_server()
    with pytest.raises(UserError, match=r"drops .* from an assistant's message"):
        opened(switch_model, R1, tmp_path).check_server()


def test_templates_without_a_second_mode(switch_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no second mode: it renders the same with enable_thinking, thinking,"):
        opened(switch_model, TURN + OPEN + "{% endif %}", tmp_path)
    with pytest.raises(UserError, match=r"modes.family: thinking, and .* ignores it: .* has: enable_thinking, empty"):
        opened(switch_model, ENABLE, tmp_path, family="thinking")
    with pytest.raises(UserError, match=r"modes.family: empty_think, and .* has no </think>"):
        opened(switch_model, GPT_OSS, tmp_path, family="empty_think")
    # Mentions the switch, and does nothing with it.
    ignores = TURN + OPEN + "{% if enable_thinking %}{% endif %}{% endif %}"
    with pytest.raises(UserError, match="ignores it: both modes render the same; it has: no second mode"):
        opened(switch_model, ignores, tmp_path, family="enable_thinking")


def test_the_published_template_of_qwen3(tmp_path: Path) -> None:
    try:
        folder = tokenizers.tokenizer("qwen3")
    except AssetMissing as error:
        pytest.skip(str(error))
    modes = Modes(ModesConfig(), folder)
    assert modes.name == "enable_thinking" and modes.shared
    assert modes.render(ASKED, SHORT) == modes.render(ASKED, LONG) + "<think>\n\n</think>\n\n"
    assert modes.prefill(ASKED, "here") == modes.ids(ASKED, LONG, "here")


def test_what_a_user_chooses() -> None:
    family = families()["enable_thinking"]

    def choice(**body: object) -> str | None:
        return users_choice({"messages": ASKED, **body}, family)

    assert choice() is None and choice(chat_template_kwargs={"tools_in_user_message": True}) is None
    assert choice(reasoning_effort="high") == "reasoning_effort"
    assert choice(thinking={"type": "disabled"}) == "thinking"
    assert choice(enable_thinking=False) == "enable_thinking"
    assert choice(chat_template_kwargs={"enable_thinking": False}) == "chat_template_kwargs.enable_thinking"
    assert choice(messages=[{"role": "user", "content": "2+2? /no_think"}]) == "/no_think"
    parts = [{"type": "text", "text": "2+2? /think"}]
    assert choice(messages=[{"role": "user", "content": parts}]) == "/think"
    assert choice(messages=[*ASKED, {"role": "assistant", "content": "4"}]) == "an assistant's message at the end"
    assert users_choice({"messages": [{"role": "user", "content": "/think"}]}, families()["thinking"]) is None
    assert json.dumps(users_choice({}, family)) == "null"
