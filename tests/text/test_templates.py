"""Chat templates: rendered as transformers renders them, and never beyond their budget."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from fusemega.errors import UserError
from fusemega.hf.loadable import closing_id
from fusemega.text import template_process, templates
from fusemega.text.document import BadRow
from fusemega.text.templates import ChatTemplate, OverBudget
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import TEMPLATES, byte_level

MESSAGES = [
    {"role": "user", "content": 'Grüße & <b>"x"</b> 你好 😀\n'},
    {"role": "assistant", "content": "  hello\tworld \n\n", "name": None},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "</s> \ue000"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "n": [1, 2.5, None, True]}}}]
# What templates of published models use, each in a form that shows it.
# fmt: off
USES = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "namespace": "{% set n = namespace(a='') %}"
    "{% for m in messages %}{% set n.a = n.a ~ m.role %}{% endfor %}{{ n.a }}",
    "tools": "{{ tools | tojson }}{{ tools | tojson(indent=4) }}"
    "{% for t in tools %}{{ t.function | items | list }}{% endfor %}",
    "variables": "{{ bos_token }}{{ add_generation_prompt }}{{ enable_thinking is defined }}{{ date }}{{ pad_token }}",
    "macros": "{% macro f(m) %}[{{ m.role }}{{ caller() }}]{% endmacro %}{% call f(messages[0]) %}!{% endcall %}",
    "trimmed blocks": "  {% if true %}\n  a\n  {% endif %}\n\n",
    "filters": "{{ messages | map(attribute='content') | list | tojson }}{{ 'a b' | title | center(9) | length }}",
    "reasoning": "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}|{{ messages[1].name is defined }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}",
    "format": "{{ '%5s' % 'a' }}{{ '{:>4}'.format(1) }}{{ 2 ** 10 }}{{ 7 // 2 }}",
}


def as_transformers(tokenizer: Tokenizer, template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    return str(tokenizer.hf.apply_chat_template(messages, chat_template=template, tokenize=False, **variables))


def assert_equal(tokenizer: Tokenizer, template: str) -> None:
    ours = ChatTemplate(template, tokenizer)
    for messages in (MESSAGES, MESSAGES[:2], [{"role": "system", "content": "Be kind."}, *MESSAGES]):
        for variables in (
            {},
            {"add_generation_prompt": True, "tools": TOOLS},
            {"date": "1 May", "documents": [{"title": "a", "text": "b"}]},
        ):
            try:
                expected = as_transformers(tokenizer, template, messages, **variables)
            except Exception as error:  # noqa: BLE001  (a template's own refusal)
                with pytest.raises(BadRow) as refused:
                    ours.render(messages, **variables)
                assert str(refused.value).endswith(str(error))
            else:
                assert ours.render(messages, **variables) == expected


@pytest.mark.parametrize("template", [*(t.jinja for t in TEMPLATES.values()), *USES.values()], ids=[*TEMPLATES, *USES])
def test_renders_as_transformers_does(template: str) -> None:
    assert_equal(byte_level(), template)


def test_reasoning_and_odd_values_reach_the_template_as_in_transformers() -> None:
    messages = [{"role": "user", "content": ["a", ("b", 1)], "thinking": "hm", "at": Path("x")}]
    template = "{{ messages }}{{ messages[0].reasoning_content }}"
    assert ChatTemplate(template, byte_level()).render(messages) == as_transformers(byte_level(), template, messages)


def test_the_real_template_renders_as_transformers_does(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_folder)
    assert tokenizer.chat_template is not None
    assert_equal(tokenizer, tokenizer.chat_template)


def test_the_environment_is_that_of_transformers() -> None:
    """A filter, test, function or setting that a release of transformers adds or drops is seen here."""
    theirs, ours = _compile_jinja_template("x").environment, template_process.environment()
    for name in ("globals", "filters", "tests"):
        assert getattr(ours, name).keys() == getattr(theirs, name).keys()
    for name in ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape", "optimized", "undefined"):
        assert getattr(ours, name) == getattr(theirs, name)
    tags = [{tag for extension in e.extensions.values() for tag in extension.tags} for e in (ours, theirs)]
    assert tags[0] == tags[1]
    assert {k for k, v in ours.filters.items() if v is not theirs.filters[k]} == {"tojson"}


def test_today_is_a_fixed_date() -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %A, %B %H:%M') }}{% endif %}"
    assert ChatTemplate(template, byte_level()).render(MESSAGES) == "26 Jul 2024, Friday, July 00:00"


NEST = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x=START) %}{% for i in range(64) %}{% set n.x = STEP %}{% endfor %}"
SHARED = DOUBLE.replace("START", "[1]").replace("STEP", "[n.x, n.x]")
TUPLES = DOUBLE.replace("START", "1").replace("STEP", "(n.x, n.x)")
TIME, MEMORY, OUTPUT = "s of processor time", "MiB of memory", "characters of a conversation"
EITHER = f"{TIME}|{MEMORY}"
# fmt: on
HOSTILE = {
    "empty loops": (NEST, TIME),
    "loops that write nothing but blanks": (NEST.replace("%}{% endfor", "%}{{ '' }}{% endfor", 1), TIME),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        TIME,
    ),
    "a recursive loop": ("{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "recursion"),
    "a power": ("{{ (7 ** (10 ** 8)) % 7 }}", TIME),
    "a tower of powers": ("{{ (10 ** (10 ** 10)) % 7 }}", EITHER),
    "a power of variables": ("{% set a = messages | length + 8 %}{{ (a ** (a ** 8)) % 7 }}", TIME),
    "a huge string": ("{{ ('x' * 20000000000)[:1] }}", MEMORY),
    "a huge list": ("{{ ([0] * 10 ** 10) | length }}", MEMORY),
    "doubling by ~": (DOUBLE.replace("START", "'x'").replace("STEP", "n.x ~ n.x"), EITHER),
    "doubling by +": (DOUBLE.replace("START", "'x'").replace("STEP", "n.x + n.x"), EITHER),
    "doubling by a block": (
        DOUBLE.replace("START", "'x'").replace("{% set n.x = STEP %}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
        EITHER,
    ),
    "center": ("{{ 'x' | center(3000000000) }}", MEMORY),
    "ljust": ("{{ 'x'.ljust(3000000000) }}", MEMORY),
    "zfill": ("{{ 'x'.zfill(3000000000) }}", MEMORY),
    "expandtabs": ("{{ '\\t'.expandtabs(2000000000) }}", MEMORY),
    "indent": ("{{ 'x\ny' | indent(3000000000) }}", MEMORY),
    "a format's width": ("{{ '%2000000000d' % 1 }}", MEMORY),
    "a format's given width": ("{{ '%*d' % (2000000000, 1) }}", MEMORY),
    "a format method's width": ("{{ '{:2000000000}'.format(1) }}", MEMORY),
    "the format filter": ("{{ '%2000000000s' | format('x') }}", MEMORY),
    "replace": ("{{ ('x' * 100000) | replace('x', 'y' * 100000) }}", MEMORY),
    "join": ("{{ range(99999) | join('x' * 100000) }}", MEMORY),
    "bytes": ("{{ (1).to_bytes(10 ** 10, 'big') | length }}", MEMORY),
    "json's indent": ("{{ [[[1]]] | tojson(indent=10 ** 9) }}", MEMORY),
    "batches": ("{{ [1] | batch(10 ** 9, 'x') | list | length }}", MEMORY),
    "slices": ("{{ [1] | slice(10 ** 9) | list | length }}", EITHER),
    "sums of lists": ("{{ ([[1] * 1000] * 99999) | sum(start=[]) | length }}", EITHER),
    "lipsum": ("{{ lipsum(n=10 ** 9) | length }}", EITHER),
    "shared lists written": (SHARED + "{{ n.x }}", EITHER),
    "shared lists as JSON": (SHARED + "{{ n.x | tojson }}", EITHER),
    "shared lists compared": (SHARED + "{% set a = n.x %}" + SHARED + "{{ a == n.x }}", TIME),
    "shared tuples hashed": (TUPLES + "{{ {n.x: 1} | length }}", TIME),
    "products of sequences": ("{{ (range(99999) | list * 999) | sort | length }}", EITHER),
    "a long division": ("{{ (10 ** 4000000) % (10 ** 2000000 + 1) }}", TIME),
    "urlize": ("{{ ('(' * 200000 ~ 'http://a') | urlize }}", f"{TIME}|{OUTPUT}"),
    "much output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", OUTPUT),
    "much literal output": ("{% for i in range(99999) %}0123456789{% endfor %}", OUTPUT),
    "deep brackets": ("{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}", "refuses|ended the process"),
    "deep lists": (
        DOUBLE.replace("START", "[]").replace("STEP", "[n.x]").replace("64", "2000") + "{{ n.x }}",
        "refuses|ended the process",
    ),
    "many attributes": ("{{ messages" + ".x.y" * 4000 + " }}", f"refuses|{TIME}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_template_takes_more_than_its_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.15)
    template, said = HOSTILE[name]
    with pytest.raises((OverBudget, BadRow), match=said) as caught:
        ChatTemplate(template, byte_level()).render(MESSAGES)
    assert isinstance(caught.value, BadRow) or str(caught.value).startswith("toy: its chat template ")
    assert ChatTemplate("{{ messages | length }}", byte_level()).render(MESSAGES) == "4"  # others go on


def test_what_a_long_conversation_needs_is_within_the_budget() -> None:
    long = [{"role": "user", "content": "x\U0001f600" * 2_000_000}, {"role": "assistant", "content": '"' * 4_000_000}]
    template = "{{ messages | tojson }}" + TEMPLATES["chatml"].jinja
    assert ChatTemplate(template, byte_level()).render(long) == as_transformers(byte_level(), template, long)


def test_threads_share_the_process() -> None:
    template, wrong = ChatTemplate("{{ messages[0].content }}", byte_level()), []

    def work(name: str) -> None:
        for i in range(50):
            given = f"{name}{i}" * 100
            if template.render([{"role": "user", "content": given}]) != given:
                wrong.append(given)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_process_that_was_ended_meanwhile_is_replaced() -> None:
    template = ChatTemplate("{{ messages | length }}", byte_level())
    assert template.render(MESSAGES) == "4"
    running = templates._PROCESS._running
    assert running is not None
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert template.render(MESSAGES) == "4"


def test_a_template_of_any_size_is_not_read() -> None:
    with pytest.raises(UserError, match=r"toy: a chat template of 5000000 characters; at most 4194304"):
        ChatTemplate("x" * 5_000_000, byte_level())


def test_what_closes_a_turn_is_not_guessed_of_a_template_beyond_its_budget() -> None:
    """An output folder with such a template is no model to publish."""
    with pytest.raises(OverBudget, match=MEMORY):
        closing_id(byte_level(HOSTILE["center"][0]))
    assert closing_id(byte_level("{{ raise_exception('no') }}")) is None
