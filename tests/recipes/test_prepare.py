"""The text that a quickstart chooses: whole rows, as they are in the file."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import tiny
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
