"""A stage is done again when what it was made from has changed, by content and not by name or time."""

from __future__ import annotations

import os
from pathlib import Path

from fusemega.recipes.stages import Stages


def run(folder: Path, data: Path, model: Path) -> list[str]:
    """Which stages had something to do."""
    did: list[str] = []
    stages = Stages(folder, nproc=1)
    stages.run("data", {"file": str(data)}, lambda: did.append("data"), inputs=[data, model])
    stages.run("train", {}, lambda: did.append("train"))
    stages.run("eval", {}, lambda: did.append("eval"), inputs=[data])
    return did


def test_contents_decide(tmp_path: Path) -> None:
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    model.mkdir()
    data.write_text('{"text": "one"}\n')
    (model / "weights").write_bytes(b"0123")
    folder = tmp_path / "out"
    assert run(folder, data, model) == ["data", "train", "eval"]
    assert run(folder, data, model) == []
    os.utime(data, (1, 1))
    data.rename(tmp_path / "kept")
    (tmp_path / "kept").rename(data)
    assert run(folder, data, model) == [], "touched, and the same"
    before = data.stat()
    data.write_text('{"text": "two"}\n')
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # as long, and as old
    assert run(folder, data, model) == ["data", "train", "eval"]
    (model / "weights").write_bytes(b"0124")
    assert run(folder, data, model) == ["data", "train", "eval"]
    (model / "weights").rename(model / "other")
    assert run(folder, data, model) == ["data", "train", "eval"]
    assert run(folder, data, model) == []
