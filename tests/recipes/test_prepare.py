"""The text that a quickstart chooses: whole rows, as they are in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tiny
from fusemega.errors import UserError
from fusemega.recipes.arms import SCALES, Arms, parser
from fusemega.recipes.prepare import choose_rows


def test_rows_end_at_newlines_alone(tmp_path: Path) -> None:
    texts = ["one\u2028more", "two", "three\u0085\x0cfour", "five"]
    rows = [
        json.dumps(
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}, ensure_ascii=False
        )
        for text in texts
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = str(tiny.write_model(tmp_path / "model", source, vocab_size=300, num_hidden_layers=1))
    out = tmp_path / "out" / "chosen.jsonl"
    counts = choose_rows([model], [{"out": str(out), "source": str(source), "tokens": 1000}], 64)
    assert out.read_text(encoding="utf-8") == source.read_text(encoding="utf-8") and counts["chosen"] > 0


def test_layouts_that_do_not_divide_are_refused_before_any_stage(tmp_path: Path) -> None:
    made = parser("quickstart", None, "out", lr=1e-4, lambda_=0.1)
    for wrong in (["--tp", "0"], ["--pp", "-1"], ["--nproc", "two"], ["--smok"]):
        with pytest.raises(SystemExit) as end:
            made.parse_args(wrong)
        assert end.value.code == 2
    options = made.parse_args(["--pp", "3", "--out", str(tmp_path / "out")])
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=2, characters=40)
    model = str(tiny.write_model(tmp_path / "model", chat, vocab_size=300))
    with pytest.raises(UserError, match="pipeline_model_parallel_size: 3 does not divide this model's 4 layers"):
        Arms(options, SCALES["smoke"]).teach("teacher", model)
    assert not (tmp_path / "out").exists()
