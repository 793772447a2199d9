"""Every way a row can be wrong: one line here each, stopped at by name or skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import models
from tokenizers.trainers import BpeTrainer

from fusemega.errors import UserError
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from tests.text.toys import CORPUS, SPECIALS, byte_level, wrapped

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, ASSISTANT]}
GROUP = {"prompt": "x", "responses": ["a", "b"]}
HELLO = {"role": "assistant", "content": "well"}
PAIR = {"prompt": "x", "chosen": "a", "rejected": "b"}
SYSTEM = {"role": "system", "content": "be kind"}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def responses(*others: dict[str, object]) -> dict[str, object]:
    return {"prompt": "x", "responses": [{"text": str(i)} | other for i, other in enumerate(others)]}


# the line of the file (text, or a value written as JSON) -> (reason it is counted under, words of the message)
BAD = [
    ('{"text": "a"', "malformed JSON", "malformed JSON"),
    (b'{"text": "\xff"}', "malformed JSON", "not UTF-8"),
    ("", "empty", "the row is empty"),
    ({}, "empty", "the row is empty"),
    ({"text": None}, "empty", "the row is empty"),
    ({"text": " \n"}, "empty", "text is empty"),
    ({"text": 3}, "wrong type", "text is a string, found a number"),
    ([1], "wrong type", "a row is an object, found a list"),
    ({"conversations": []}, "unknown shape", "found the keys conversations; expected messages"),
    ({"prompt": "x"}, "unknown shape", "found the keys prompt"),
    ({"prompt": "x", "completion": ""}, "empty", "completion is empty"),
    ({"prompt": "x", "completion": [ASSISTANT]}, "wrong type", "must both be"),
    ({"prompt": [USER], "completion": [USER]}, "no assistant turn", "no assistant turn to train on (roles: user"),
    ({"messages": "x"}, "wrong type", "messages is a list of messages, found a string"),
    ({"messages": []}, "empty", "messages is empty"),
    ({"messages": ["x"]}, "wrong type", "messages[0] is an object"),
    ({"messages": [{"from": "human", "value": "x"}]}, "wrong type", "messages[0] has no role (keys: from, value)"),
    (
        {"messages": [USER, {"role": "assistant", "content": ["x"]}]},
        "wrong type",
        "messages[1].content[0] is an object",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ASSISTANT]},
        "unsupported part",
        "messages[0].content[1] has the type 'image_url'; allowed: text",
    ),
    ({"messages": [USER]}, "no assistant turn", "no assistant turn"),
    (
        {"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]},
        "wrong type",
        "messages[1].tool_calls[0].name is a string",
    ),
    (
        {"messages": [USER, ASSISTANT | {"tool_calls": CALLS}]},
        "template ignores field",
        "message 1 has tool_calls, which",
    ),
    (GOOD | {"prompt": "x"}, "unsupported field", "the row has prompt beside messages, which is not what its"),
    ({"messages": [SYSTEM, USER, ASSISTANT], "system": "a"}, "unsupported field", "the row has system, and a message"),
    ({"text": "a", "system": "a pirate"}, "unknown field", "the row has system, which might change its meaning"),
    (GOOD | {"documents": [{"text": "a"}]}, "template ignores field", "the row has documents, which"),
    (GOOD | {"tools": [{"name": "f"}]}, "template ignores field", "the row has tools, which the chat template"),
    (GOOD | {"tools": "f"}, "wrong type", "tools is a list, found a string"),
    (GOOD | {"chat_template_kwargs": {"a": False}}, "template ignores field", "the row has a, which"),
    (GOOD | {"chat_template_kwargs": {"tokenize": False}}, "unsupported field", "chat_template_kwargs has 'tokenize'"),
    (GOOD | {"mask": 1}, "unknown field", "(data.unknown_fields: ignore would leave out and count such fields)"),
    ({"messages": [USER | {"name": "bob"}, ASSISTANT]}, "template ignores field", "message 0 has name, which"),
    ({"messages": [USER, ASSISTANT | {"thinking": "hm"}]}, "template drops reasoning", "the reasoning of message 1"),
    ({"messages": [USER, ASSISTANT | {"thinking": "a", "reasoning": "b"}]}, "unsupported field", "which differ"),
    (
        {"messages": [USER, ASSISTANT | {"function_call": {"name": "f"}}]},
        "template ignores field",
        "message 1 has function_call",
    ),
    ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "unsupported flag", "messages[1] has weight: '0.5'; allowed"),
    ({"messages": [USER, ASSISTANT | {"train": "no"}]}, "unsupported flag", "messages[1] has train: 'no'; allowed"),
    ({"messages": [USER | {"train": True}, ASSISTANT]}, "unsupported flag", "asks to train on a turn of role user"),
    (
        {"prompt": [USER, ASSISTANT | {"weight": 1}, USER], "completion": [ASSISTANT]},
        "unsupported flag",
        "prompt[1] asks to train on a turn of the prompt; allowed: turns of the response",
    ),
    ('{"text": "\\ud800"}', "invalid unicode", "lone surrogate at character 0"),
    ({"prompt": "x", "chosen": "a"}, "unknown shape", "the row has no rejected; expected both chosen and rej"),
    ({"chosen": "a", "rejected": "b"}, "no prompt", "no prompt, and chosen and rejected begin differently"),
    (
        {"chosen": "ab", "rejected": "a"},
        "empty",
        "rejected is empty after the beginning that",
    ),
    ({"chosen": "a", "rejected": [ASSISTANT]}, "wrong type", "chosen and rejected must both be strings or both be"),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, "prompts differ", "rejected[1] is of role user, where"),
    ({"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": [USER, HELLO]}, "unsupported field", "prompt beside cho"),
    ({"messages": [USER, HELLO], "chosen": [ASSISTANT], "rejected": [HELLO]}, "unsupported field", "are not chosen's"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "no preference", "chosen and rejected are the same"),
    ({"prompt": "x", "chosen": "a", "rejected": ""}, "empty", "rejected is empty"),
    ({"prompt": "x", "chosen": "a", "rejected": [ASSISTANT]}, "wrong type", "prompt and rejected must both be"),
    (PAIR | {"rejected": " "}, "empty", "rejected is empty"),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [HELLO | {"content": ""}]}, "empty", "rejected is empty"),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"id": 1}]}, "no preference", "are the same"),
    (PAIR | {"margin": "1"}, "wrong type", "margin is a finite number, found '1'"),
    (PAIR | {"weight": -1}, "wrong type", "weight is a number of at least 0, found '-1'"),
    (PAIR | {"score_chosen": 1}, "number missing", "the row has score_chosen alone; allowed: score_chosen and"),
    (PAIR | {"rewards": [1]}, "wrong type", "rewards is a list of 2 numbers, one per response; found 1 of them"),
    (PAIR | {"rewards": [1, 2], "score_chosen": 1, "score_rejected": 2}, "unsupported field", "rewards and score_chos"),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, "no assistant turn", "no assistant turn to train"),
    ({"responses": ["a", "b"], "chosen": "a"}, "unknown shape", "responses and no prompt; expected prompt with"),
    ({"prompt": "x", "responses": "ab"}, "wrong type", "responses is a list of responses, found a string"),
    ({"prompt": "x", "responses": []}, "empty", "responses is empty; a group has one or more"),
    ({"prompt": "x", "responses": ["a", 1]}, "wrong type", "prompt and responses[1] must both be strings"),
    (GROUP | {"rewards": [1.0]}, "wrong type", "rewards is a list of 2 numbers, one per response; found 1 of them"),
    (GROUP | {"scores": [1, True]}, "wrong type", "scores[1] is a finite number, found 'True'"),
    (GROUP | {"scores": [1, float("nan")]}, "wrong type", "scores[1] is a finite number, found 'nan'"),
    (GROUP | {"scores": [1, 2], "rewards": [1, 2]}, "unsupported field", "the row has rewards and scores; allowed:"),
    (GROUP | {"margin": 1}, "unknown field", "the row has margin, which might"),
    (
        GROUP | {"prompt": "word " * 2100},
        "prompt over the limit",
        "would be kept (a group lies in one row: data.s",
    ),
    (responses({"reward": 1}, {}), "number missing", "responses[1] has no reward, and others have one"),
    (responses({"reward": float("inf")}, {"reward": 1}), "wrong type", "responses[0].reward is a finite number, found"),
    (responses({"reward": 1, "score": 1}, {}), "unsupported field", "responses[0] has reward and score; allowed: one"),
    (responses({"reward": 1}, {"reward": 1}) | {"rewards": [1, 2]}, "unsupported field", "the row and its responses h"),
    (responses({"weight": 0}, {"weight": 0}), "no weight", "the weights of the responses are all 0"),
    (responses({"weight": 1}, {"weight": -2}), "wrong type", "responses[1].weight is a number of at least 0, found"),
    (
        responses({"weight": 1}, {"weight": 2}) | {"weight": 2},
        "unsupported field",
        "the row and its responses have a",
    ),
    (responses({"origin": 1}, {}), "unknown field", "responses[0] has origin, which might change"),
    (responses({"train": True}, {}), "unsupported flag", "responses[0] has train; allowed for a response: weight"),
    (responses({"source": 3}, {}), "wrong type", "responses[0].source is a string, found a number"),
    (responses({"messages": [ASSISTANT]}, {}), "wrong type", "responses[0] has text and messages; allowed: one of"),
    ({"text": "a </s> b"}, "special token in content", "'</s>' (character 2"),
]


def as_line(row: object) -> bytes:
    return row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()


@pytest.mark.parametrize(("row", "reason", "words"), BAD, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD)])
def test_stops_by_name_or_skips_and_counts(row: object, reason: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([as_line(GOOD), as_line(row), as_line(GOOD)]) + b"\n")
    with pytest.raises(UserError) as error:
        prepare(DataConfig(path=str(file)), byte_level(), tmp_path / "cache")
    assert str(error.value).startswith(f"{file}:2: ") and words in str(error.value)
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "cache").iterdir())

    skipping = DataConfig(path=str(file), on_bad_row="skip")
    dataset = prepare(skipping, byte_level(), tmp_path / "cache")
    assert dataset.skipped == {reason: 1}
    assert [sample.source for sample in dataset] == [f"{file}:1", f"{file}:3"]
    assert prepare(skipping, byte_level(), tmp_path / "cache").skipped == {reason: 1}  # from the cache


FLAGGED = [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"label": False}, {"loss_mask": 0}]


@pytest.mark.parametrize("flag", FLAGGED, ids=lambda flag: next(iter(flag)))
def test_flags_decide_what_is_learnt(flag: dict[str, object], tmp_path: Path) -> None:
    on = dict.fromkeys(flag, True)
    other = {"role": "assistant", "content": "well"}
    rows = [
        {"messages": [USER | flag, ASSISTANT | flag, USER, other | on]},
        {"messages": [USER, ASSISTANT | flag]},
        GOOD | flag,
        {"text": "hello"} | flag,
        {"prompt": "hi", "completion": " hello"} | on,
        PAIR | flag,
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_level()
    dataset = prepare(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer, tmp_path / "cache")
    learnt = [tokenizer.hf.decode(sample.ids[sample.supervised]).strip() for sample in dataset]
    assert [text.removesuffix("<|im_end|>").removesuffix("</s>") for text in learnt] == ["well", "hello"]
    assert dataset.skipped == {"marked as not to be trained on": 4}


def test_unknown_fields_are_counted_where_asked(tmp_path: Path) -> None:
    rows = [
        GOOD | {"question": "x", "id": 3, "prompt": "hi"},
        {"messages": [USER | {"name": "bob"}, ASSISTANT | {"name": ""}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), unknown_fields="ignore")
    for _ in range(2):  # tokenized, and from the cache
        dataset = prepare(config, byte_level(), tmp_path / "cache")
        assert len(dataset) == 2 and dataset.ignored == {"name": 1, "question": 1} and dataset.skipped == {}
        assert dataset.notes == ["fields that change nothing of what is learnt: id, prompt"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [USER, ASSISTANT | {"tool_calls": CALLS}]}) + "\n")
    with pytest.raises(UserError, match="message 1 has tool_calls, which the chat template ignores"):
        prepare(config, byte_level(), tmp_path / "cache")


def test_what_is_left_out_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By whichever command reads the rows, and for whichever of its tokenizers."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD | {"origin": "x"}) + "\n" + json.dumps(GOOD | {"origin": "y"}) + "\n{}\n")
    config = DataConfig(path=str(file), unknown_fields="ignore", on_bad_row="skip")
    for tokenizer in (byte_level(), byte_level(), byte_level("llama3")):
        prepare(config, tokenizer, tmp_path / "cache", progress=True)
    said = capsys.readouterr().err
    assert said == f"{file}: left out the field 'origin' 2 times\n{file}: skipped 1 (empty)\n"


def test_an_id_beyond_the_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "hello"}) + "\n" + json.dumps({"text": "é"}) + "\n", encoding="utf-8")
    tokenizer = byte_level(None)
    largest = [int(e.ids.max()) for e in tokenizer.encode(["hello", "é"])]
    kept = prepare(DataConfig(path=str(file)), tokenizer, tmp_path / "cache", vocab_size=max(largest) + 1)
    assert len(kept) == 2
    worst = 1 + largest.index(max(largest))
    with pytest.raises(UserError, match=f"rows.jsonl:{worst}: .* has id {max(largest)}, the model's vocabulary has"):
        prepare(DataConfig(path=str(file)), tokenizer, tmp_path / "cache", vocab_size=max(largest))


def test_no_usable_sample(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{}\n{"text": 3}\n')
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    with pytest.raises(UserError, match=r"no usable sample \(empty: 1, wrong type: 1\)"):
        prepare(config, byte_level(), tmp_path / "cache")


def test_rows_that_need_what_the_tokenizer_lacks(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD))
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    with pytest.raises(UserError, match="no chat template"):
        prepare(config, byte_level(None), tmp_path / "cache")
    with pytest.raises(UserError, match="cannot use its chat template: .* drops the content"):
        prepare(config, byte_level("{{ messages[0]['content'] }}"), tmp_path / "cache")


def test_text_that_the_tokenizer_has_no_token_for(tmp_path: Path) -> None:
    rows = [GOOD, {"messages": [USER, ASSISTANT | {"content": "say ж now"}]}, {"text": "ж"}, {"text": "a <unk> b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = Encoder(models.BPE(unk_token="<unk>"))
    trainer = BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIALS], show_progress=False)
    encoder.train_from_iterator(CORPUS, trainer)
    tokenizer = wrapped(encoder, "chatml")
    with pytest.raises(UserError, match=r"rows.jsonl:2: the tokenizer has no token for 'ж' \(character \d+ .*'<unk>'"):
        prepare(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer, tmp_path / "cache")
    skipping = DataConfig(path=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    kept = prepare(skipping, tokenizer, tmp_path / "cache")
    assert len(kept) == 1 and kept.skipped == {"text without a token": 2, "special token in content": 1}
