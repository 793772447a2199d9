"""A row's positions as a few bytes each, and back: ids by the bit, log-probs in a byte, end bytes as differences.

* Ids take as many bits as the vocabulary's largest one: 18 for 262,144.
* A log-prob l of a `top_k` row, and the residual, is coded as c = round(254 sqrt(-l / 32)) and read as -32 (c / 254)^2:
  fine steps where the mass is, coarse ones in the tail; 255 is -inf. Anything else below -32 reads as -32. On reading,
  the K probabilities and the residual are divided by their sum.
* A `sampled` row has its number of distinct ids, the ids, and how often each was drawn, all exact.
* A row may have labels; its first byte says so (1 or 0; rows of format 2 have neither labels nor that byte). Behind
  the other ids and log-probs it then has, in bits, the place of each label among its position's entries (K: none of
  them), the ids of those that are none, and the labels' log-probs as half-precision floats.
* Where positions end: a byte each, the difference to the last one that ended somewhere; 254 for "nowhere", and 255 for
  any other difference, which then stands in 4 bytes at the end of the row.
* A `hidden` row is its vector, in fp32.

What a log-prob's code guarantees. Let e be its error: |e| <= (32 / 254^2) (254 sqrt(-l / 32) + 1 / 4) <= 0.13. With p
the row as given and q as read, KL(p || q) = log sum p exp(e) - sum p e <= 0.53 sum p e^2, since exp(e) - 1 - e is at
most 0.53 e^2; and sum p e^2 is 32 / 254^2 times the row's entropy H(p), up to 2e-5. So KL(p || q) <= 2.7e-4 H(p) + 2e-5
nats. The residual being one outcome, H(p) <= log(K + 1): at K = 10 the error is at most 6.7e-4, and less than 3.4e-3 at
any K. The order of a row's entries is kept.

Shape suffixes: P positions, K entries of a position, U listed entries of all positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusemega.store.manifest import Manifest
from fusemega.store.row import Row

DEPTH, STEPS = 32.0, 254
_NO_MASS = STEPS + 1
_LEVELS = np.append(-DEPTH * (np.arange(STEPS + 1) / STEPS) ** 2, -np.inf).astype(np.float32)
_NOWHERE, _FAR = 254, 255
_LOWEST = float(np.finfo(np.float16).min)
_SPARE = 3  # bytes behind the packed bits that `_unpack` may touch


class Columns(NamedTuple):
    """What the code of a row holds, each as in `Row`."""

    end_bytes: np.ndarray
    ids_PK: np.ndarray
    logp_PK: np.ndarray
    log_residual_P: np.ndarray
    label_ids_P: np.ndarray | None
    label_logp_P: np.ndarray | None


def encode(row: Row, manifest: Manifest) -> bytes:
    """The positions of `row`, one that `manifest` describes (see `StoreWriter.add`); b"" with rows: none."""
    if manifest.rows == "none":
        return b""
    if row.hidden_H is not None:
        return np.ascontiguousarray(row.hidden_H, dtype="<f4").tobytes()
    if manifest.rows == "top_k":
        logp_PK = np.column_stack([row.logp_PK, row.log_residual_P])
        body = _pack(row.ids_PK, _width(manifest.vocab_size)) + _encode_logp(logp_PK).tobytes()
    else:
        listed_PK = row.ids_PK >= 0
        times_U = np.rint(np.exp(row.logp_PK[listed_PK]) * manifest.entries)
        draws = _width(manifest.entries)
        body = _pack(listed_PK.sum(1) - 1, draws)
        body += _pack(row.ids_PK[listed_PK], _width(manifest.vocab_size)) + _pack(times_U - 1, draws)
    head = b"" if manifest.format == 2 else bytes([row.label_ids_P is not None])
    return head + body + _encode_labels(row, manifest) + _encode_ends(row.end_bytes)


def _encode_labels(row: Row, manifest: Manifest) -> bytes:
    if row.label_ids_P is None or row.label_logp_P is None:
        return b""
    equal_PK = row.ids_PK == row.label_ids_P[:, None]
    listed_P = equal_PK.any(1)
    places_P = np.where(listed_P, equal_PK.argmax(1), manifest.entries)
    # A log-prob beyond half precision's range reads as its end.
    half_P = np.clip(row.label_logp_P, _LOWEST, 0.0).astype("<f2")
    unlisted = _pack(row.label_ids_P[~listed_P], _width(manifest.vocab_size))
    return _pack(places_P, _width(manifest.entries + 1)) + unlisted + half_P.tobytes()


def decode(data: bytes, positions: int, manifest: Manifest) -> Columns:
    """Decodes a row of so many positions from `encode`.

    Args:
        data: bytes, of a length that `coded_bytes` allows.

    Raises:
        ValueError: `encode` makes no such bytes: an id beyond the vocabulary, more draws than the manifest has, a
            position that ends before the text begins, or another number of bytes than the row has.
    """
    cells, width = (positions, manifest.entries), _width(manifest.vocab_size)
    padded, at = data + bytes(_SPARE), 0
    has_labels = False
    if manifest.format > 2:
        if data[0] > 1:
            raise ValueError(f"its first byte is {data[0]}; expected 0 or 1")
        has_labels, at = bool(data[0]), 1

    def bits(count: int, width: int) -> np.ndarray:
        nonlocal at
        begin, at = at, at + -(-count * width // 8)  # whole bytes: -(-a // b) rounds up
        return _unpack(padded, begin, count, width)

    if manifest.rows == "top_k":
        ids_PK = bits(positions * manifest.entries, width).reshape(cells)
        codes = np.frombuffer(data, np.uint8, positions * (manifest.entries + 1), at)
        at += len(codes)
        logp_PK = _LEVELS[codes.reshape(positions, -1)]
        mass_P1 = np.exp(logp_PK).sum(1, keepdims=True)
        if not mass_P1.all():
            raise ValueError("no id has any probability at one of its positions")
        logp_PK -= np.log(mass_P1)
        logp_PK, log_residual_P = logp_PK[:, :-1], logp_PK[:, -1]
    else:
        draws = _width(manifest.entries)
        last_P = bits(positions, draws)
        if last_P.max() >= manifest.entries:
            raise ValueError(f"a position lists {int(last_P.max()) + 1} ids of {manifest.entries} draws")
        listed_PK = np.arange(manifest.entries) <= last_P[:, None]
        num_listed = int(listed_PK.sum())
        # Beyond the data `_unpack` would raise an IndexError.
        if at + -(-num_listed * width // 8) + -(-num_listed * draws // 8) + positions > len(data):
            raise ValueError(f"{num_listed} ids do not fit into {len(data)} bytes")
        ids_PK, logp_PK = np.full(cells, -1, dtype=np.int32), np.full(cells, -np.inf, dtype=np.float32)
        ids_PK[listed_PK] = bits(num_listed, width)
        times_PK = np.zeros(cells, dtype=np.int64)
        times_PK[listed_PK] = bits(num_listed, draws) + 1
        if (times_PK.sum(1) != manifest.entries).any():
            raise ValueError(f"the number of draws at one of its positions is not {manifest.entries}")
        logp_PK[listed_PK] = np.log(times_PK[listed_PK] / manifest.entries)
        log_residual_P = np.full(positions, -np.inf, dtype=np.float32)
    if ids_PK.max() >= manifest.vocab_size:
        raise ValueError(f"id {int(ids_PK.max())} is outside the vocabulary of {manifest.vocab_size}")
    label_ids_P = label_logp_P = None
    if has_labels:
        # Cut off here, the padded data would read past its end.
        if at + -(-positions * _width(manifest.entries + 1) // 8) + 3 * positions > len(data):
            raise ValueError(f"its labels do not fit into {len(data)} bytes")
        places_P = bits(positions, _width(manifest.entries + 1))
        listed_P = places_P < manifest.entries
        num_unlisted = positions - int(listed_P.sum())
        if at + -(-num_unlisted * width // 8) + 3 * positions > len(data):
            raise ValueError(f"{num_unlisted} labels do not fit into {len(data)} bytes")
        label_ids_P = np.take_along_axis(ids_PK, np.minimum(places_P, manifest.entries - 1)[:, None], 1)[:, 0]
        label_ids_P[~listed_P] = bits(num_unlisted, width)
        label_logp_P = np.frombuffer(data, "<f2", positions, at).astype(np.float32)
        at += 2 * positions
        if places_P.max() > manifest.entries or label_ids_P.min() < 0 or label_ids_P.max() >= manifest.vocab_size:
            raise ValueError(f"a label is no id of the vocabulary of {manifest.vocab_size}")
    return Columns(_decode_ends(data, at, positions), ids_PK, logp_PK, log_residual_P, label_ids_P, label_logp_P)


def coded_bytes(positions: np.ndarray, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """int64, the fewest and the most bytes that rows of so many positions can be coded in."""
    if manifest.rows == "none":
        return 0 * positions, 0 * positions
    if manifest.hidden is not None:
        return 0 * positions + 4 * manifest.hidden.size, 0 * positions + 4 * manifest.hidden.size
    width, draws, entries = _width(manifest.vocab_size), _width(manifest.entries), manifest.entries
    if manifest.rows == "top_k":
        fewest = most = -(-positions * entries * width // 8) + positions * (entries + 1)
    else:
        fewest = -(-positions * draws // 8) + -(-positions * width // 8) + -(-positions * draws // 8)
        most = -(-positions * draws // 8) + -(-positions * entries * width // 8) + -(-positions * entries * draws // 8)
    if manifest.format > 2:
        places = -(-positions * _width(entries + 1) // 8)
        fewest, most = fewest + 1, most + 1 + places + -(-positions * width // 8) + 2 * positions
    return fewest + positions, most + 5 * positions


def _width(values: int) -> int:
    """Bits of a number from 0 to values - 1."""
    return max(1, (values - 1).bit_length())


def _pack(numbers: np.ndarray, width: int) -> bytes:
    """The lowest `width` bits of each number, one after the other, lowest bit first."""
    words = np.ascontiguousarray(numbers, dtype="<u4").reshape(-1, 1).view(np.uint8)
    return np.packbits(np.unpackbits(words, axis=1, count=width, bitorder="little"), bitorder="little").tobytes()


def _unpack(data: bytes, begin: int, count: int, width: int) -> np.ndarray:
    """int32 [count] from `_pack`: the four bytes from where a number begins, shifted by up to 7. Hence width <= 25."""
    words = np.ndarray(len(data) - begin - _SPARE, "<u4", data, begin, strides=(1,))
    places = np.arange(0, count * width, width)
    numbers = words[places >> 3]
    numbers >>= (places & 7).astype(np.uint32)
    numbers &= (1 << width) - 1
    return numbers.view(np.int32)


def _encode_logp(logp: np.ndarray) -> np.ndarray:
    codes = np.rint(STEPS * np.sqrt(np.clip(-logp, 0.0, DEPTH) / DEPTH)).astype(np.uint8)
    codes[np.isneginf(logp)] = _NO_MASS
    return codes


def _encode_ends(end_bytes: np.ndarray) -> bytes:
    ends = end_bytes.astype(np.int64)
    somewhere = ends >= 0
    # For each position, 1 + the index of the last one up to it that ends somewhere; 0 where there is none yet.
    last = np.maximum.accumulate(np.where(somewhere, np.arange(1, len(ends) + 1), 0))
    steps = np.diff(np.append(0, ends)[last], prepend=0)
    codes = np.where(somewhere, np.where((steps >= 0) & (steps < _NOWHERE), steps, _FAR), _NOWHERE)
    return codes.astype(np.uint8).tobytes() + steps[codes == _FAR].astype("<i4").tobytes()


def _decode_ends(data: bytes, begin: int, positions: int) -> np.ndarray:
    codes = np.frombuffer(data, np.uint8, positions, begin)
    steps = codes.astype(np.int32)
    far = codes == _FAR
    if begin + positions + 4 * np.count_nonzero(far) != len(data):
        raise ValueError(f"it has {len(data)} bytes, and {begin + positions + 4 * np.count_nonzero(far)} are needed")
    steps[far] = np.frombuffer(data, "<i4", offset=begin + positions)
    nowhere = codes == _NOWHERE
    steps[nowhere] = 0
    ends = np.cumsum(steps, dtype=np.int64)
    if ends.min() < 0 or ends.max() > np.iinfo(np.int32).max:
        raise ValueError("a position ends before the text begins, or beyond any text")
    ends = ends.astype(np.int32)
    ends[nowhere] = -1
    return ends
