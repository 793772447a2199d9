"""Bad inputs: chat templates that take more than their budget, and what rows are read from."""

from __future__ import annotations

from tests.bad_inputs.damage import gone, key, put
from tests.bad_inputs.run import Bad, kind
from tests.bad_inputs.table import SETTINGS, TEMPLATE, TRAIN

_t = kind("tokenizer")
_HUGE = "{{ 'x' | center(3000000000) }}"

# fmt: off
TABLE: list[Bad] = [
    _t("a template that needs memory", TRAIN, "data.jsonl:1: model: its chat template needs more than 512 MiB of memory", put(TEMPLATE, _HUGE)),
    _t("a template that writes much", TRAIN, "data.jsonl:1: model: its chat template makes more than", put(TEMPLATE, "{% for i in range(99999) %}0123456789{% endfor %}")),
    _t("a named template that needs memory", TRAIN, "model: its chat template needs more than", gone(TEMPLATE), key(SETTINGS, "chat_template", [{"name": "default", "template": _HUGE}])),
    _t("a map of a template that needs memory", "align model sharded new.npz", "model: its chat template needs more than", put(TEMPLATE, _HUGE)),
    _t("a split by a template that needs memory", "split data.jsonl new.jsonl --tokenizers model sharded", "data.jsonl:1: model: its chat template needs more than", put(TEMPLATE, _HUGE)),
]  # fmt: skip
