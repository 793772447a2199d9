"""`fusemega store`: what is printed, what is merged, and what is found missing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega import cli
from fusemega.store import Manifest, Row, Store, StoreWriter

MANIFEST = Manifest(
    weights="w", tokenizer="t", template="c", mask_policy="assistant", truncation=64, temperature=1.0, top_k=3,
    vocab_size=1000,
)  # fmt: skip


def key_of(n: int) -> bytes:
    return n.to_bytes(16, "little")


def row_of(n: int) -> Row:
    rng = np.random.default_rng(n)
    positions = int(rng.integers(1, 20))
    p = np.sort(rng.dirichlet(np.ones(4), positions), axis=1)[:, ::-1]
    return Row(
        ids_hash=n.to_bytes(8, "big"),
        end_bytes=np.arange(positions, dtype=np.int32),
        ids_PK=np.argsort(rng.random((positions, 1000)), axis=1)[:, :3].astype(np.int32),
        logp_PK=np.log(p[:, :3]).astype(np.float32),
        log_residual_P=np.log(p[:, 3]).astype(np.float32),
        sum_logp=-float(n + 1),
        num_bytes=n + 2,
    )


def write(folder: Path, numbers: range, changed: int | None = None, **manifest: Any) -> Path:
    with StoreWriter(folder, MANIFEST.model_copy(update=manifest), shard_bytes=2000) as writer:
        for n in numbers:
            row = row_of(n)
            writer.add(key_of(n), dataclasses.replace(row, sum_logp=-0.5) if n == changed else row)
    return folder


def fusemega(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["store", *map(str, words)])
    return stop.value.code, *capsys.readouterr()


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "s", range(50))
    status, out, _ = fusemega(capsys, "inspect", path, "--json")
    found = json.loads(out)
    rows = [row_of(n) for n in range(50)]
    positions, text_bytes = sum(row.num_tokens for row in rows), sum(row.num_bytes for row in rows)
    size = sum(shard.stat().st_size for shard in path.glob("shard-*"))
    assert status == 0 and found.items() >= json.loads(MANIFEST.model_dump_json(exclude_none=True)).items()
    assert "num_samples" not in found and found["rows"] == "top_k"
    assert (found["samples"], found["positions"], found["text_bytes"]) == (50, positions, text_bytes)
    assert found["size_bytes"] == size and found["bytes_per_position"] == round(size / positions, 2)
    assert found["bytes_per_sample"] == round(size / 50, 2)
    assert found["shards"] == len(list(path.glob("shard-*"))) > 1
    nats = math.fsum(-row.sum_logp for row in rows)
    assert found["cross_entropy_per_token"] == pytest.approx(nats / positions)
    assert found["cross_entropy_per_byte"] == pytest.approx(nats / text_bytes)
    status, out, _ = fusemega(capsys, "inspect", path)
    assert status == 0 and dict(line.split(None, 1) for line in out.splitlines()).keys() == found.keys()


def test_inspect_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = fusemega(capsys, "inspect", write(tmp_path / "s", range(0)), "--json")
    assert status == 0
    assert json.loads(out)["samples"] == 0 and json.loads(out)["cross_entropy_per_byte"] is None


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [write(tmp_path / "a", range(30)), write(tmp_path / "b", range(20, 60)), write(tmp_path / "c", range(0))]
    status, out, _ = fusemega(capsys, "merge", tmp_path / "out", *parts)
    assert status == 0 and "60 samples of 3 stores; 10 repeated samples" in out
    merged = Store.open(tmp_path / "out")
    assert len(merged) == 60 and merged.manifest == MANIFEST and len(merged.shards) == 1
    for n in range(60):
        source = Store.open(parts[0] if n < 30 else parts[1])
        assert merged.coded(key_of(n)) == source.coded(key_of(n))
    assert not list(tmp_path.glob(".*"))
    with StoreWriter(tmp_path / "out", MANIFEST) as writer:  # teaching goes on in it
        assert key_of(59) in writer and key_of(60) not in writer
        writer.add(key_of(60), row_of(60))
    assert len(Store.open(tmp_path / "out")) == 61


def test_merge_refuses_different_rows_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [write(tmp_path / "a", range(30)), write(tmp_path / "b", range(25, 60), changed=27)]
    status, _, err = fusemega(capsys, "merge", tmp_path / "out", *parts)
    assert status == 2 and f"its row of sample {key_of(27).hex()} differs from the one in {parts[0]}" in err
    parts[1] = write(tmp_path / "c", range(30, 60), temperature=2.0)
    status, _, err = fusemega(capsys, "merge", tmp_path / "out", *parts)
    assert status == 2 and "the store's temperature is 2.0, expected 1.0" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "s", range(50))
    status, out, _ = fusemega(capsys, "verify", path)
    assert status == 0 and json.loads(out) == {"path": str(path), "rows": 50}
    shard = sorted(path.glob("shard-*"))[0]
    (path / "shard-00009-000000.bin").write_bytes(shard.read_bytes())
    status, _, err = fusemega(capsys, "verify", path)
    assert status == 2 and "shard-00009-000000.bin: sample" in err and "already has a row" in err


def test_verify_finds_rows_that_are_no_distributions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that a writer would have refused, coded nevertheless."""
    from fusemega.store.coding import encode
    from fusemega.store.shard import index_entry

    row = row_of(3)
    for number, (bad, words) in enumerate(
        (
            (dataclasses.replace(row, ids_PK=np.full_like(row.ids_PK, 5)), "lists an id twice"),
            (dataclasses.replace(row, ids_PK=row.ids_PK * 0 + [1001, 1002, 1003]), "outside the vocabulary of 1000"),
            (dataclasses.replace(row, logp_PK=row.logp_PK[:, ::-1]), "by falling probability"),
            (dataclasses.replace(row, sum_logp=math.nan), "'sum_logp': nan"),
        )
    ):
        with StoreWriter(tmp_path / str(number), MANIFEST) as writer:
            codes = encode(bad, MANIFEST)
            writer.add_coded(index_entry(key_of(3), bad, codes), codes)
        status, _, err = fusemega(capsys, "verify", tmp_path / str(number))
        assert status == 2 and words in err and key_of(3).hex() in err, err
