"""Plans and copying on small tensors, against numpy indexing: any boxes, any cut, any type, any block size."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from fusemega.convert import copying
from fusemega.errors import UserError
from fusemega.files.moves import Assembled, FilePart, Item, Move, Stored, as_is, window


def _stored(path: Path, values: torch.Tensor, offset: int = 5) -> Stored:
    path.write_bytes(b"x" * offset + values.contiguous().view(torch.uint8).numpy().tobytes())
    return Stored(path.name, str(path), offset, tuple(values.shape), str(values.dtype).removeprefix("torch."))


def _read(tensor: Assembled) -> torch.Tensor:
    with copying.Reader() as reader:
        data = bytearray(b"".join(bytes(block) for block in reader.blocks(tensor)))
    return torch.frombuffer(data, dtype=getattr(torch, tensor.dtype)).view(tensor.shape)


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("shape", [(23,), (9, 8), (4, 5, 6)])
def test_boxes_of_boxes_are_what_indexing_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block_bytes: int
) -> None:
    """A tensor split over a grid of files, of which any window is read into any place of another tensor."""
    monkeypatch.setattr(copying, "BLOCK_BYTES", block_bytes)
    chance = random.Random(len(shape))
    whole = torch.arange(np.prod(shape), dtype=torch.float32).view(shape)
    for trial in range(8):
        cuts = [sorted({0, n, chance.randint(0, n), chance.randint(0, n)}) for n in shape]
        moves = []
        for corner in np.ndindex(*(len(c) - 1 for c in cuts)):
            box = tuple((c[i], c[i + 1]) for c, i in zip(cuts, corner, strict=True))
            part = whole[tuple(slice(*span) for span in box)]
            source = _stored(tmp_path / f"{trial}-{corner}", part)
            moves.append(Move(source, tuple((0, n) for n in part.shape), box))
        assert torch.equal(_read(Assembled("t", shape, "float32", tuple(moves))), whole)
        box = tuple((a, chance.randint(a + 1, n)) for n in shape for a in [chance.randint(0, n - 1)])
        at = tuple(chance.randint(0, 3) for _ in shape)
        target_shape = tuple(start + b - a + chance.randint(0, 2) for start, (a, b) in zip(at, box, strict=True))
        seen = Assembled("t", target_shape, "float32", tuple(window(moves, box, at)))
        wanted = torch.zeros(target_shape)
        here = tuple(slice(start, start + b - a) for start, (a, b) in zip(at, box, strict=True))
        wanted[here] = whole[tuple(slice(*span) for span in box)]
        assert torch.equal(_read(seen), wanted)
        assert seen.complete == (tuple(b - a for a, b in box) == target_shape)


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
@pytest.mark.parametrize("target", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_types_change_as_torch_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: torch.dtype, target: str, block_bytes: int
) -> None:
    monkeypatch.setattr(copying, "BLOCK_BYTES", block_bytes)
    values = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).to(source)
    largest = 65280.0 if source == torch.bfloat16 else 65519.0  # the last that float16 does not round to infinity
    values[0, :4] = torch.tensor([float("inf"), -0.0, 1e-40, largest])
    moves = as_is(_stored(tmp_path / "a", values)).moves
    found = _read(Assembled("a", (7, 6), target, moves))
    wanted = values.to(getattr(torch, target))
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_same_bits_tells_what_equality_does_not(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    changed = values.clone()
    changed[0, 0] = -0.0
    a, b, c = (as_is(_stored(tmp_path / n, v)) for n, v in (("a", values), ("b", values), ("c", changed)))
    assert copying.same_bits((a, b))
    assert not copying.same_bits((a, c))


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    stored = _stored(tmp_path / "short", torch.ones(4, 4))
    (tmp_path / "short").write_bytes((tmp_path / "short").read_bytes()[:-1])
    with pytest.raises(UserError, match="short: truncated inside tensor short"):
        _read(as_is(stored))
    (tmp_path / "short").unlink()
    with pytest.raises(UserError, match="short: cannot read tensor short: No such file"):
        _read(as_is(stored))


@pytest.mark.parametrize("block_bytes", [32, 1 << 20])
def test_an_item_is_written_in_its_place_and_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(copying, "BLOCK_BYTES", block_bytes)
    values, other = torch.randn(9, 4), torch.randn(6, 4)
    whole, half = _stored(tmp_path / "whole", values), _stored(tmp_path / "half", other)
    upper = Assembled("upper", (3, 4), "float32", tuple(window(as_is(half).moves, ((3, 6), (0, 4)), (0, 0))))
    item = Item("out", 3, (FilePart(b"head", as_is(whole), b"tail"), FilePart(b"only"), FilePart(tensor=upper)))
    (tmp_path / "out").write_bytes(b"abc")
    written = copying.write_item(str(tmp_path), True, item)
    expected = b"head" + values.numpy().tobytes() + b"tail" + b"only" + other[3:].numpy().tobytes()
    assert (tmp_path / "out").read_bytes() == b"abc" + expected and item.nbytes == len(expected)
    assert written.hash == xxhash.xxh3_128(expected).hexdigest()
    # What is read is hashed only where that is asked for, what is written always.
    assert copying.write_item(str(tmp_path), False, item) == copying.Written(item.name, written.hash, {})
    assert (tmp_path / "out").read_bytes() == b"abc" + expected
    # Of the second source only a part was read, from its middle: there is no digest of it.
    assert written.digests == {"whole": xxhash.xxh3_128(values.numpy().tobytes()).hexdigest()}
