"""The coding of rows: a slow reader written from its description, what it guarantees, and what it takes."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.store.coding import coded_bytes, decode, encode

K = 10


def manifest_of(vocab_size: int = 262_144, **changes: Any) -> Manifest:
    fields = {"weights": "w", "tokenizer": "t", "template": "c", "mask_policy": "assistant", "truncation": 512}
    return Manifest(**(fields | {"temperature": 1.0, "top_k": K, "vocab_size": vocab_size} | changes))


def distinct_ids(rng: np.random.Generator, shape: tuple[int, int], vocab_size: int) -> np.ndarray:
    """Distinct in each row, among them 0 and the last one."""
    ids = rng.integers(1, vocab_size // shape[1] - 1, shape) + np.arange(shape[1]) * (vocab_size // shape[1])
    ids[0, 0], ids[-1, -1] = 0, vocab_size - 1
    return rng.permuted(ids, axis=1).astype(np.int32)


def row_of(logp_PE: np.ndarray, vocab_size: int = 262_144, seed: int = 0) -> Row:
    """A row whose last column of log-probs (float64) is the residual."""
    rng = np.random.default_rng(seed)
    positions, entries = len(logp_PE), logp_PE.shape[1] - 1
    ends = np.cumsum(rng.integers(0, 12, positions))
    ends[rng.random(positions) < 0.05] = -1
    return Row(
        ids_hash=b"12345678",
        end_bytes=ends.astype(np.int32),
        ids_PK=distinct_ids(rng, (positions, entries), vocab_size),
        logp_PK=logp_PE[:, :-1].astype(np.float32),
        log_residual_P=logp_PE[:, -1].astype(np.float32),
        sum_logp=-1.0,
        num_bytes=int(positions),
    )


def top_k_of(logits_PV: np.ndarray, k: int = K) -> np.ndarray:
    """The k largest log-probs and the residual, float64 [P, k + 1]."""
    logits_PV = np.sort(logits_PV, axis=1)[:, ::-1]
    with np.errstate(divide="ignore"):
        shifted = logits_PV - logits_PV[:, :1]
        logp_PV = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        rest_P = np.log(np.exp(logp_PV[:, k:]).sum(1))
    return np.column_stack([logp_PV[:, :k], rest_P])


def cases() -> dict[str, np.ndarray]:
    """Log-probs [P, K + 1], the residual last, float64."""
    rng = np.random.default_rng(1)
    found = {f"temperature {t}": top_k_of(rng.normal(scale=4, size=(200, 400)) / t) for t in (0.1, 0.5, 1, 2, 8)}
    found["uniform"] = np.full((2, K + 1), -math.log(K + 1))
    found["uniform, no residual"] = np.append(np.full((2, K), -math.log(K)), np.full((2, 1), -np.inf), axis=1)
    found["all in the residual"] = np.append(np.full((2, K), -np.inf), np.zeros((2, 1)), axis=1)
    one_hot = np.logspace(-12, -0.01, 60)
    found["nearly one-hot"] = np.array([[math.log1p(-e), *[math.log(e / K)] * K] for e in one_hot])
    found["nearly one-hot, on the residual"] = found["nearly one-hot"][:, ::-1].copy()
    found["two outcomes"] = np.array([[math.log1p(-e), *[-np.inf] * (K - 1), math.log(e)] for e in one_hot])
    tiny = np.full((60, K + 1), -math.log(K))
    tiny[:, -1] = np.linspace(-60, -20, 60)
    found["a residual of almost nothing"] = tiny
    found["a deep tail"] = np.column_stack([np.zeros(50), -np.linspace(20, 90, 50 * K).reshape(50, K)])
    for concentration in (0.03, 0.3, 3.0):
        p = np.sort(rng.dirichlet(np.full(K + 1, concentration), 500), axis=1)[:, ::-1]
        found[f"dirichlet {concentration}"] = np.log(np.maximum(p, 1e-300))
    steps = np.arange(0.0, 8.0, 0.002)  # every offset from a code's value
    found["every step"] = np.column_stack([-steps, *[np.log(-np.expm1(-steps - 1e-12) / K)] * K])
    return found


CASES = cases()


def error_and_entropy(logp_PE: np.ndarray, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """KL(row as given || row as read) and the entropy of the row as given, outcome by outcome in float64."""
    kl_P, entropy_P = np.zeros(len(logp_PE)), np.zeros(len(logp_PE))
    read_PE = np.column_stack([row.logp_PK, row.log_residual_P]).astype(np.float64)
    for t, (given, read) in enumerate(zip(logp_PE.tolist(), read_PE.tolist(), strict=True)):
        log_mass = math.log(math.fsum(math.exp(x) for x in given))
        for x, y in zip(given, read, strict=True):
            if x > -math.inf:
                p = math.exp(x - log_mass)
                kl_P[t] += p * (x - log_mass - y)
                entropy_P[t] -= p * (x - log_mass)
    return kl_P, entropy_P


def through(row: Row, manifest: Manifest) -> Row:
    return dataclasses.replace(row, **decode(encode(row, manifest), row.num_tokens, manifest)._asdict())


def with_labels(row: Row, vocab_size: int, listed: float = 0.7) -> Row:
    """That share of the labels, about, are entries of their positions."""
    rng = np.random.default_rng(7)
    ids_P = rng.integers(0, vocab_size, row.num_tokens)
    first_P = row.ids_PK[np.arange(row.num_tokens), rng.integers(0, (row.ids_PK >= 0).sum(1))]
    ids_P = np.where(rng.random(row.num_tokens) < listed, first_P, ids_P).astype(np.int32)
    logp_P = -rng.exponential(4, row.num_tokens).astype(np.float32)
    logp_P[:1], logp_P[1:2] = 0.0, -90.0
    return dataclasses.replace(row, label_ids_P=ids_P, label_logp_P=logp_P)


@pytest.mark.parametrize("name", CASES)
def test_the_error_is_what_the_module_says(name: str) -> None:
    logp_PE = CASES[name]
    row = row_of(logp_PE)
    found = through(row, manifest_of())
    assert found.logp_PK.dtype == found.log_residual_P.dtype == np.float32
    kl_P, entropy_P = error_and_entropy(logp_PE, found)
    assert (kl_P <= 2.7e-4 * entropy_P + 2e-5).all()
    assert kl_P.max() <= 6.7e-4 and kl_P.mean() <= 5e-4
    read_PE = np.exp(np.column_stack([found.logp_PK, found.log_residual_P]).astype(np.float64))
    np.testing.assert_allclose(read_PE.sum(1), 1.0, atol=2e-6)
    given_PE = np.column_stack([row.logp_PK, row.log_residual_P])
    assert ((read_PE == 0) == np.isneginf(given_PE)).all(), "-inf is kept, and nothing else becomes it"
    falls_PE = given_PE[:, 1:] <= given_PE[:, :-1]
    assert (read_PE[:, 1:] <= read_PE[:, :-1])[falls_PE].all(), "the order is kept"
    assert np.array_equal(found.ids_PK, row.ids_PK) and np.array_equal(found.end_bytes, row.end_bytes)


@pytest.mark.parametrize(("k", "vocab_size"), [(1, 2), (1, 100), (7, 509), (64, 4096), (300, 33_554_432)])
def test_other_sizes(k: int, vocab_size: int) -> None:
    rng = np.random.default_rng(3)
    logp_PE = top_k_of(rng.normal(size=(5, 400)) * 0.1, k)
    row = row_of(logp_PE)
    if vocab_size < 10:
        row = dataclasses.replace(row, ids_PK=rng.integers(0, 2, (5, 1)).astype(np.int32))
    else:
        row = dataclasses.replace(row, ids_PK=distinct_ids(rng, (5, k), vocab_size))
    found = through(row, manifest_of(vocab_size, top_k=k))
    assert np.array_equal(found.ids_PK, row.ids_PK)
    kl_P, entropy_P = error_and_entropy(logp_PE, found)
    assert (kl_P <= 2.7e-4 * entropy_P + 2e-5).all() and kl_P.max() < 3.4e-3


def slow_decode(
    data: bytes, positions: int, manifest: Manifest
) -> tuple[list[int], list[list[int]], list[list[float]], list[tuple[int, float]] | None]:
    """The description in `coding`, bit by bit: (end_bytes, ids, log-probs with the residual last, labels)."""
    labelled = False
    if manifest.format == 3:
        labelled, data = {0: False, 1: True}[data[0]], data[1:]
    bits = [byte >> bit & 1 for byte in data for bit in range(8)]
    at = 0

    def numbers(count: int, width: int) -> list[int]:
        nonlocal at
        found = [sum(bits[at + n * width + b] << b for b in range(width)) for n in range(count)]
        at += -(-count * width // 8) * 8
        return found

    width = len(bin(manifest.vocab_size - 1)) - 2
    entries = manifest.entries
    if manifest.rows == "top_k":
        flat = numbers(positions * entries, width)
        ids = [flat[t * entries : (t + 1) * entries] for t in range(positions)]
        codes = numbers(positions * (entries + 1), 8)
        logp = []
        for t in range(positions):
            mine = codes[t * (entries + 1) : (t + 1) * (entries + 1)]
            levels = [-math.inf if c == 255 else -32 * (c / 254) ** 2 for c in mine]
            logp.append([x - math.log(sum(map(math.exp, levels))) for x in levels])
    else:
        draws = max(1, len(bin(entries - 1)) - 2)
        distinct = [n + 1 for n in numbers(positions, draws)]
        flat, times = numbers(sum(distinct), width), numbers(sum(distinct), draws)
        ids, logp = [], []
        for n in distinct:
            ids.append(flat[:n] + [-1] * (entries - n))
            logp.append([math.log((c + 1) / entries) for c in times[:n]] + [-math.inf] * (entries - n + 1))
            flat, times = flat[n:], times[n:]
    labels = None
    if labelled:
        places = numbers(positions, len(bin(entries)) - 2)
        others = iter(numbers(places.count(entries), width))
        found = [next(others) if place == entries else ids[t][place] for t, place in enumerate(places)]
        labels = list(zip(found, struct.unpack_from(f"<{positions}e", data, at // 8), strict=True))
        at += 16 * positions
    ends, last, at = [], 0, at // 8
    far = at + positions
    for t in range(positions):
        code = data[at + t]
        if code == 255:
            last += int.from_bytes(data[far : far + 4], "little", signed=True)
            far += 4
        elif code != 254:
            last += code
        ends.append(-1 if code == 254 else last)
    assert far == len(data)
    return ends, ids, logp, labels


def sampled_row(rng: np.random.Generator, positions: int, draws: int, vocab_size: int) -> Row:
    ids_PK = np.full((positions, draws), -1, dtype=np.int32)
    logp_PK = np.full((positions, draws), -np.inf, dtype=np.float32)
    for t in range(positions):
        drawn = rng.choice(rng.integers(0, vocab_size, 1 + t % 9), draws)
        ids, times = np.unique(drawn, return_counts=True)
        order = np.argsort(-times, kind="stable")
        ids_PK[t, : len(ids)], logp_PK[t, : len(ids)] = ids[order], np.log(times[order] / draws)
    row = row_of(np.zeros((positions, 2)), 4096)
    residual_P = np.full(positions, -np.inf, dtype=np.float32)
    return dataclasses.replace(row, ids_PK=ids_PK, logp_PK=logp_PK, log_residual_P=residual_P)


@pytest.mark.parametrize("rows", ["top_k", "sampled"])
@pytest.mark.parametrize("vocab_size", [300, 262_144])
@pytest.mark.parametrize("labels", ["format 2", "none", "some listed", "all listed", "none listed"])
def test_equals_a_slow_reader(rows: str, vocab_size: int, labels: str) -> None:
    rng, version = np.random.default_rng(2), 2 if labels == "format 2" else 3
    if rows == "top_k":
        manifest = manifest_of(vocab_size, format=version)
        row = row_of(CASES["temperature 1"][:9], vocab_size)
    else:
        manifest = manifest_of(vocab_size, rows="sampled", top_k=None, num_samples=50, seed=0, format=version)
        row = sampled_row(rng, 9, 50, vocab_size)
    ends = np.array([-1, 253, -1, 507, 761, 760, 2**31 - 1, -1, 0], dtype=np.int32)  # near, far, nowhere, backwards
    row = dataclasses.replace(row, end_bytes=ends)
    if labels.endswith("listed"):
        row = with_labels(row, vocab_size, {"some": 0.5, "all": 1.0, "none": 0.0}[labels.split()[0]])
    codes = encode(row, manifest)
    fewest, most = coded_bytes(np.int64([9]), manifest)
    assert fewest[0] <= len(codes) <= most[0]
    found = decode(codes, 9, manifest)
    slow_ends, slow_ids, slow_logp, slow_labels = slow_decode(codes, 9, manifest)
    assert slow_ends == found[0].tolist() == ends.tolist()
    assert slow_ids == found[1].tolist() == row.ids_PK.tolist()
    np.testing.assert_allclose(np.column_stack(found[2:4]), slow_logp, atol=1e-5)
    assert [column.dtype for column in found[:4]] == [np.int32, np.int32, np.float32, np.float32]
    if row.label_ids_P is None or row.label_logp_P is None:
        assert slow_labels is found.label_ids_P is found.label_logp_P is None
    else:
        assert slow_labels is not None and found.label_ids_P is not None and found.label_logp_P is not None
        assert slow_labels == list(zip(found.label_ids_P.tolist(), found.label_logp_P.tolist(), strict=True))
        assert np.array_equal(found.label_ids_P, row.label_ids_P) and found.label_ids_P.dtype == np.int32
        np.testing.assert_allclose(found.label_logp_P, row.label_logp_P, rtol=2**-11, atol=1e-7)
        assert found.label_logp_P.dtype == np.float32
    if rows == "sampled":
        np.testing.assert_allclose(found[2], row.logp_PK, atol=1e-6)


@pytest.mark.parametrize("draws", [1, 2, 50, 300])
def test_draws_are_exact(draws: int) -> None:
    row = sampled_row(np.random.default_rng(draws), 12, draws, 4096)
    found = through(row, manifest_of(4096, rows="sampled", top_k=None, num_samples=draws, seed=0))
    assert np.array_equal(found.ids_PK, row.ids_PK) and np.array_equal(found.end_bytes, row.end_bytes)
    np.testing.assert_allclose(found.logp_PK, row.logp_PK, atol=1e-6)
    np.testing.assert_allclose(np.exp(found.logp_PK).sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("listed", "limit"), [(None, 35), (1.0, 37.5), (0.0, 40)])
def test_bytes_a_position(listed: float | None, limit: float, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest_of()) as writer:
        for n in range(20):
            row = row_of(CASES["temperature 1"], seed=n)
            writer.add(n.to_bytes(16, "big"), row if listed is None else with_labels(row, 262_144, listed))
    assert len(Store.open(tmp_path)) == 20
    size = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    assert size / (20 * len(CASES["temperature 1"])) <= limit


def test_damaged_codes_are_refused_whatever_byte_it_is() -> None:
    """No byte makes `decode` fail in another way, or read a label that is no id."""
    manifest = manifest_of(300, rows="sampled", top_k=None, num_samples=5, seed=0)
    codes = encode(with_labels(sampled_row(np.random.default_rng(4), 9, 5, 300), 300, 0.5), manifest)
    for at in range(len(codes)):
        for value in (0, 1, 127, 255):
            damaged = codes[:at] + bytes([value]) + codes[at + 1 :]
            try:
                found = decode(damaged, 9, manifest)
            except ValueError:
                continue
            if found.label_ids_P is not None:
                assert 0 <= found.label_ids_P.min() <= found.label_ids_P.max() < 300
    with pytest.raises(ValueError, match="first byte is 2"):
        decode(b"\x02" + codes[1:], 9, manifest)
