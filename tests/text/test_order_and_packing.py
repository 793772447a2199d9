"""Data order and packing: what is in a step never depends on how the step is cut up."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fusemega.passes.micro_batch import Fields, FieldShapes, MicroBatch, collate
from fusemega.runtime.context_parallel import zigzag
from fusemega.text.order import sample_ids
from fusemega.text.packing import deal, micro_batch_tokens, pack, padded
from fusemega.text.sample import Sample


def test_order_visits_everything_once_an_epoch_whatever_the_batch() -> None:
    samples, seed = 23, 7
    stream = np.concatenate([sample_ids(step, 5, samples, seed) for step in range(14)])  # 3 epochs and a bit
    for batch in (1, 4, 70):
        again = np.concatenate([sample_ids(step, batch, samples, seed) for step in range(-(-len(stream) // batch))])
        assert again[: len(stream)].tolist() == stream.tolist()
    epochs = [stream[i * samples : (i + 1) * samples].tolist() for i in range(3)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sample_ids(0, 23, samples, seed + 1).tolist() != epochs[0]
    assert sample_ids(0, 40, 3, seed).tolist()[:9] == sample_ids(0, 9, 3, seed).tolist()  # a batch of many epochs
    # These numbers are part of what a checkpoint means: they must not change with a version of numpy.
    assert sample_ids(0, 8, 10, 1234).tolist() == [8, 1, 6, 2, 0, 3, 5, 7]


def make(rng: random.Random, n: int, longest: int) -> list[Sample]:
    samples = []
    for i in range(n):
        length = rng.randint(2, longest)
        supervised = np.array([False] + [rng.random() < 0.5 for _ in range(length - 1)])
        supervised[-1] = True
        ids = np.array([rng.randrange(1, 100) for _ in range(length)], dtype=np.int32)
        key = i.to_bytes(16, "big")
        samples.append(Sample(key, ids, supervised, np.zeros(length, dtype=np.int32), 0, f"s:{i}"))
    return samples


class Tags(Fields):
    """Says of each supervised position, sequence and group which it is: checks that entries follow what they are of."""

    def position_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        tags = np.array([[number_of(sample), t] for t in sample.positions], dtype=np.int64)
        return {"tag": tags, "weight": sample.ids[sample.positions].astype(np.float32)}

    def sequence_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {"number": np.array(number_of(sample))}

    def group_fields(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"first": np.array([number_of(samples[0]), len(samples)])}


def number_of(sample: Sample) -> int:
    return int.from_bytes(sample.key, "big")


TAGS = Tags()


@pytest.mark.parametrize("seed", range(6))
def test_every_layout_trains_on_the_same_positions(seed: int) -> None:
    rng = random.Random(seed)
    seq_length = rng.choice([16, 40])
    samples = make(rng, rng.randint(1, 30), seq_length)
    lengths = [len(sample.ids) for sample in samples]
    expected = sorted((i, int(t)) for i, sample in enumerate(samples) for t in sample.positions)
    for packed in (False, True):
        bins = pack(lengths, seq_length, packed)
        for dp, mbs in ((1, 1), (2, 1), (1, 4), (3, 2)):
            ranks = deal(bins, np.square(lengths), dp, mbs)
            assert len(ranks) == dp and len({len(rank) for rank in ranks}) == 1
            rows = sum(len(rank) for rank in ranks) * mbs
            assert rows == -(-len(bins) // (dp * mbs)) * dp * mbs
            seen = []
            for unit, alike in ((1, False), (8, False), (8, True)):
                seen.clear()
                for rank in ranks:
                    sizes = micro_batch_tokens(rank, lengths, unit, alike)
                    assert len(set(sizes)) == 1 or not alike
                    for micro_batch, size in zip(rank, sizes, strict=True):
                        content = sum(lengths[i] for b in micro_batch for i in b)
                        assert size % unit == 0 and size >= max(content, 1) and size <= seq_length * mbs
                        assert alike or size < max(content, 1) + unit
                        held = [[samples[i] for i in b] for b in micro_batch]
                        batch = collate(alone(held), TAGS, size, 0, FieldShapes.of(TAGS, samples[:1]))
                        check(batch, held, size)
                        seen += [tuple(tag) for tag in batch.position_fields["tag"].tolist()]
                assert sorted(seen) == expected


def alone(rows: list[list[Sample]]) -> list[list[Sample]]:
    """Each sample a group of its own."""
    return [[sample] for row in rows for sample in row]


def check(batch: MicroBatch, rows: list[list[Sample]], num_tokens: int) -> None:
    """One micro-batch, token by token."""
    tokens: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    bounds = [0]
    for sample in (sample for row in rows for sample in row):
        for t in range(len(sample.ids)):
            if t + 1 < len(sample.ids) and sample.supervised[t + 1]:
                positions.append(len(tokens))
                labels.append(int(sample.ids[t + 1]))
            tokens.append(int(sample.ids[t]))
            places.append(t)
        bounds.append(len(tokens))
    pad = num_tokens - len(tokens)
    tokens += [0] * pad
    places += range(pad)
    if pad:
        bounds.append(len(tokens))
    assert batch.tokens.tolist() == [tokens] and batch.tokens.dtype == torch.int64
    assert batch.position_ids.tolist() == [places] and batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == bounds and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    assert batch.positions.tolist() == positions and batch.labels.tolist() == labels
    assert batch.positions.dtype == batch.labels.dtype == torch.int64
    assert batch.position_fields["weight"].tolist() == [float(tokens[p]) for p in positions]
    assert batch.sources == tuple(sample.source for row in rows for sample in row)
    assert len(batch.sequences) == len(labels) and batch.sequence_tokens.sum() == len(labels)


@pytest.mark.parametrize(("seed", "size"), [(0, 2), (1, 2), (2, 3)])
def test_context_ranks_share_every_sample(seed: int, size: int) -> None:
    rng = random.Random(seed)
    seq_length, multiple = 36, 2 * size
    samples = make(rng, rng.randint(5, 30), seq_length)
    lengths = [len(sample.ids) for sample in samples]
    places = padded(lengths, multiple)
    bins = pack(places, seq_length, packed=True)
    expected = sorted((i, int(t)) for i, sample in enumerate(samples) for t in sample.positions)
    seen = []
    hand = deal(bins, np.square(lengths), 1, 2)[0]
    for micro_batch, tokens in zip(hand, micro_batch_tokens(hand, places, multiple, alike=False), strict=True):
        held = [[samples[i] for i in b] for b in micro_batch]
        whole = collate(alone(held), TAGS, tokens, 0, FieldShapes.of(TAGS, samples[:1]), multiple)
        assert not (whole.cu_seqlens % multiple).any()
        flat = [sample for row in held for sample in row]
        assert whole.sequence_tokens.tolist() == [len(sample.positions) for sample in flat]
        owner = [number_of(flat[i]) for i in whole.sequences.tolist()]
        assert owner == whole.position_fields["tag"][:, 0].tolist()
        collected = torch.full((len(whole.labels), 2), -1)
        for rank in range(size):
            part = whole.context_part(rank, size)
            mine = zigzag(whole.cu_seqlens, rank, size)
            assert part.tokens.tolist() == whole.tokens[:, mine].tolist()
            assert part.position_ids.tolist() == whole.position_ids[:, mine].tolist()
            assert part.position_fields["weight"].tolist() == part.tokens[0, part.positions].tolist()
            assert torch.equal(part.labels, whole.labels[part.kept])
            assert torch.equal(part.sequences, whole.sequences[part.kept])
            assert part.num_positions == len(whole.labels) and part.cu_seqlens is whole.cu_seqlens
            collected[part.kept] = part.position_fields["tag"]
            seen += [tuple(tag) for tag in part.position_fields["tag"].tolist()]
        assert torch.equal(collected, whole.position_fields["tag"])
    assert sorted(seen) == expected


def test_the_interleaved_schedule_gets_whole_groups_of_micro_batches() -> None:
    bins = [[i] for i in range(5)]
    for dp, micro_batch, multiple, wanted in ((1, 1, 1, 5), (1, 1, 4, 8), (2, 1, 2, 4), (1, 2, 2, 4), (2, 3, 3, 3)):
        ranks = deal(bins, [9] * 5, dp, micro_batch, multiple)
        assert [len(rank) for rank in ranks] == [wanted] * dp
        dealt = sorted(i for rank in ranks for m in rank for b in m for i in b)
        assert dealt == list(range(5)) and all(len(m) == micro_batch for rank in ranks for m in rank)


def test_a_filler_micro_batch_has_fields_without_entries() -> None:
    sample = make(random.Random(0), 1, 8)[0]
    assert micro_batch_tokens([[[0]], [[]]], [8], 4, alike=False) == [8, 4]
    batch = collate([], TAGS, 8, 9, FieldShapes.of(TAGS, [sample]))
    assert batch.position_fields["tag"].shape == (0, 2) and batch.position_fields["tag"].dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0, 8] and batch.max_seqlen == 8
    assert batch.tokens.unique().tolist() == [9]
    assert batch.positions.shape == batch.labels.shape == (0,) and batch.sources == ()
    assert batch.sequences.shape == batch.sequence_tokens.shape == (0,)


def test_packing_is_tight_and_dealing_is_even() -> None:
    rng = random.Random(5)
    lengths = [rng.randint(1, 100) for _ in range(300)]
    bins = pack(lengths, 128, packed=True)
    assert sorted(i for b in bins for i in b) == list(range(300))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 128
    assert len(bins) <= 1.05 * sum(lengths) / 128 + 1
    work = [sum(lengths[i] ** 2 for m in rank for b in m for i in b) for rank in deal(bins, np.square(lengths), 4, 2)]
    assert max(work) < 1.02 * min(work)
    assert pack(lengths, 128, packed=True) == bins


def test_what_does_not_fit() -> None:
    samples = make(random.Random(1), 3, 16)
    with pytest.raises(ValueError, match="does not fit"):
        pack([3, 17], 16, packed=True)
    with pytest.raises(ValueError, match="exceed"):
        collate([[samples[0]]] * 20, TAGS, 16, 0, FieldShapes.of(TAGS, samples[:1]))

    class Wrong(Fields):
        def position_fields(self, sample: Sample) -> dict[str, np.ndarray]:
            return {"x": np.zeros(0)}

    with pytest.raises(ValueError, match="field 'x' has 0 entries"):
        collate([samples[:1]], Wrong(), 16, 0, FieldShapes.of(Wrong(), samples[:1]))
