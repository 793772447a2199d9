"""The coding of rows: a slow reader written from its description, what it guarantees, and what it takes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.store.coding import decode, encode

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
    end_bytes, ids_PK, logp_PK, log_residual_P = decode(encode(row, manifest), row.num_tokens, manifest)
    return dataclasses.replace(row, end_bytes=end_bytes, ids_PK=ids_PK, logp_PK=logp_PK, log_residual_P=log_residual_P)


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
) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """The description in `coding`, bit by bit: (end_bytes, ids, log-probs with the residual last)."""
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
    return ends, ids, logp


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
def test_equals_a_slow_reader(rows: str, vocab_size: int) -> None:
    rng = np.random.default_rng(2)
    if rows == "top_k":
        manifest = manifest_of(vocab_size)
        row = row_of(CASES["temperature 1"][:9], vocab_size)
    else:
        manifest = manifest_of(vocab_size, rows="sampled", top_k=None, num_samples=50, seed=0)
        row = sampled_row(rng, 9, 50, vocab_size)
    ends = np.array([-1, 253, -1, 507, 761, 760, 2**31 - 1, -1, 0], dtype=np.int32)  # near, far, nowhere, backwards
    row = dataclasses.replace(row, end_bytes=ends)
    codes = encode(row, manifest)
    found = decode(codes, 9, manifest)
    slow_ends, slow_ids, slow_logp = slow_decode(codes, 9, manifest)
    assert slow_ends == found[0].tolist() == ends.tolist()
    assert slow_ids == found[1].tolist() == row.ids_PK.tolist()
    np.testing.assert_allclose(np.column_stack(found[2:]), slow_logp, atol=1e-5)
    assert [column.dtype for column in found] == [np.int32, np.int32, np.float32, np.float32]
    if rows == "sampled":
        np.testing.assert_allclose(found[2], row.logp_PK, atol=1e-6)


@pytest.mark.parametrize("draws", [1, 2, 50, 300])
def test_draws_are_exact(draws: int) -> None:
    row = sampled_row(np.random.default_rng(draws), 12, draws, 4096)
    found = through(row, manifest_of(4096, rows="sampled", top_k=None, num_samples=draws, seed=0))
    assert np.array_equal(found.ids_PK, row.ids_PK) and np.array_equal(found.end_bytes, row.end_bytes)
    np.testing.assert_allclose(found.logp_PK, row.logp_PK, atol=1e-6)
    np.testing.assert_allclose(np.exp(found.logp_PK).sum(1), 1.0, atol=1e-5)


def test_at_most_35_bytes_a_position(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest_of()) as writer:
        for n in range(20):
            logp_PE = CASES["temperature 1"]
            writer.add(n.to_bytes(16, "big"), row_of(logp_PE, seed=n))
    assert len(Store.open(tmp_path)) == 20
    size = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    assert size / (20 * len(CASES["temperature 1"])) <= 35
