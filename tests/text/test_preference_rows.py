"""Pairs and groups: the shapes that mean the same, the numbers of responses, and what is kept of too long ones."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import BadRow, Text, canonical, parse_row
from fusemega.text.groups import Group
from fusemega.text.truncation import kept_parts
from tests.text.toys import byte_level


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ASKED = [user("hi"), says("well?"), user("go on")]
PAIR: dict[str, Any] = {"prompt": ASKED, "chosen": [says("yes")], "rejected": [says("no"), user("so?"), says("yes")]}
WHOLE = {key: ASKED + PAIR[key] for key in ("chosen", "rejected")}
OBJECTS = [{"text": "yes"}, {"messages": PAIR["rejected"]}]
RATED = {"prompt": "a ", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": -1.5}


def group(row: dict[str, Any]) -> Group:
    found = parse_row(row)
    assert isinstance(found, Group)
    return found


@pytest.mark.parametrize(
    "row",
    [
        WHOLE,
        WHOLE | {"prompt": ASKED},
        WHOLE | {"prompt": "hi", "messages": WHOLE["chosen"], "prompt_id": "x"},
        {"prompt": ASKED, "responses": [PAIR["chosen"], PAIR["rejected"]]},
        {"prompt": ASKED, "responses": OBJECTS},
        {"prompt": ASKED, "responses": [OBJECTS[0], PAIR["rejected"]]},
    ],
    ids=lambda row: "-".join(row),
)
def test_shapes_of_one_group(row: dict[str, Any]) -> None:
    wanted = [canonical(document) for document in group(PAIR).documents]
    assert [canonical(document) for document in group(row).documents] == wanted


def test_the_prompt_of_two_texts_is_what_they_share_as_in_trl() -> None:
    """Up to the space before the first character that differs."""
    found = group({"chosen": "Human: hi\n\nAssistant: yes", "rejected": "Human: hi\n\nAssistant: no"})
    before = len("Human: hi\n\nAssistant:")
    assert found.documents[0] == Text("Human: hi\n\nAssistant: yes", before)
    assert found.documents[1] == Text("Human: hi\n\nAssistant: no", before)


@pytest.mark.parametrize(
    ("row", "numbers"),
    [
        (RATED, [{"chosen": 1, "reward": 2}, {"chosen": 0, "reward": -1.5}]),
        (PAIR | {"margin": -1, "weight": 2.5}, [{"chosen": c, "margin": -1, "weight": 2.5} for c in (1, 0)]),
        (PAIR | {"rewards": [2, -1.5]}, [{"chosen": 1, "reward": 2}, {"chosen": 0, "reward": -1.5}]),
        (PAIR | {"weight": True}, [{"chosen": c, "weight": 1} for c in (1, 0)]),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [3, 4], "weight": 0.5},
         [{"reward": 3, "weight": 0.5}, {"reward": 4, "weight": 0.5}]),
        ({"prompt": "", "responses": [{"text": "b", "score": 1, "weight": 0}, {"text": "c", "reward": 2, "weight": 3}]},
         [{"reward": 1, "weight": 0}, {"reward": 2, "weight": 3}]),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_responses(row: dict[str, Any], numbers: list[dict[str, float]]) -> None:
    assert list(group(row).scalars) == numbers
    told: Counter[str] = Counter()
    parse_row(row | {"id": 3}, told=told)
    assert told == {"id": 1}, "said to change nothing of what is learnt"


def read(path: Path, rows: list[dict[str, Any]], template: str = "chatml", **config: Any) -> TokenizedDataset:
    path.mkdir(exist_ok=True)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = DataConfig(path=str(path / "rows.jsonl"), **config)
    return prepare(given, byte_level(template), path / "cache")


def test_sources_are_numbered_by_sorted_name(tmp_path: Path) -> None:
    def row(*names: str | None) -> dict[str, Any]:
        return {"prompt": "a", "responses": [{"text": f"b{i}", "source": name} for i, name in enumerate(names)]}

    rows = [row("mistral", "gemma"), PAIR, row("qwen", None, "gemma")]
    dataset = read(tmp_path, rows)
    assert dataset.sources == ["gemma", "mistral", "qwen"]
    numbers = [sample.scalars.get("source") for sample in dataset]
    assert numbers == [1, 0, None, None, 2, None, 0]
    # Named otherwise it is other data, though the numbers are the same.
    renamed = read(tmp_path / "renamed", [row("mistral", "a"), PAIR, row("qwen", None, "a")])
    assert [sample.scalars.get("source") for sample in renamed] == numbers
    assert any(a.tobytes() != b.tobytes() for a, b in zip(dataset.contents(), renamed.contents(), strict=True))


def test_what_sampling_says_of_a_group_is_not_learnt() -> None:
    plain = {"prompt": "2 + 2 = ", "responses": [{"text": "4", "source": "a"}, {"text": "5", "source": "b"}]}
    said = {"answer": "4", "tests": "assert True", "entry_point": "f", "domain": "maths"}
    responses = [each | {"sample": i, "tokens": 1, "correct": i == 0} for i, each in enumerate(plain["responses"])]
    assert group(plain | said | {"responses": responses}) == group(plain)


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_as_few_tokens_as_possible_are_cut(shared: int) -> None:
    """Against a search over all limits; the first `shared` tokens of all lie in the row once."""
    for lengths in itertools.product((5, 8, 13), repeat=3):
        for seq_length, most in itertools.product((13, 17, 24, 39), (None, 7, 12)):
            first = [4, 4, 4]
            limits = [
                limit
                for limit in range(1, (most or max(lengths)) + 1)
                if sum(min(length, limit) for length in lengths) - 2 * min(shared, limit) <= seq_length
            ]
            cuts = [
                cut
                for cut in range(max(lengths) + 1)
                if sum(lengths) - 3 * cut - 2 * max(shared - cut, 0) <= seq_length
                and max(lengths) - cut <= (most or 99)
            ]
            if max(limits, default=0) <= 4:
                with pytest.raises(BadRow, match="its prompt has 4 tokens"):
                    kept_parts(lengths, first, seq_length, most, "keep_start", shared)
            else:
                kept = [(0, min(length, max(limits))) for length in lengths]
                assert kept_parts(lengths, first, seq_length, most, "keep_start", shared) == kept
            if min(cuts) >= 4:
                with pytest.raises(BadRow, match=f"{min(cuts)} would have to be cut from a prompt of 4"):
                    kept_parts(lengths, first, seq_length, most, "keep_end", shared)
            else:
                kept = [(min(cuts), length) for length in lengths]
                assert kept_parts(lengths, first, seq_length, most, "keep_end", shared) == kept
            fits = sum(lengths) - 2 * shared <= seq_length and max(lengths) <= (most or 99)
            assert (kept_parts(lengths, first, seq_length, most, "drop", shared) is None) == (not fits)


def test_long_responses_are_cut_as_asked_counted_and_told(tmp_path: Path) -> None:
    short, long = (
        {"prompt": "a b c ", "responses": ["b " * 3, "c "]},
        {"prompt": "a b c ", "responses": ["b " * 40, "c "]},
    )
    whole = read(tmp_path / "whole", [short, long], seq_length=256)
    length = int(whole.lengths[2])
    default = read(tmp_path, [short, long], seq_length=64)
    start = read(tmp_path, [short, long], seq_length=64, truncation="keep_start")
    assert [sample.key for sample in default] == [sample.key for sample in start]
    room = 64 - int(whole.lengths[3])
    assert start.lengths.tolist() == [*whole.lengths[:2].tolist(), room, int(whole.lengths[3])]
    assert start[2].ids.tolist() == whole[2].ids[:room].tolist() and start[2].key != whole[2].key
    assert start[2].supervised.tolist() == whole[2].supervised[:room].tolist() and start[3].key == whole[3].key
    assert f"1 rows of several responses were too long: {length - room} of their tokens are left out" in start.notes[0]

    limited = read(tmp_path, [short, long], seq_length=64, max_length=20)
    assert limited.lengths.tolist() == [*whole.lengths[:2].tolist(), 20, int(whole.lengths[3])]

    end = read(tmp_path, [short, long], seq_length=256, max_length=length - 2, truncation="keep_end")
    for i, wanted in ((2, whole[2]), (3, whole[3])):  # of both the same beginning is cut
        assert end[i].ids.tolist() == wanted.ids[2:].tolist() and end[i].key != wanted.key
        assert end[i].positions.tolist() == (wanted.positions - 2).tolist()
    assert end.lengths[:2].tolist() == whole.lengths[:2].tolist()

    dropped = read(tmp_path, [short, long], seq_length=64, truncation="drop")
    assert dropped.num_units == 1 and sum(dropped.skipped.values()) == 1
    with pytest.raises(UserError, match=r"rows.jsonl:2: its 2 responses have .* would have to be cut from a prompt"):
        read(tmp_path, [short, long], seq_length=64, truncation="keep_end")


def test_settings_of_groups_have_no_effect_on_other_rows(tmp_path: Path) -> None:
    for setting in ({"truncation": "drop"}, {"max_length": 8}):
        with pytest.raises(UserError, match=f"data.{min(setting)}: no effect, because no row has several responses"):
            read(tmp_path, [{"text": "a"}], **setting)


def test_prompts_that_the_template_writes_differently(tmp_path: Path) -> None:
    template = "{{ '<|im_start|>system\n' + messages|length|string + ' turns<|im_end|>\n' }}" + (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"rows.jsonl:1: the chat template writes the prompt differently .* 0 and 1"):
        read(tmp_path, [PAIR], template)
    kept = read(tmp_path, [PAIR, PAIR | {"rejected": [says("no")]}], template, on_bad_row="skip")
    assert kept.skipped == {"prompts differ": 1} and kept.num_units == 1
