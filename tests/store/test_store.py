"""The store: what is written is what is read, by key, from any writer, complete or not at all."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega.errors import UserError
from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.store import shard as shard_module
from fusemega.store.merge import merge, open_inputs
from fusemega.store.shard import INDEX
from fusemega.store.verify import verify_rows

K, V = 5, 1000
MANIFEST = Manifest(
    weights="w", tokenizer="t", template="c", mask_policy="assistant", truncation=64, temperature=1.0, top_k=K,
    vocab_size=V, versions={"fusemega": "0"},
)  # fmt: skip


def key_of(n: int) -> bytes:
    """Keys that share their first 8 bytes in pairs, some of them with zeros at the end."""
    return (n // 2 * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big") + (n % 2).to_bytes(8, "little")


def row_of(n: int) -> Row:
    rng = np.random.default_rng(n)
    positions = int(rng.integers(1, 40))
    logits = rng.normal(scale=4, size=(positions, V))
    logp = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, ::-1]
    labels: dict[str, Any] = {}
    if n % 3:  # a store may have rows with and without labels
        half_P = -rng.exponential(2.0, positions).astype(np.float16)  # what is stored exactly
        labels = {"label_ids_P": rng.integers(0, V, positions).astype(np.int32)}
        labels["label_logp_P"] = half_P.astype(np.float32)
    return Row(
        ids_hash=n.to_bytes(8, "big"),
        end_bytes=rng.integers(-1, 500, positions).astype(np.int32),
        ids_PK=np.argsort(rng.random((positions, V)), axis=1)[:, :K].astype(np.int32),
        logp_PK=logp[:, :K].astype(np.float32),
        log_residual_P=np.log(np.exp(logp[:, K:]).sum(-1)).astype(np.float32),
        sum_logp=float(-rng.random() * 100),
        num_bytes=int(rng.integers(0, 1000)),
        **labels,
    )


def assert_same(found: Row | None, expected: Row) -> None:
    assert found is not None
    for field in dataclasses.fields(Row):
        got, want = getattr(found, field.name), getattr(expected, field.name)
        if field.name in ("logp_PK", "log_residual_P"):  # see test_coding
            assert got.dtype == np.float32 and got.shape == want.shape
            np.testing.assert_allclose(got, want, atol=0.2)
        elif isinstance(want, np.ndarray):
            assert got.dtype == want.dtype and np.array_equal(got, want)
        else:
            assert got == want


def fill(folder: Path, numbers: range, writer_id: int = 0, shard_bytes: int = 4000) -> None:
    with StoreWriter(folder, MANIFEST, writer_id=writer_id, shard_bytes=shard_bytes) as writer:
        for n in numbers:
            writer.add(key_of(n), row_of(n))


def test_rows_come_back_by_key_in_any_order(tmp_path: Path) -> None:
    fill(tmp_path / "s", range(100))
    store = Store.open(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("shard-*.bin"))) > 5
    assert len(store) == 100 and store.manifest == MANIFEST
    for n in np.random.default_rng(0).permutation(100).tolist():
        assert_same(store.get(key_of(n)), row_of(n))
    assert store.get(key_of(100)) is None and key_of(100) not in store and key_of(7) in store
    row = store.get(key_of(3))
    assert row is not None
    assert row.num_tokens == len(row.end_bytes)
    assert row.cross_entropy == -row.mean_logp == -row.sum_logp / row.num_tokens


def _write_and_die(folder: str) -> None:
    writer = StoreWriter(folder, MANIFEST, shard_bytes=4000)
    for n in range(200):
        if n == 62:
            Path(folder, ".shard-00000-000099.bin.partial").write_bytes(b"half a shard")
            os._exit(9)
        writer.add(key_of(n), row_of(n))


def test_a_killed_writer_leaves_whole_shards_and_the_next_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    durable = Store.open(tmp_path)
    assert 0 < len(durable) < 62
    for n in range(len(durable)):
        assert_same(durable.get(key_of(n)), row_of(n))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.bin")}
    with StoreWriter(tmp_path, MANIFEST) as writer:
        assert [n for n in range(80) if key_of(n) in writer] == list(range(len(durable)))
        for n in range(80):
            writer.add(key_of(n), row_of(n))
    assert len(Store.open(tmp_path)) == 80
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.bin")}
    assert before.items() <= after.items()
    assert not list(tmp_path.glob(".*partial"))


def _write_share(folder: str, writer_id: int) -> None:
    fill(Path(folder), range(writer_id, 60, 3), writer_id=writer_id)


def test_several_writers_at_once_and_another_number_of_them_later(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_share, args=(str(tmp_path), i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    fill(tmp_path, range(70), writer_id=1)
    store = Store.open(tmp_path)
    assert len(store) == 70
    for n in range(70):
        assert_same(store.get(key_of(n)), row_of(n))


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights", "other"), ("tokenizer", "other"), ("template", None), ("mask_policy", "all"), ("truncation", 32),
     ("temperature", 2.0), ("top_k", 4), ("vocab_size", 999), ("format", 2)],
)  # fmt: skip
def test_another_scorer_is_refused_by_field(field: str, value: object, tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    other = MANIFEST.model_copy(update={field: value})
    with pytest.raises(UserError, match=f"the store's {field} is .*expected {value!r}"):
        StoreWriter(tmp_path, other)
    with pytest.raises(UserError, match=f"the store's {field} is "):
        Store.open(tmp_path).check({field: value})
    Store.open(tmp_path).check({field: getattr(MANIFEST, field)})
    StoreWriter(tmp_path, MANIFEST.model_copy(update={"versions": {"fusemega": "1"}}))


def test_an_unknown_manifest_field_is_named(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        Store.open(tmp_path).check({"temperatur": 1.0})


def test_no_store_and_a_damaged_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a sample store"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"weights": 3}')
    with pytest.raises(UserError, match="manifest.json: damaged: weights"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "truncated shard"),
        (lambda data: data[:10], "not a shard"),
        (lambda data: b"", "not a shard"),
        (lambda data: b"X" + data[1:], "not a shard"),
        (lambda data: data[:20] + b"\xff" + data[21:], "damaged shard: checksum of its header"),
        (lambda data: data + b"more", "truncated shard"),
        (lambda data: b"FMSTORE1" + data[8:], "a shard of the store format 1; run `fusemega teach` again"),
        (lambda data: flip(data, 100), "damaged shard: checksum of its index"),
        (
            lambda data: flip(data, 40 + 20 * INDEX.itemsize),
            f"damaged shard: checksum of the row of .*{key_of(0).hex()}",
        ),
    ],
)
def test_a_damaged_shard_is_named(damage, words: str, tmp_path: Path) -> None:
    fill(tmp_path, range(20), shard_bytes=1 << 20)
    path = next(tmp_path.glob("shard-*.bin"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path.name}: {words}"):
        Store.open(tmp_path).get(key_of(0))


def flip(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_only_the_damaged_row_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(20), shard_bytes=1 << 20)
    path = next(tmp_path.glob("shard-*.bin"))
    path.write_bytes(flip(path.read_bytes(), -1))
    store = Store.open(tmp_path)
    for n in range(19):
        assert_same(store.get(key_of(n)), row_of(n))
    with pytest.raises(UserError, match=key_of(19).hex()):
        store.get(key_of(19))


def test_a_shard_of_another_store_and_a_changed_manifest(tmp_path: Path) -> None:
    fill(tmp_path / "s", range(20))
    other = MANIFEST.model_copy(update={"weights": "another"})
    with StoreWriter(tmp_path / "other", other) as writer:
        writer.add(key_of(50), row_of(50))
    shutil.copy(tmp_path / "other/shard-00000-000000.bin", tmp_path / "s/shard-00001-000000.bin")
    with pytest.raises(UserError, match="shard-00001-000000.bin: a shard of another store"):
        Store.open(tmp_path / "s")
    path = tmp_path / "other/manifest.json"
    path.write_text(path.read_text().replace('"temperature":1.0', '"temperature": 2.0').replace(": 1.0", ": 2.0"))
    with pytest.raises(UserError, match="shard-00000-000000.bin: .*the manifest was changed"):
        Store.open(tmp_path / "other")


def test_more_shards_than_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "_mapped", functools.lru_cache(2)(shard_module._mapped.__wrapped__))
    fill(tmp_path, range(100))
    store = Store.open(tmp_path)
    assert len(store.shards) > 5
    before = len(os.listdir("/proc/self/fd"))
    for n in np.random.default_rng(0).permutation(100).tolist():
        assert_same(store.get(key_of(n)), row_of(n))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_store_of_the_first_format_is_refused(tmp_path: Path) -> None:
    old = {"weights": "w", "tokenizer": "t", "template": None, "mask_policy": "assistant", "truncation": 64}
    old |= {"temperature": 1.0, "top_k": 5, "vocab_size": 9, "versions": {}, "format": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    for use in (Store.open, lambda folder: StoreWriter(folder, MANIFEST)):
        with pytest.raises(UserError, match="format is 1, and this version reads 2 and 3: .*run `fusemega teach` "):
            use(tmp_path)


def test_a_store_of_the_second_format_is_read_merged_and_not_continued(tmp_path: Path) -> None:
    second = MANIFEST.model_copy(update={"format": 2})
    # As the version before wrote it: shards of such stores stay shards of theirs.
    assert second.hash.hex() == "19d31768fd8c46ea"
    bare = [dataclasses.replace(row_of(n), label_ids_P=None, label_logp_P=None) for n in range(4)]
    for part in (0, 1):
        with StoreWriter(tmp_path / str(part), second) as writer:
            for n in (2 * part, 2 * part + 1):
                writer.add(key_of(n), bare[n])
            with pytest.raises(ValueError, match="rows of the store format 2 have no labels"):
                writer.add(key_of(50), row_of(50))
    merge(open_inputs([tmp_path / "0", tmp_path / "1"]), tmp_path / "both")
    both = Store.open(tmp_path / "both")
    assert verify_rows(both) == 4
    for n in range(4):
        assert_same(both.get(key_of(n)), bare[n])
    with pytest.raises(UserError, match="a store of format 2, whose rows have no labels, and this version writes 3"):
        StoreWriter(tmp_path / "both", MANIFEST)


def sum_of(n: int) -> Row:
    return Row.of_sum(n.to_bytes(8, "big"), n % 50 + 1, -1.5 * n - 1 / 3, 7 * n)


def test_a_store_of_sums_takes_forty_bytes_a_sample(tmp_path: Path) -> None:
    manifest = MANIFEST.model_copy(update={"rows": "none", "top_k": None})
    for name, numbers in (("a", range(1200)), ("b", range(1000, 2000))):
        with StoreWriter(tmp_path / name, manifest) as writer:
            for n in numbers:
                writer.add(key_of(n), sum_of(n))
    size = sum(path.stat().st_size for path in (tmp_path / "b").glob("shard-*"))
    assert 40_000 < size < 40_100
    # 800 of `a` and 1000 of `b` are new; a writer that starts again knows what is there.
    assert merge(open_inputs([tmp_path / "a", tmp_path / "b"]), tmp_path / "both") == (2000, 200)
    with StoreWriter(tmp_path / "both", manifest) as writer:
        assert key_of(1999) in writer and key_of(2000) not in writer
    store = Store.open(tmp_path / "both")
    assert verify_rows(store) == len(store) == 2000
    for n in range(0, 2000, 77):
        assert_same(store.get(key_of(n)), sum_of(n))
        entry = store.entry(key_of(n))
        assert entry is not None and entry["sum_logp"] == sum_of(n).sum_logp and entry["positions"] == n % 50 + 1
    assert store.entry(key_of(2000)) is None
    assert store.rows_hash([key_of(0)]) == Store.open(tmp_path / "a").rows_hash([key_of(0)])
    path = next((tmp_path / "a").glob("shard-*.bin"))
    path.write_bytes(flip(path.read_bytes(), -1))
    with pytest.raises(UserError, match="checksum of its index"):
        Store.open(tmp_path / "a")
    with StoreWriter(tmp_path / "c", manifest) as writer:
        with pytest.raises(UserError, match="its summed log-prob is 3.0, more than 0"):
            writer.add(key_of(0), dataclasses.replace(sum_of(0), sum_logp=3.0))
        with pytest.raises(ValueError, match="a row of a store of rows: none"):
            writer.add(key_of(0), row_of(0))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_names_the_shard_and_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(3))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = shard_module.os if call == "fsync" else Path
    writer = StoreWriter(tmp_path, MANIFEST)
    writer.add(key_of(50), row_of(50))
    names = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, full)
        with pytest.raises(UserError, match="shard-00000-000001.bin: cannot write the shard: No space left"):
            writer.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    writer.flush()  # there is room again: the rows were kept
    assert_same(Store.open(tmp_path).get(key_of(50)), row_of(50))


def test_an_exception_in_the_block_writes_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path, MANIFEST) as writer:
        writer.add(key_of(1), row_of(1))
        raise RuntimeError
    assert len(Store.open(tmp_path)) == 0


BAD_ROWS: dict[str, dict[str, Any]] = {
    "log-probs are not all numbers": {"logp_PK": np.nan},
    "log residual are not all numbers": {"log_residual_P": np.nan},
    "log-probs are not": {"logp_PK": 0.5},
    "the probabilities at its position .* sum to .*, not to 1": {"log_residual_P": -0.01},
    "an id twice": {"ids_PK": 7},
    "summed log-prob is nan": {"sum_logp": np.nan},
    "id 1000 is outside the vocabulary of 1000": {"ids_PK": 1000},
    "id -1 is outside": {"ids_PK": -1},
    "label 1000 is outside the vocabulary of 1000": {"label_ids_P": 1000},
    "label -1 is outside": {"label_ids_P": -1},
    "labels' log-probs are not all finite": {"label_logp_P": -np.inf},
    "labels' log-probs are not all finite numbers <= 0": {"label_logp_P": 0.5},
}


@pytest.mark.parametrize("words", BAD_ROWS)
def test_rows_refused_at_write(words: str, tmp_path: Path) -> None:
    row = row_of(4)
    for name, value in BAD_ROWS[words].items():
        if isinstance(getattr(row, name), np.ndarray):
            array = getattr(row, name).copy()
            array[-1] = value
            row = dataclasses.replace(row, **{name: array})
        else:
            row = dataclasses.replace(row, **{name: value})
    with StoreWriter(tmp_path, MANIFEST) as writer:
        with pytest.raises(UserError, match=f"sample {key_of(4).hex()}: .*{words}"):
            writer.add(key_of(4), row)
        assert key_of(4) not in writer
    assert len(Store.open(tmp_path)) == 0


def test_shapes_that_disagree(tmp_path: Path) -> None:
    row = row_of(4)
    with StoreWriter(tmp_path, MANIFEST) as writer:
        for wrong in (
            dataclasses.replace(row, ids_PK=row.ids_PK[:, :-1]),
            dataclasses.replace(row, log_residual_P=row.log_residual_P[:-1]),
            dataclasses.replace(row, end_bytes=row.end_bytes[:0]),
        ):
            with pytest.raises(ValueError, match="5 entries"):
                writer.add(key_of(4), wrong)
        assert row.label_ids_P is not None
        with pytest.raises(ValueError, match="labels, logp are"):
            writer.add(key_of(4), dataclasses.replace(row, label_ids_P=row.label_ids_P[:-1]))
        with pytest.raises(ValueError, match="labels and their log-probs come together"):
            writer.add(key_of(4), dataclasses.replace(row, label_logp_P=None))
        with pytest.raises(ValueError, match="a key has 16 bytes"):
            writer.add(b"short", row)
