"""Positions that two tokenizations share, and their kinds, against plain loops."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np

from fusemega.align.position_kinds import POSITION_KINDS, position_kinds
from fusemega.align.positions import shared_positions
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.sample import Sample
from tests.align.real import CONTENTS, chat, real_tokenizers


def by_loops(source: list[int], target: list[int]) -> list[tuple[int, int]]:
    pairs = []
    for byte in range(max([0, *source, *target]) + 1):
        last_source = last_target = None
        for i, end in enumerate(source):
            if end == byte:
                last_source = i
        for i, end in enumerate(target):
            if end == byte:
                last_target = i
        if last_source is not None and last_target is not None:
            pairs.append((last_source, last_target))
    return pairs


def test_shared_positions_against_loops() -> None:
    rng = random.Random(0)
    for _ in range(200):
        # Mostly rising, with repeats and unknown places, as samples have them.
        sides = []
        for _ in range(2):
            side = sorted(rng.choices(range(30), k=rng.randint(0, 25)))
            sides.append([-1 if rng.random() < 0.2 else end for end in side])
        source_at, target_at = shared_positions(*(np.array(side, dtype=np.int32) for side in sides))
        assert list(zip(source_at.tolist(), target_at.tolist(), strict=True)) == by_loops(*sides)
        assert source_at.dtype == target_at.dtype == np.int64


def kinds_by_loops(theirs: Sample, ours: Sample) -> dict[int, str]:
    """The target's shared positions -> kind, from all tokens of both samples."""
    last = {int(theirs.end_bytes[i]): int(i) for i in theirs.positions if theirs.end_bytes[i] >= 0}
    mine = {int(ours.end_bytes[i]): int(i) for i in ours.positions if ours.end_bytes[i] >= 0}
    found = {}
    for end, i in mine.items():
        if end in last:
            target, source = int(ours.end_bytes[i + 1]), int(theirs.end_bytes[last[end] + 1])
            known = target >= 0 and source >= 0
            longer = "target longer" if target > source else "teacher longer"
            found[i] = ("equal" if target == source else longer) if known else "unrelated"
    return found


def test_kinds_of_positions_against_loops(tmp_path: Path) -> None:
    """The row knows only the ends of supervised positions; the loops know every token of the teacher's sample."""
    code = "def f(x):\n    if x:\n        return x + 1234\n\n\nf(2024)\n"
    rows = [chat("hi", *CONTENTS), chat("a", code, "b", "今天 12345"), {"text": code}, {"text": CONTENTS[2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), seq_length=1024)
    loaded = real_tokenizers("smollm2", "mistral_v3")
    samples = {name: {s.key: s for s in prepare(config, t, tmp_path)} for name, (t, _) in loaded.items()}
    seen: Counter[str] = Counter()
    for source, target in (("mistral_v3", "smollm2"), ("smollm2", "mistral_v3")):
        shared = samples[source].keys() & samples[target].keys()
        assert len(shared) == len(rows)
        for key in shared:
            theirs, ours = samples[source][key], samples[target][key]
            ends = theirs.end_bytes[theirs.positions]
            at, to = shared_positions(ends, ours.end_bytes[ours.positions])
            kinds = position_kinds(ends, at, ours, to)
            got = {int(ours.positions[t]): POSITION_KINDS[kind] for t, kind in zip(to, kinds, strict=True)}
            assert got == kinds_by_loops(theirs, ours), (source, target, ours.source)
            seen.update(got.values())
    assert seen["equal"] > 200 and min(seen["target longer"], seen["teacher longer"]) > 20, seen


def test_a_closing_of_several_tokens_is_unrelated() -> None:
    target = Sample(
        b"",
        np.zeros(5, dtype=np.int32),
        np.array([False, True, True, True, True]),
        np.array([0, 1, -1, -1, 4], dtype=np.int32),  # the content's last token and the first of the closing
        2,
        "",
    )
    row = np.array([0, 1, 2])  # of one closing token
    at, to = shared_positions(row, target.end_bytes[target.positions])
    kinds = position_kinds(row, at, target, to)
    assert [POSITION_KINDS[kind] for kind in kinds] == ["equal", "unrelated"]
