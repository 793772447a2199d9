"""What a model learns of turns with reasoning and tool calls, and what a row tells the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusemega.text.chat import DROPPED, ChatRenderer
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.document import BadRow, canonical, parse
from fusemega.text.sample import annotate
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import byte_level

# What Qwen3's template does, in our words: it takes reasoning out of contents, writes it behind the last question
# alone, puts an empty block where there is none, writes calls as JSON, and tools first of all.
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' }}
{{- m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}{%- set c = m.content %}{%- set r = '' %}
{%- if m.reasoning_content is string %}{%- set r = m.reasoning_content %}
{%- elif '</think>' in c %}{%- set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or r) %}
{{- '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- c }}{%- for call in m.tool_calls or [] %}{{- '\\n' if c or not loop.first }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def learnt(tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[str, int, ChatRenderer]:
    """The targets' text, the content's bytes in it, and the renderer."""
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.render(parse(row))
    got = annotate(rendered, tokenizer.encode([rendered.text])[0], tokenizer)
    ends = [int(end) for end in got.end_bytes if end >= 0]
    assert ends == sorted(ends) and ends[-1] <= got.stream_length
    return tokenizer.hf.decode(got.ids[got.supervised]), int(got.target_bytes[got.supervised].sum()), renderer


TURNS = {
    "plain": ([user("a"), assistant("yo"), user("b"), assistant("so")], "yo<|im_end|>so<|im_end|>", 4),
    "inline": ([user("a"), assistant("<think>\nhm\n</think>\n\nyo")], "<think>\nhm\n</think>\n\nyo<|im_end|>", 4),
    "inline, laid out otherwise": (
        [user("yo hm"), assistant("<think>hm</think>yo")],
        "<think>\nhm\n</think>\n\nyo<|im_end|>",
        4,
    ),
    "field": ([user("yo"), assistant("yo", reasoning_content="yo")], "<think>\nyo\n</think>\n\nyo<|im_end|>", 4),
    "thinking": ([user("a"), assistant("", thinking="hm")], "<think>\nhm\n</think>\n\n<|im_end|>", 2),
    "calls": (
        [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("so")],
        f"{CALLED}<|im_end|>so<|im_end|>",
        len(CALLED) + 2,
    ),
    "reasoning and calls": (
        [
            user("a"),
            assistant("yo", reasoning="hm", tool_calls=[CALL]),
            {"role": "tool", "content": "yo"},
            assistant("b"),
        ],
        f"<think>\nhm\n</think>\n\nyo\n{CALLED}<|im_end|>b<|im_end|>",
        len(CALLED) + 6,
    ),
}


@pytest.mark.parametrize("turns", TURNS)
def test_all_that_the_model_writes_is_learnt(turns: str) -> None:
    messages, text, num_bytes = TURNS[turns]
    found, counted, renderer = learnt(byte_level(QWEN3), {"messages": messages})
    assert found == text and not renderer.counts
    assert counted - num_bytes in (0, 1)  # the line break before calls behind a content counts, too


@pytest.mark.parametrize(
    "turns",
    [
        [user("a"), assistant("<think>\nhm\n</think>\n\nyo"), user("b"), assistant("<think>\nu\n</think>\n\nso")],
        [user("a"), assistant("yo", reasoning_content="hm"), user("b"), assistant("so", reasoning_content="u")],
    ],
)
def test_a_turn_whose_reasoning_is_left_out_later_is_context(turns: list[dict[str, Any]]) -> None:
    found, counted, renderer = learnt(byte_level(QWEN3), {"messages": turns})
    assert (found, counted) == ("<think>\nu\n</think>\n\nso<|im_end|>", 3) and renderer.counts == {DROPPED: 1}
    turns[3] = turns[3] | {"train": False}
    with pytest.raises(BadRow, match="drops the reasoning of every turn that is to be trained on"):
        learnt(byte_level(QWEN3), {"messages": turns})


def test_templates_that_look_for_something_else() -> None:
    """A text that occurs once between renderings that begin the whole one; else the reason."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ('!' if 'now' in m.content else '') + '\n' + m.content }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    found, counted, _ = learnt(byte_level(template), {"messages": [user("do it now"), assistant("hello")]})
    assert (found, counted) == ("\nhello<|im_end|>", 5)
    twice = template.replace("+ m.content }}", "+ m.content + (m.content if 'now' in m.content else '') }}")
    with pytest.raises(BadRow, match="the content of message 1 occurs 2 times in its turn"):
        learnt(byte_level(twice), {"messages": [user("a"), assistant("now")]})


def test_what_the_row_tells_the_template() -> None:
    tokenizer, turns = (
        byte_level(QWEN3),
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("yo")],
    )
    plain = parse({"messages": turns})
    rows = [{"tools": [{"name": "f"}]}, {"system": "be kind"}, {"chat_template_kwargs": {"enable_thinking": False}}]
    texts = [ChatRenderer(tokenizer).render(parse({"messages": turns} | row)).text for row in [{}, *rows]]
    assert texts[0] == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nyo<|im_end|>\n"
    assert texts[1] == '<|im_start|>system\n{"name": "f"}\n<|im_end|>\n' + texts[0]
    assert texts[2] == "<|im_start|>system\nbe kind<|im_end|>\n" + texts[0] and texts[3] == texts[0]
    assert len({canonical(document) for document in [plain, *(parse({"messages": turns} | row) for row in rows)]}) == 4
    document = parse({"messages": turns, "chat_template_kwargs": {"other": 1}})
    with pytest.raises(BadRow, match="the row has other, which the chat template ignores"):
        ChatRenderer(tokenizer).render(document)


def test_a_template_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [user("a"), assistant("yo", thinking="hm")]}))
    (tmp_path / "t.jinja").write_text(QWEN3)
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), chat_template=str(tmp_path / "t.jinja"))
    tokenizer = byte_level("chatml")
    (sample,) = prepare(config, tokenizer, tmp_path / "cache")
    assert tokenizer.hf.decode(sample.ids[sample.supervised]) == "<think>\nhm\n</think>\n\nyo<|im_end|>"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [user("a"), assistant("yo")]}))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}")
    dataset = prepare(config, tokenizer, tmp_path / "cache")
    assert (
        len(dataset.notes) == 1
        and "t.jinja: its chat template ends an assistant turn with no token" in dataset.notes[0]
    )
