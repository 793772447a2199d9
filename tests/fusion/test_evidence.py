"""How probable rows make the labels, by kind of position: against plain loops, through a bad map and a good one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusemega.align.make_map import exact_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.fusion import evidence
from fusemega.fusion.evidence import evidence_of, spread
from fusemega.fusion.targets import Targets, mixture
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.losses.distill import Distill
from fusemega.losses.registry import build_objective, parse_objective
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.tokenizer import Tokenizer
from tests.align.real import real_tokenizers
from tests.align.test_positions import kinds_by_loops

CODE = "def f_{n}(x):\n    for i in range({n}):\n        if x > {n}{n}:\n            return x + i\n    return [x]\n"
K, CERTAIN = 4, 0.9


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that gives 0.9 to the token that follows, its store, and maps to the target's tokenizer."""
    folder = tmp_path_factory.mktemp("evidence")
    rows = [{"text": CODE.format(n=n)} for n in range(20)]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = real_tokenizers("smollm2", "mistral_v3")
    (ours, target), (theirs, source) = loaded["smollm2"], loaded["mistral_v3"]
    exact = exact_map(source, target)
    exact.save(folder / "exact.map")
    with_lines(exact, target).save(folder / "cells.map")
    for name, tokenizer in (("theirs", theirs), ("ours", ours)):
        dataset = data(folder, tokenizer)
        manifest = Manifest(
            weights="w",
            tokenizer=tokenizer.content_hash,
            template=tokenizer.template_hash,
            mask_policy=MASK_POLICY,
            truncation=512,
            temperature=1.0,
            top_k=K,
            vocab_size=tokenizer.num_ids,
        )
        with StoreWriter(folder / name, manifest) as writer:
            for sample in dataset:
                writer.add(sample.key, sure_row(sample))
    return folder


def with_lines(made: VocabularyMap, target: Vocabulary) -> VocabularyMap:
    """The map with one cell more: all tokens that begin with a line break."""
    lines = [i for i, content in enumerate(target.contents) if (content or b"").startswith(b"\n")]
    cell_T = np.arange(target.size, dtype=np.int32)
    cell_T[lines] = target.contents.index(b"\n")
    tables = {name: getattr(made, name) for name in ("table_S", "marked_S", "unmarked_S")}
    tables = {name: np.where(table >= 0, cell_T[table], -1).astype(np.int32) for name, table in tables.items()}
    return replace(made, kind="cells", cell_T=cell_T, **tables)


def data(folder: Path, tokenizer: Tokenizer) -> TokenizedDataset:
    return prepare(DataConfig(path=str(folder / "code.jsonl"), seq_length=512), tokenizer, folder / "cache")


def sure_row(sample: Any) -> Row:
    labels = sample.ids[sample.positions + 1]
    others = np.stack([[i for i in range(300, 300 + K) if i != label][: K - 1] for label in labels])
    p = np.tile([CERTAIN, *[0.09 / (K - 1)] * (K - 1)], (len(labels), 1))
    return Row(
        ids_hash=sample.ids_hash,
        end_bytes=sample.end_bytes[sample.positions],
        ids_PK=np.concatenate([labels[:, None], others], axis=1).astype(np.int32),
        logp_PK=np.log(p).astype(np.float32),
        log_residual_P=np.log1p(-p.sum(1)).astype(np.float32),
        sum_logp=-9.0,
        num_bytes=sample.num_bytes,
    )


def opened(work: Path, kind: str | None) -> TeacherStore:
    tokenizer = real_tokenizers("smollm2", "mistral_v3")["smollm2"][0]
    config = TeacherStoreConfig(store=str(work / ("theirs" if kind else "ours")), map=kind and f"{work}/{kind}.map")
    return TeacherStore(config, "objective", tokenizer, tokenizer.num_ids, 1.0, "residual", "label")


@pytest.mark.parametrize("kind", ["exact", "cells"])
def test_figures_against_loops(kind: str, work: Path) -> None:
    loaded = real_tokenizers("smollm2", "mistral_v3")
    ours, theirs = (data(work, loaded[name][0]) for name in ("smollm2", "mistral_v3"))
    of_source = {sample.key: sample for sample in theirs}
    teacher = opened(work, kind)
    labels: dict[str, list[int]] = {}
    sums: Counter[str] = Counter()
    for sample in ours:
        row = teacher.row(sample, required=True)
        assert row is not None
        targets, kinds = teacher.targets(row, sample), kinds_by_loops(of_source[sample.key], sample)
        for p, position in enumerate(sample.positions.tolist()):
            if not targets.mask_P[p]:
                continue
            label = int(sample.ids[position + 1])
            label = label if teacher.cell_V is None else int(teacher.cell_V[label])
            labels.setdefault(kinds[position], []).append(label)
            for token, logp in zip(targets.ids_PK[p].tolist(), targets.logp_PK[p].tolist(), strict=True):
                sums[kinds[position]] += float(np.exp(logp)) * (token == label)
    found = {each.kind: each for each in evidence_of(teacher, list(ours))}
    assert found.keys() == labels.keys() == {"equal", "target longer"}
    for name, here in labels.items():
        assert found[name].positions == len(here)
        assert found[name].share == pytest.approx(len(here) / sum(map(len, labels.values())))
        assert found[name].label == pytest.approx(sums[name] / len(here), abs=1e-6)
        pairs = sum(a == b for i, a in enumerate(here) for j, b in enumerate(here) if i != j)
        assert found[name].unigram == pytest.approx(pairs / (len(here) * (len(here) - 1)))


def test_a_bad_map_is_warned_of_when_a_run_begins(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher writes a line break and the indentation as two tokens, the target as one."""
    said: list[str] = []
    monkeypatch.setattr(evidence, "warn", said.append)
    tokenizer = real_tokenizers("smollm2", "mistral_v3")["smollm2"][0]
    dataset = data(work, tokenizer)
    section: dict[str, Any] = {"name": "distill", "store": str(work / "theirs")}
    for more in (
        {"map": f"{work}/cells.map"},
        {"map": f"{work}/exact.map", "consistent": True},
        {"store": str(work / "ours")},
    ):
        build_objective(parse_objective(section | more), tokenizer, tokenizer.num_ids).check_data(dataset)
        assert said == [], more
    bad = {"store": str(work / "theirs"), "map": f"{work}/exact.map"}
    fused = {"name": "fuse", "teachers": [{"store": str(work / "ours")}, bad]}
    for settings, where in ((section | bad, "objective"), (fused, "objective.teachers.1")):
        build_objective(parse_objective(settings), tokenizer, tokenizer.num_ids).check_data(dataset)
        (line,) = said
        said.clear()
        assert line.startswith(f"{work}/theirs through {work}/exact.map (kind exact): at positions of kind")
        assert "kind 'target longer' (" in line and "has a probability of 0.0" in line and "fusemega align" in line
        assert line.endswith(f"leave out positions where the target's token is longer ({where}.consistent: true)")
    monkeypatch.setenv("RANK", "1")
    build_objective(parse_objective(section | bad), tokenizer, tokenizer.num_ids).check_data(dataset)
    assert said == [], "only one rank looks"


@pytest.mark.parametrize("kind", ["exact", "cells", None])
def test_what_the_log_tells_of_a_batch(kind: str | None, work: Path) -> None:
    """The same figures as over the data, from the fields of batches; a label at an untaught position is not counted."""
    tokenizer = real_tokenizers("smollm2", "mistral_v3")["smollm2"][0]
    teacher = opened(work, kind)
    section = {"name": "distill", "store": str(teacher.store.path), "map": kind and f"{work}/{kind}.map"}
    objective = build_objective(parse_objective(section), tokenizer, tokenizer.num_ids)
    assert isinstance(objective, Distill)
    samples = list(data(work, tokenizer))
    parts = [objective.position_fields(sample) for sample in samples]
    batches: list[Any] = [
        SimpleNamespace(
            position_fields={name: torch.from_numpy(np.concatenate([part[name] for part in half])) for name in parts[0]}
        )
        for half in (parts[:5], parts[5:])
    ]
    told = [objective.measured(batch) for batch in batches]
    assert {name for each in told for name in each} == set(objective.measures)
    found = {each.kind.replace(" ", "-"): each for each in evidence_of(teacher, samples)}
    assert len(found) == (2 if kind else 1) and (len(objective.measures) == 8 if kind else 1)
    for name in objective.measures:
        total, count = (sum(each[name][part] for each in told) for part in (0, 1))
        what, of_kind = name.split(" ")
        each = found.get(of_kind)
        if each is None:
            assert total == 0
        elif what == "label-prob":
            assert (count, total / count) == (each.positions, pytest.approx(each.label, abs=1e-6))
        else:
            assert total / count == pytest.approx(each.share)
    if kind is None:
        assert found["equal"].label == pytest.approx(CERTAIN, abs=0.01) and found["equal"].share == 1


def test_kinds_of_a_mixture() -> None:
    """The last kind of the teachers that count at a position."""

    def part(kinds: list[int] | None, mask: list[bool]) -> Targets:
        nothing = Targets.nothing(4, 1)
        return Targets(
            np.full((4, 1), 3),
            np.zeros((4, 1), np.float32),
            nothing.log_residual_P,
            np.array(mask),
            kind_P=None if kinds is None else np.array(kinds, np.int8),
        )

    own, other = part(None, [True] * 4), part([1, 0, 2, -1], [True, True, True, False])
    weights = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    mixed, same = mixture([own, other], weights).kind_P, mixture([own, own], weights).kind_P
    assert mixed is not None and mixed.tolist() == [1, 0, 0, 0] and same is None


def test_samples_are_spread_over_the_data(work: Path) -> None:
    dataset = data(work, real_tokenizers("smollm2", "mistral_v3")["smollm2"][0])
    assert [sample.key for sample in spread(dataset, 3)] == [dataset.keys[i] for i in (0, 9, 19)]
    assert len(spread(dataset)) == len(dataset)
