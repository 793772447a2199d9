"""Cells of real tokenizers: a teacher that is sure of its own next token is sure of the label's cell, whichever of the
two tokens is longer, and a teacher with the target's tokenizer teaches what it does without a map."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusemega.align.kinds import KINDS, MapInputs
from fusemega.align.position_kinds import POSITION_KINDS, position_kinds
from fusemega.align.positions import shared_positions
from fusemega.fusion.partitions import Partitions
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from tests.align.real import CONTENTS, chat, real_tokenizers
from tests.fusion.test_first_tokens import samples, sure_row, teacher

TEXTS = [*CONTENTS, "In 2024, 1000000 and 3.14159; 12:30:59.", "x = [\n    (1, 'a'),\n\n    {'flower': None},\n]\n"]


# All 42 pairs of seven tokenizers are in benchmarks/maps.py.
@pytest.mark.parametrize(("source", "target"), [("mistral_v3", "smollm2"), ("qwen3", "smollm2")])
def test_the_labels_cell_is_the_teachers(source: str, target: str, tmp_path: Path) -> None:
    loaded = real_tokenizers(source, target)
    made = KINDS["cells"].make(MapInputs(*zip(loaded[source], loaded[target], strict=True)))
    (theirs, _), (ours, _) = loaded[source], loaded[target]
    taught = teacher(tmp_path, theirs, ours, made)
    seen: Counter[str] = Counter()
    for row in [{"text": text} for text in TEXTS] + [chat("a", text) for text in TEXTS]:
        (scored,), (sample,) = samples(theirs, row), samples(ours, row)
        sure = sure_row(scored)
        targets = taught.targets(sure, sample)
        source_M, target_M = shared_positions(sure.end_bytes, sample.end_bytes[sample.positions])
        seen.update(POSITION_KINDS[k] for k in position_kinds(sure.end_bytes, source_M, sample, target_M).tolist())
        assert targets.ids_PK[target_M, 0].tolist() == made.cell_T[sample.ids[sample.positions[target_M] + 1]].tolist()
    assert seen["equal"] > 150 and seen["teacher longer"] > 10 and seen["target longer"] > 1
    # The cells are no larger than they must be.
    sizes = np.unique(made.cell_T, return_counts=True)[1]
    assert len(sizes) > 0.6 * min(len(made.table_S), len(made.cell_T)) and sizes.max() < 300


@pytest.mark.parametrize("kind", ["cells", "first_piece", "exact"])
def test_the_same_tokenizer_through_a_map_teaches_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer, own = real_tokenizers("smollm2")["smollm2"]
    made = KINDS[kind].make(MapInputs((tokenizer, tokenizer), (own, own)))
    through = teacher(tmp_path, tokenizer, tokenizer, made)
    plain = TeacherStore(
        TeacherStoreConfig(store=str(tmp_path / "store")), "objective", tokenizer, tokenizer.num_ids, 1.0, "residual"
    )
    random = np.random.default_rng(0)
    # Other kinds map special tokens, but for those that end something, to nothing.
    usable = np.array([i for i in range(own.size) if kind == "cells" or own.contents[i] is not None])
    partitions = Partitions([through.cell_V, None], tokenizer.num_ids)
    assert partitions.numbers == [0, 0] and partitions.num_groups == 0
    for row in [{"text": TEXTS[2]}, chat("a", TEXTS[4])]:
        (sample,) = samples(tokenizer, row)
        sure = sure_row(sample)
        others = np.stack([random.choice(usable, 5, replace=False) for _ in sure.ids_PK])
        ids_PK = np.where(others == sure.ids_PK, -1, others)
        p = np.sort(random.dirichlet(np.ones(7), size=len(ids_PK)))[:, ::-1]
        logp_PK = np.log(p[:, :6]).astype(np.float32)
        ids_PK = np.concatenate([sure.ids_PK, ids_PK], 1).astype(np.int32)
        logp_PK[ids_PK < 0] = -np.inf
        told = replace(sure, ids_PK=ids_PK, logp_PK=logp_PK, log_residual_P=np.log(p[:, 6]).astype(np.float32))
        found, wanted = through.targets(told, sample), plain.targets(told, sample)
        assert found.mask_P.all() and wanted.mask_P.all()
        np.testing.assert_array_equal(np.sort(found.ids_PK), np.sort(wanted.ids_PK))
        np.testing.assert_array_equal(found.ids_PK[:, 0], wanted.ids_PK[:, 0])
        np.testing.assert_allclose(found.logp_PK, np.sort(wanted.logp_PK)[:, ::-1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.log_residual_P, wanted.log_residual_P, rtol=0, atol=1e-6)
