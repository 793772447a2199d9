"""A teacher with another tokenizer: its rows in the target's ids, against plain loops over bytes and dictionaries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega.align.make_map import exact_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.errors import UserError
from fusemega.fusion.targets import Targets
from fusemega.losses.distill import Distill
from fusemega.losses.registry import build_objective, parse_objective
from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import OF_TEXT
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import byte_level, sentencepiece

K, PADDING = 6, 7
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the lazy dog; 天气很好 😀"}]},
    {
        "messages": [
            {"role": "user", "content": "naïve café?"},
            {"role": "assistant", "content": " quick brown"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "jumps over\n\n\tthe fox"},
        ]
    },
]
PAIRS = [("chatml", "mistral"), ("llama3", "llama2"), ("chatml", "chatml")]


def write_teacher(folder: Path, data: Path, tokenizer: Tokenizer) -> tuple[TokenizedDataset, dict[bytes, Row]]:
    """A store of random rows, drawn from the ids that occur most, so that several meet in one target id or none."""
    dataset = prepare(DataConfig(path=str(data), seq_length=512), tokenizer, folder / "cache")
    generator = np.random.default_rng(7)
    manifest = Manifest(
        weights="w",
        tokenizer=tokenizer.content_hash,
        template=tokenizer.template_hash,
        mask_policy=MASK_POLICY,
        truncation=512,
        temperature=1.0,
        top_k=K,
        vocab_size=tokenizer.num_ids + PADDING,
    )
    rows = {}
    with StoreWriter(folder / "store", manifest) as writer:
        for sample in dataset:
            count = len(sample.positions)
            ids = np.stack([generator.permutation(tokenizer.num_ids)[:K] for _ in range(count)])
            ids[:, 1] = tokenizer.num_ids + generator.integers(PADDING, size=count)  # a row that no token has
            ids[:, 0] = sample.ids[sample.positions + 1]  # the label, as a teacher would have it
            ids = np.stack([_distinct(row, tokenizer.num_ids + PADDING) for row in ids])
            p = -np.sort(-generator.dirichlet(np.ones(K + 1), size=count)[:, :K], axis=1)
            row = Row(
                ids_hash=sample.ids_hash,
                end_bytes=sample.end_bytes[sample.positions],
                ids_PK=ids.astype(np.int32),
                logp_PK=np.log(p).astype(np.float32),
                log_residual_P=np.log1p(-p.sum(1)).astype(np.float32),
                sum_logp=-9.0,
                num_bytes=sample.num_bytes,
            )
            writer.add(sample.key, row)
    store = Store.open(folder / "store")
    for sample in dataset:
        stored = store.get(sample.key)
        assert stored is not None
        rows[sample.key] = stored
    return dataset, rows


def _distinct(row: np.ndarray, size: int) -> np.ndarray:
    seen: list[int] = []
    for token in row.tolist():
        while token in seen:
            token = (token + 1) % size
        seen.append(token)
    return np.array(seen)


def by_bytes(source: Vocabulary, target: Vocabulary, token: int, shift: int) -> int | None:
    """The target's id of a source token: roles, then equal bytes, with a space added (1) or taken away (-1)."""
    if token >= source.size:
        return None
    for role in ("closing_id", "eos_id", "bos_id"):
        if getattr(source, role) == token and getattr(target, role) is not None:
            return int(getattr(target, role))
    content = source.contents[token]
    if content is None:
        return None
    if shift < 0:
        if not content.startswith(b" ") or content == b" ":
            return None
        content = content[1:]
    elif shift > 0:
        content = b" " + content
    plain = [i for i, other in enumerate(target.contents) if other == content and i not in target.byte_tokens]
    spelt = [i for i, other in enumerate(target.contents) if other == content and i in target.byte_tokens]
    return (plain or spelt or [None])[0]


@pytest.mark.parametrize(("source_template", "target_template"), PAIRS)
@pytest.mark.parametrize("flip", [False, True], ids=["to sentencepiece", "to byte-level"])
def test_rows_in_the_targets_ids(source_template: str, target_template: str, flip: bool, tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    theirs, ours = byte_level(source_template), sentencepiece(target_template)
    if flip:
        theirs, ours = ours, theirs
    taught, rows = write_teacher(tmp_path / "teacher", data, theirs)
    source, target = Vocabulary.of(theirs), Vocabulary.of(ours)
    exact_map(source, target).save(tmp_path / "chat.map")
    section = {"name": "distill", "store": str(tmp_path / "teacher/store"), "map": str(tmp_path / "chat.map")}
    objective = build_objective(parse_objective(section), ours, ours.num_ids)
    without = build_objective(parse_objective(section | {"unaligned": "nothing"}), ours, ours.num_ids)
    assert isinstance(objective, Distill)
    compared = starts = 0
    for sample in prepare(DataConfig(path=str(data), seq_length=512), ours, tmp_path / "cache"):
        targets, row = objective.targets(sample), rows[sample.key]
        assert isinstance(targets, Targets)
        where = {int(end): p for p, end in enumerate(row.end_bytes) if end >= 0}  # the last one of each byte
        mine = {int(end): p for p, end in enumerate(sample.end_bytes[sample.positions]) if end >= 0}
        for p, position in enumerate(sample.positions):
            end = int(sample.end_bytes[position])
            source_p = where.get(end)
            if source_p is None or mine[end] != p:
                assert not targets.mask_P[p]
                continue
            at_start = not sample.supervised[position]
            shift = int(at_start) * (int(target.marks_start) - int(source.marks_start))
            wanted: dict[int, float] = {}
            other = math.exp(row.log_residual_P[source_p])
            for token, logp in zip(row.ids_PK[source_p].tolist(), row.logp_PK[source_p].tolist(), strict=True):
                found = by_bytes(source, target, token, shift)
                if found is None:
                    other += math.exp(logp)
                else:
                    wanted[found] = wanted.get(found, 0.0) + math.exp(logp)
            assert targets.mask_P[p] == bool(wanted)
            listed = targets.ids_PK[p] >= 0
            got = dict(
                zip(targets.ids_PK[p][listed].tolist(), np.exp(targets.logp_PK[p][listed]).tolist(), strict=True)
            )
            assert got == pytest.approx(wanted, abs=1e-5), (sample.source, p)
            if wanted:
                assert math.exp(targets.log_residual_P[p]) == pytest.approx(other, abs=1e-5)
            compared, starts = compared + 1, starts + int(at_start)
            label = int(sample.ids[position + 1])
            if theirs.token(int(row.ids_PK[source_p][0])) == ours.token(label):
                assert label in got  # where both spell the next token alike, the target is taught its own label
        labels = sample.ids[sample.positions + 1]
        for unaligned, rows_of in ((objective, True), (without, False)):
            fields = unaligned.position_fields(sample)
            np.testing.assert_array_equal(fields["teacher_mask"], targets.mask_P | rows_of)
            for p in np.flatnonzero(targets.mask_P):
                np.testing.assert_array_equal(fields["teacher_logp"][p], targets.logp_PK[p])
            for p in np.flatnonzero(~targets.mask_P) if rows_of else ():
                assert fields["teacher_ids"][p].tolist() == [labels[p]] + [-1] * (K - 1)
                assert fields["teacher_logp"][p].tolist() == [0.0] + [-np.inf] * (K - 1)
                assert fields["teacher_log_residual"][p] == -np.inf
    assert compared > 12 and starts == 3
    assert len(taught) == 2


@pytest.mark.parametrize("mapped", [True, False], ids=["a map", "the teacher's own tokenizer"])
@pytest.mark.parametrize("unaligned", ["label", "nothing"])
def test_the_end_of_a_plain_text_is_learnt_from_its_label(mapped: bool, unaligned: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [*ROWS, {"text": "the quick fox"}, {"prompt": "the", "completion": " dog"}]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    theirs, ours = byte_level("chatml"), sentencepiece("chatml")
    ours = ours if mapped else theirs
    write_teacher(tmp_path / "teacher", data, theirs)
    section = {"name": "distill", "store": str(tmp_path / "teacher/store"), "unaligned": unaligned}
    spare = 0 if mapped else PADDING  # rows of the teacher without a map may list ids that only the models have
    if mapped:
        exact_map(Vocabulary.of(theirs), Vocabulary.of(ours)).save(tmp_path / "a.map")
        section["map"] = str(tmp_path / "a.map")
    by_label = build_objective(parse_objective(section), ours, ours.num_ids + spare)
    by_row = build_objective(parse_objective(section | {"text_end": "row"}), ours, ours.num_ids + spare)
    assert isinstance(by_label, Distill)
    texts = 0
    for sample in prepare(DataConfig(path=str(data), seq_length=512), ours, tmp_path / "cache"):
        is_text = bool(sample.is_place(OF_TEXT).any())
        got, wanted = by_label.position_fields(sample), by_row.position_fields(sample)
        label = int(sample.ids[-1])
        last = len(sample.positions) - 1
        for name, field in got.items():
            others = slice(last) if is_text else slice(None)
            np.testing.assert_array_equal(field[others], wanted[name][others])
        if is_text:
            texts += 1
            assert label == ours.eos_id and not by_label.targets(sample).mask_P[last]
            assert got["teacher_mask"][last] == (unaligned == "label")
            if unaligned == "label":
                assert (
                    got["teacher_ids"][last].tolist() == [label, *[-1] * (K - 1)] and got["teacher_logp"][last][0] == 0
                )
            assert wanted["teacher_mask"][last] and wanted["teacher_logp"][last][0] < 0
    assert texts == 2


def test_maps_and_stores_that_do_not_belong_together(tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    theirs, ours = byte_level("chatml"), sentencepiece("chatml")
    write_teacher(tmp_path / "teacher", data, theirs)
    forward = exact_map(Vocabulary.of(theirs), Vocabulary.of(ours))
    forward.save(tmp_path / "right.map")
    exact_map(Vocabulary.of(ours), Vocabulary.of(ours)).save(tmp_path / "source.map")
    exact_map(Vocabulary.of(theirs), Vocabulary.of(theirs)).save(tmp_path / "target.map")
    (tmp_path / "damaged.map").write_bytes(b"PK\3\4 and no more")
    section = {"name": "distill", "store": str(tmp_path / "teacher/store")}
    for name, message in (
        ("source.map", "source.map: the map's source is not the tokenizer of"),
        ("target.map", "target.map: the map's target is not the tokenizer of"),
        ("damaged.map", "damaged.map: .*damaged"),
        ("no.map", "no.map: cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            build_objective(parse_objective(section | {"map": str(tmp_path / name)}), ours, ours.num_ids)
    with pytest.raises(UserError, match="the store's tokenizer is"):
        build_objective(parse_objective(section), ours, ours.num_ids)
    with pytest.raises(UserError, match=r"right.map: the map contains id \d+, and the model in training has .* of 5"):
        build_objective(parse_objective(section | {"map": str(tmp_path / "right.map")}), ours, 5)
