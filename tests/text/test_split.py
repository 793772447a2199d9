"""Long documents cut to fit several tokenizers: nothing lost, everything fits, the same parts every time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fusemega import cli
from fusemega.errors import UserError
from fusemega.text.data import DataConfig, Source
from fusemega.text.dataset import prepare
from fusemega.text.split import Splitter
from fusemega.text.tokenizer import Tokenizer
from tests.text import toys

WORDS = ["the", "fox", "élèves", "今天天气很好。一二三四", "😀😀", "x):", "Köln", "!", "\n\n", "\t", "", "def f"]
TOKENIZERS = [toys.byte_level("llama3"), toys.sentencepiece("chatml"), toys.byte_level("plain", bos=True)]


def _words(rng: random.Random, most: int) -> str:
    return rng.choice(" \n").join(rng.choice(WORDS) for _ in range(rng.randint(1, most))).strip() or "x"


def _rows(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(12):
        roles = (
            ["system"] * rng.randint(0, 2) + ["user", "assistant"] * rng.randint(1, 9) + ["user"] * rng.randint(0, 1)
        )
        rows.append({"id": number, "messages": [{"role": role, "content": _words(rng, 9)} for role in roles]})
    for size in (1, 30, 300):
        rows.append(
            {"text": "\n " * rng.randint(0, 2) + _words(rng, size) + " \n" * rng.randint(0, 2), "source": "prose"}
        )
    rows.append({"prompt": "hello ", "completion": "world"})
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _split(path: str, max_tokens: int, on_long: Any = "error") -> tuple[list[dict[str, Any]], dict[str, int]]:
    splitter = Splitter(TOKENIZERS, max_tokens, on_long)
    return list(splitter(Source(DataConfig(path=path)))), splitter.counts


def _length(row: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> int:
    """Tokens of the row's sample, from the code that training uses: one window, however long it is."""
    path = _write(tmp_path / "one.jsonl", [row])
    dataset = prepare(DataConfig(path=path, seq_length=100_000), tokenizer, tmp_path / "cache")
    assert len(dataset) == 1
    return int(dataset.lengths[0])


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_the_document_and_fit_every_tokenizer(seed: int, tmp_path: Path) -> None:
    rows, limit = _rows(seed), 200
    path = _write(tmp_path / "data.jsonl", rows)
    parts, counts = _split(path, limit)
    assert _split(path, limit) == (parts, counts), "the same data gives the same parts"
    rest = iter(parts)
    whole = 0
    for row in rows:
        fits = max(_length(row, tokenizer, tmp_path) for tokenizer in TOKENIZERS) <= limit
        whole += fits
        part = next(rest)
        if fits or "completion" in row:
            assert part == row
            continue
        others = {key: value for key, value in row.items() if key not in ("messages", "text")}
        if "text" in row:
            joined = part["text"]
            while joined != row["text"]:
                part = next(rest)
                assert part["text"].strip() and row["text"].startswith(joined + part["text"])
                assert {**part, "text": 0} == {**others, "text": 0}
                joined += part["text"]
            continue
        system = [message for message in row["messages"] if message["role"] == "system"]
        turns = part["messages"]
        while turns != row["messages"]:
            part = next(rest)
            assert part["messages"][: len(system)] == system and turns[-1]["role"] == "assistant"
            assert part["messages"][len(system)]["role"] == "user" and {**part, "messages": 0} == {
                **others,
                "messages": 0,
            }
            assert any(message["role"] == "assistant" for message in part["messages"])
            turns = turns + part["messages"][len(system) :]
    assert next(rest, None) is None
    assert counts == {"rows": len(rows), "whole": whole, "cut": len(rows) - whole, "parts": len(parts), "too long": 0}
    assert whole < len(rows) - 3
    longest = [max(_length(part, tokenizer, tmp_path) for tokenizer in TOKENIZERS) for part in parts]
    assert max(longest) <= limit


def test_parts_are_as_long_as_they_can_be(tmp_path: Path) -> None:
    """A plain loop, one turn pair after another, finds the same parts."""
    rows = [row for row in _rows(7) if "messages" in row]
    parts, _ = _split(_write(tmp_path / "data.jsonl", rows), 200)
    expected = []
    for row in rows:
        system = [message for message in row["messages"] if message["role"] == "system"]
        turns = row["messages"][len(system) :]
        pairs = [turns[i : i + 2] for i in range(0, len(turns) - len(turns) % 2, 2)]
        pairs[-1] = pairs[-1] + turns[2 * len(pairs) :]
        part: list[Any] = []
        for pair in pairs:
            longer = {**row, "messages": system + part + pair}
            if part and max(_length(longer, tokenizer, tmp_path) for tokenizer in TOKENIZERS) > 200:
                expected.append({**row, "messages": system + part})
                part = []
            part = part + pair
        expected.append({**row, "messages": system + part})
    assert parts == expected


def test_a_text_is_cut_at_line_ends_where_one_is_near(tmp_path: Path) -> None:
    lines = ["hello world, hello friend, hello fox.\n"] * 12
    parts, _ = _split(_write(tmp_path / "data.jsonl", [{"text": "".join(lines)}]), 60)
    assert len(parts) > 2 and all(part["text"].endswith(".\n") for part in parts)
    parts, _ = _split(_write(tmp_path / "data.jsonl", [{"text": "hello world, " * 60}]), 60)
    assert len(parts) > 2 and all(part["text"].startswith(" ") for part in parts[1:])
    parts, _ = _split(_write(tmp_path / "data.jsonl", [{"text": "今天天气很好。" * 30}]), 60)
    assert len(parts) > 2 and all(part["text"].endswith("。") for part in parts)


def test_a_turn_that_alone_is_too_long(tmp_path: Path) -> None:
    turns = [("user", "one"), ("assistant", "fox " * 99), ("user", "two"), ("assistant", "dog"), ("user", "three")]
    turns += [("assistant", "world"), ("user", "and?")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"prompt": "a", "completion": "b" * 99},
    ]
    path = _write(tmp_path / "data.jsonl", rows)
    with pytest.raises(
        UserError, match=r"data\.jsonl:1: a part that cannot be cut has \d+ tokens of toy, more than 80 "
    ):
        _split(path, 80)
    parts, counts = _split(path, 80, "skip")
    assert [[message["content"] for message in part["messages"]] for part in parts] == [
        ["two", "dog", "three", "world", "and?"]
    ]
    assert counts == {"rows": 2, "whole": 0, "cut": 2, "parts": 1, "too long": 2}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokenizer in zip("abc", TOKENIZERS, strict=True):
        tokenizer.hf.save_pretrained(tmp_path / name)
    data, out = _write(tmp_path / "data.jsonl", _rows(0)), tmp_path / "new" / "out.jsonl"
    folders = [str(tmp_path / name) for name in "abc"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["split", data, str(out), "--tokenizers", *folders, "--max-tokens", "200"])
    assert not stop.value.code
    said = json.loads(capsys.readouterr().out)
    expected, counts = _split(data, 200)
    assert said == {"wrote": str(out)} | counts
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == expected
    with pytest.raises(SystemExit) as stop:
        cli.main(["split", data, str(out.with_name("other")), "--tokenizers", *folders, "--max-tokens", "20"])
    assert stop.value.code == 2 and "a part that cannot be cut has" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"], "half an output was left"
