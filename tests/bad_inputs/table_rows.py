"""Bad inputs: chat templates that take more than their budget, and what rows are read from."""

from __future__ import annotations

import json

from tests.bad_inputs.damage import fifo, folder, gone, key, put, rows, swap
from tests.bad_inputs.run import Bad, kind
from tests.bad_inputs.table import SETTINGS, SHARD, STORE_MANIFEST, TEACH, TEMPLATE, TRAIN

_t, _d, _s, _c = kind("tokenizer"), kind("data"), kind("store"), kind("configuration")
_HUGE = "{{ 'x' | center(3000000000) }}"

_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

_SUMS = (key(STORE_MANIFEST, "rows", "none"), key(STORE_MANIFEST, "top_k"), gone(SHARD))

# fmt: off
TABLE: list[Bad] = [
    _t("a template that needs memory", TRAIN, "data.jsonl:1: model: its chat template needs more than 512 MiB of memory", put(TEMPLATE, _HUGE)),
    _t("a template that writes much", TRAIN, "data.jsonl:1: model: its chat template makes more than", put(TEMPLATE, "{% for i in range(99999) %}0123456789{% endfor %}")),
    _t("a named template that needs memory", TRAIN, "model: its chat template needs more than", gone(TEMPLATE), key(SETTINGS, "chat_template", [{"name": "default", "template": _HUGE}])),
    _t("a map of a template that needs memory", "align model sharded new.npz", "model: its chat template needs more than", put(TEMPLATE, _HUGE)),
    _d("unknown fields, aligned", "align model sharded new.npz --data data.jsonl", "data.jsonl:2: the row has origin, which might change its meaning", rows({"text": "a", "origin": "x"})),
    _d("unknown fields to be kept, aligned", "align model sharded new.npz --data data.jsonl --unknown-fields keep", "--unknown-fields: unknown name 'keep'; allowed: error, ignore"),
    _d("unknown fields, verified", "store verify store --tokenizer model --data data.jsonl --unknown-fields keep", "--unknown-fields: unknown name 'keep'; allowed: error, ignore"),
    _d("a named file and a split", TRAIN + " data.split=test", "data.jsonl: a file that is named in data.path is read whole"),
    _d("a glob of several splits", TRAIN + " data.path='rows/*.jsonl'", "rows/*.jsonl: matches files of several splits (test, train)", folder("rows"), put("rows/test.jsonl", "{}"), put("rows/train.jsonl", "{}")),
    _t("a FIFO among the named templates", TRAIN, "x.jinja: a FIFO, not a regular file", folder("model/additional_chat_templates"), fifo("model/additional_chat_templates/x.jinja")),
    _t("a template of 4 MiB and a byte", TRAIN, "model/chat_template.jinja: 4194305 bytes; allowed for a chat template: 4194304", put(TEMPLATE, "x" * 4194305)),
    _t("a template file that is not there", TRAIN + " data.chat_template=none.jinja", "none.jinja: cannot read: No such file"),
    _t("a template file that is a folder", TRAIN + " data.chat_template=model", "model: cannot read: Is a directory"),
    _t("a template file that drops contents", TRAIN + " data.chat_template=t.jinja", "t.jinja: cannot use its chat template", put("t.jinja", " ")),
    _d("tools that the template does not write", TRAIN, "data.jsonl:2: the row has tools, which the chat template ignores", rows({"messages": _TURNS, "tools": [{"name": "f"}]})),
    _d("a setting that the template does not know", TRAIN, "data.jsonl:2: the row has thinks, which", rows({"messages": _TURNS, "chat_template_kwargs": {"thinks": True}})),
    _d("an image", TRAIN, "data.jsonl:2: messages[1].content[0] has the type 'image'; allowed: text", rows({"messages": [_TURNS[0], {"role": "assistant", "content": [{"type": "image"}]}]})),
    _d("a special token in a setting", TRAIN, "data.jsonl:2: the row spells the special token", rows({"messages": _TURNS, "chat_template_kwargs": {"x": "<|im_end|>"}})),
    _d("a prompt of another question", TRAIN, "data.jsonl:2: ", rows({"messages": _TURNS, "prompt": "b"})),
    _d("a turn of the prompt to be trained on", TRAIN, "data.jsonl:2: prompt[1] asks to train on a turn of the prompt", rows({"prompt": [_TURNS[0], {**_TURNS[1], "train": True}, _TURNS[0]], "completion": [_TURNS[1]]})),
    _d("a pair for a token loss", TRAIN, "data.jsonl:2: the row has several responses to one prompt, and objective.name sft trains on one text per row", rows(_PAIR)),
    _d("a pair to be cut", "split data.jsonl new.jsonl --tokenizers model sharded", "data.jsonl:2: the row has several responses to one prompt", rows(_PAIR)),
    _d("rewards of other responses", TRAIN, "data.jsonl:2: rewards is a list of 2 numbers, one per response; found 1 of them", rows({"prompt": "a", "responses": ["b", "c"], "rewards": [1]})),
    _d("a prompt that leaves responses no token", TEACH, "data.jsonl:2: its prompt has", rows({"prompt": "a " * 70, "responses": ["b", "c"]})),
    _d("responses too long to keep a prompt", TEACH + " data.truncation=keep_end", "data.jsonl:2: its 2 responses have", rows({"prompt": "a", "responses": ["b " * 30, "c " * 30]})),
    _d("equal texts in a pair", TRAIN, "data.jsonl:2: chosen and rejected are the same", rows({**_PAIR, "rejected": "b"})),
    _d("a negative weight", TRAIN, "data.jsonl:2: weight is a number of at least 0, found '-1'", rows({**_PAIR, "weight": -1})),
    _d("a reward that is missing", TRAIN, "data.jsonl:2: responses[1] has no reward, and others have one", rows({"prompt": "a", "responses": [{"text": "b", "reward": 1}, {"text": "c"}]})),
    _d("no response", TRAIN, "data.jsonl:2: responses is empty; a group has one or more", rows({"prompt": "a", "responses": []})),
    _d("truncation of rows of one text", TRAIN + " data.truncation=drop", "data.truncation: no effect, because no row has several responses"),
    _d("a limit of responses without effect", TRAIN + " data.max_length=64", "data: max_length 64: no effect beside seq_length 64"),
    _s("sums to distill from", "train distill.yaml", "store: the store has rows: none, only a summed log-probability", *_SUMS),
    _s("sums to look at", "show teacher store --data data.jsonl --tokenizer model", "store: the store has rows: none", *_SUMS),
    _s("sums to look at with a map", "align model model new.npz --data data.jsonl --report new.html --store store", "store: the store has rows: none", *_SUMS),
    _s("sums to be measured with", "eval eval.yaml teacher.store=store", "the store's rows is 'none', expected 'top_k'", *_SUMS),
    _s("sums with a number of ids", TEACH + " rows=none", "top_k: no effect with rows: none"),
    _c("no reference", TRAIN + " objective.name=dpo", "objective.reference: required, and not given"),
    _c("two references", TRAIN + " objective.name=dpo objective.reference.store=store objective.reference.in_job.load=model", "objective.reference: give exactly one of store and in_job"),
    _s("a reference of other data", TRAIN + " objective.name=dpo objective.reference.store=store", "pairs.jsonl:1: no row in objective.reference.store store: it has none of these 2 samples", put("pairs.jsonl", json.dumps(_PAIR)), swap("train.yaml", b"data.jsonl", b"pairs.jsonl")),
    _d("a FIFO in a saved data set", TRAIN + " data.path=saved", "saved/train/data.arrow: a FIFO, not a regular file", folder("saved/train"), put("saved/dataset_dict.json", '{"splits": ["train"]}'), fifo("saved/train/data.arrow")),
    _t("a split by a template that needs memory", "split data.jsonl new.jsonl --tokenizers model sharded", "data.jsonl:1: model: its chat template needs more than", put(TEMPLATE, _HUGE)),
]  # fmt: skip
