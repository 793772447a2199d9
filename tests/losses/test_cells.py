"""`distill` and `fuse` with maps that have cells, as the run file sets them, against plain loops in float64."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from fusemega.losses.distill import Taught
from fusemega.losses.registry import build_objective, parse_objective
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample
from tests.logits.loops import make_head
from tests.losses.published import Case
from tests.passes.bare import bare_batch

VOCAB, SOURCE, K = 141, 60, 8
TOKENIZER: Any = SimpleNamespace(content_hash="tok", template_hash=None, num_ids=VOCAB, source="target", eos_id=None)
LABELS = np.random.default_rng(2).integers(0, 100, size=10)
SAMPLE = Sample(
    key=bytes(range(16)),
    ids=LABELS.astype(np.int32),
    supervised=np.arange(10) > 1,
    end_bytes=2 * np.arange(10, dtype=np.int32),  # of the positions: 2, 4, ..., 16
    num_bytes=18,
    source="chat.jsonl:3",
)
ENDS = np.array([2, 3, 6, 9, 10, 12, 16], dtype=np.int32)  # where the teachers' tokens end
N = len(SAMPLE.positions)
Cells = list[frozenset[int]]
Told = dict[int, tuple[dict[frozenset[int], float], float]]  # position -> probability of cells, and of the others


def cell_table(seed: int) -> np.ndarray:
    """Half of the ids in cells of several, each cell with one id that stands for it."""
    generator = np.random.default_rng(seed)
    order, cell_T = generator.permutation(VOCAB), np.arange(VOCAB)
    for begin in range(0, 70, 5):
        cell_T[order[begin : begin + 5]] = order[begin + 2]
    return cell_T.astype(np.int32)


def write(folder: Path, seed: int, cells: bool, mapped: bool = True, ce: float = 1.0) -> tuple[dict[str, Any], Told]:
    """The section of a teacher with a random row, and what the row says of the target's positions, in plain loops."""
    generator = np.random.default_rng(seed)
    size, count = (SOURCE, len(ENDS)) if mapped else (VOCAB, N)
    ids = np.stack([generator.permutation(size)[:K] for _ in range(count)])
    p = generator.dirichlet(np.ones(K + 1), size=count)
    names = {"weights": str(seed), "tokenizer": "theirs" if mapped else "tok", "template": None}
    names |= {"mask_policy": MASK_POLICY, "truncation": 16, "temperature": 1.0, "top_k": K, "vocab_size": size}
    with StoreWriter(folder / "store", Manifest(**names)) as writer:
        row = Row(
            ids_hash=SAMPLE.ids_hash,
            end_bytes=ENDS if mapped else SAMPLE.end_bytes[SAMPLE.positions],
            ids_PK=ids.astype(np.int32),
            logp_PK=np.log(p[:, :K]).astype(np.float32),
            log_residual_P=np.log(p[:, K]).astype(np.float32),
            sum_logp=-ce * 18,
            num_bytes=18,
        )
        writer.add(SAMPLE.key, row)
    section = {"store": str(folder / "store")}
    cell_T = cell_table(seed) if cells else np.arange(VOCAB)
    table = np.append(generator.integers(0, VOCAB, size=SOURCE - 5), [-1] * 5) if mapped else np.arange(VOCAB)
    table = np.where(table >= 0, cell_T[table], -1).astype(np.int32)
    if mapped:
        kind, stored = ("cells", cell_T) if cells else ("exact", cell_T[:0])
        made = VocabularyMap(kind, "theirs", "tok", *[table] * 3, SOURCE, VOCAB, False, False, cell_T=stored)
        made.save(folder / "map")
        section["map"] = str(folder / "map")
    told: Told = {}
    stored_row = writer_row(folder)
    for n, position in enumerate(SAMPLE.positions):
        for at, end in enumerate(stored_row.end_bytes):
            if end == SAMPLE.end_bytes[position]:
                named, other = {}, math.exp(float(stored_row.log_residual_P[at]))
                for token, logp in zip(stored_row.ids_PK[at].tolist(), stored_row.logp_PK[at].tolist(), strict=True):
                    if table[token] < 0:
                        other += math.exp(logp)
                    else:
                        cell = frozenset(i for i in range(VOCAB) if cell_T[i] == table[token])
                        named[cell] = named.get(cell, 0.0) + math.exp(logp)
                told[n] = named, other
    return section, told


def writer_row(folder: Path) -> Row:
    from fusemega.store import Store

    row = Store.open(folder / "store").get(SAMPLE.key)
    assert row is not None
    return row


def all_cells(*tables: np.ndarray) -> Cells:
    """The finest cells that are unions of the cells of each table, by merging until nothing meets."""
    cells = [{i for i in range(VOCAB) if table[i] == rep} for table in tables for rep in set(table.tolist())]
    merged: list[set[int]] = []
    for cell in cells:
        meeting = [other for other in merged if other & cell]
        merged = [other for other in merged if not other & cell] + [set().union(cell, *meeting)]
    return [frozenset(cell) for cell in merged]


def in_cells(told: Told, cells: Cells) -> Told:
    found: Told = {}
    for n, (named, other) in told.items():
        coarse: dict[frozenset[int], float] = {}
        for cell, p in named.items():
            whole = next(each for each in cells if cell <= each)
            coarse[whole] = coarse.get(whole, 0.0) + p
        found[n] = coarse, other
    return found


def kl_by_hand(objective: Taught, told: Told, hidden: Tensor, weight: Tensor) -> tuple[float, int]:
    """Sum of KL(row, student) over the positions with a target, and how many they are."""
    s = objective.settings
    q = (hidden @ weight[:VOCAB].t() / s.temperature).softmax(1).tolist()
    kl, count = 0.0, 0
    for n in range(N):
        if n not in told:
            if s.unaligned == "label":
                kl, count = kl - math.log(q[n][int(SAMPLE.ids[SAMPLE.positions[n] + 1])]), count + 1
            continue
        named, other = told[n]
        if s.tail == "renormalise":
            raw = {cell: p ** (1.0 / s.temperature) for cell, p in named.items()}
            named, other = {cell: p / sum(raw.values()) for cell, p in raw.items()}, 0.0
        parts = [(p, sum(q[n][i] for i in cell)) for cell, p in named.items()]
        parts += [(other, sum(q[n][i] for i in set(range(VOCAB)) - set().union(*named)))]
        kl, count = kl + sum(p * math.log(p / mine) for p, mine in parts if p > 0), count + 1
    return kl, count


def by_hand(objective: Taught, told: Told, cells: Cells, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, sum of the distillation term), from the definition, position by position."""
    s = objective.settings
    logits = hidden @ weight[:VOCAB].t()
    ce = kd = torch.zeros((), dtype=torch.float64)
    taught = 0
    for n in range(N):
        label = int(SAMPLE.ids[SAMPLE.positions[n] + 1])
        ce = ce - logits[n].log_softmax(0)[label]
        logq = (logits[n] / s.temperature).log_softmax(0)
        if n not in told:
            if s.unaligned == "label":
                kd, taught = kd - logq[label], taught + 1
            continue
        taught += 1
        named, other = told[n]
        if s.tail == "renormalise":
            raw = {cell: p ** (1.0 / s.temperature) for cell, p in named.items()}
            named, other = {cell: p / sum(raw.values()) for cell, p in raw.items()}, 0.0
        for cell, p in named.items():
            kd = kd - p * torch.logsumexp(logq[sorted(cell)], 0)
        rest = sorted(set(range(VOCAB)) - set().union(*named))
        if s.tail == "residual":
            kd = kd - other * torch.logsumexp(logq[rest], 0)
        mine = next(cell for cell in cells if label in cell)
        kd = kd - (logq[label] - torch.logsumexp(logq[sorted(mine)], 0))
    return s.lambda_ * ce / N + (1 - s.lambda_) * s.temperature**2 * kd / taught, kd.detach()


def cells_case(folder: Path) -> Case:
    """`distill` with a map of cells, for heads that are split over ranks."""
    section, told = write(folder, 3, True)
    objective = build_objective(parse_objective({"name": "distill", "lambda": 0.3, **section}), TOKENIZER, VOCAB)
    assert isinstance(objective, Taught)
    cells = all_cells(cell_table(3))
    # A case's denominators count another rank's positions, too.
    return Case(objective, batch_of(objective), lambda h, w: by_hand(objective, told, cells, h, w)[0] / 2)


def batch_of(objective: Taught) -> MicroBatch:
    fields = {name: torch.from_numpy(array.copy()) for name, array in objective.position_fields(SAMPLE).items()}
    return bare_batch(torch.from_numpy(SAMPLE.ids[SAMPLE.positions + 1].astype(np.int64)), fields)


def check(section: dict[str, Any], told: Told, cells: Cells) -> Taught:
    objective = build_objective(parse_objective(section), TOKENIZER, VOCAB)
    assert isinstance(objective, Taught)
    batch = batch_of(objective)
    hidden, weight = make_head(tokens=N)
    counts = objective.counts(batch)
    denominators = {name: torch.tensor(float(count), dtype=torch.float64) for name, count in counts.items()}
    head = {"group": None, "vocab_size": VOCAB, "chunk_tokens": 3}
    loss, sums = objective.loss(HiddenStates(hidden, weight, head), batch, denominators)
    wanted, kd = by_hand(objective, told, cells, hidden, weight)
    # The batch's log-probs are fp32.
    torch.testing.assert_close(loss, wanted, rtol=0, atol=3e-6)
    torch.testing.assert_close(sums["distill"], kd, rtol=0, atol=2e-5)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (hidden, weight)), rtol=0, atol=3e-6)
    distances = objective.distances(HiddenStates(hidden, weight, head), batch)
    assert distances.tolist() == pytest.approx(kl_by_hand(objective, told, hidden, weight), abs=2e-5)
    return objective


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"unaligned": "nothing"},
        {"tail": "renormalise"},
        {"tail": "renormalise", "temperature": 2.0},
        {"consistent": True},
        {"consistent": True, "unaligned": "nothing"},
    ],
    ids=str,
)
@pytest.mark.parametrize("cells", [True, False], ids=["cells", "ids"])
def test_distill(settings: dict[str, Any], cells: bool, tmp_path: Path) -> None:
    section, told = write(tmp_path, 3, cells)
    assert sorted(told) == [0, 2, 4, 5, 7]
    if settings.get("consistent"):
        del told[0]  # the target's next token ends at byte 4, the teacher's at byte 3
    parts = all_cells(cell_table(3)) if cells else [frozenset([i]) for i in range(VOCAB)]
    if settings.get("tail") == "renormalise" and settings.get("temperature"):
        told = tempered(tmp_path, told)
    objective = check({"name": "distill", "lambda": 0.3, **section, **settings}, told, parts)
    fields = objective.position_fields(SAMPLE)
    assert ("label_cell" in fields) == cells
    if cells:
        mine = fields["label_cell"] >= 0
        assert 0 < mine.sum() < len(told) and not mine[[n for n in range(N) if n not in told]].any()


def tempered(folder: Path, told: Told) -> Told:
    """Temperature acts on the teacher's own ids, before they are added up: undone here, as `by_hand` applies it."""
    row, loaded = writer_row(folder), VocabularyMap.load(folder / "map")
    found: Told = {}
    cell_T = loaded.cell_T if len(loaded.cell_T) else np.arange(VOCAB)
    for n in told:
        at = int(np.flatnonzero(row.end_bytes == SAMPLE.end_bytes[SAMPLE.positions[n]])[0])
        named: dict[frozenset[int], float] = {}
        for token, logp in zip(row.ids_PK[at].tolist(), row.logp_PK[at].tolist(), strict=True):
            if loaded.table_S[token] >= 0:
                cell = frozenset(np.flatnonzero(cell_T == loaded.table_S[token]).tolist())
                named[cell] = named.get(cell, 0.0) + math.exp(logp / 2.0)
        found[n] = {cell: p**2.0 for cell, p in named.items()}, 0.0
    return found


@pytest.mark.parametrize("function", ["min_ce", "avg_ce", "blend"])
def test_teachers_with_different_cells(function: str, tmp_path: Path) -> None:
    written = [
        write(tmp_path / "a", 3, True, ce=1.2),
        write(tmp_path / "b", 4, True, ce=1.0),
        write(tmp_path / "c", 5, False, mapped=False, ce=1.1),
    ]
    tables = [cell_table(3), cell_table(4), np.arange(VOCAB)]
    cells = all_cells(tables[1]) if function == "min_ce" else all_cells(*tables)
    toldest = [
        in_cells(told, cells if function != "min_ce" else all_cells(tables[j])) for j, (_, told) in enumerate(written)
    ]
    weights = [math.exp(math.exp(-ce)) for ce in (1.2, 1.0, 1.1)]
    told: Told = {}
    for n in range(N):
        label = int(SAMPLE.ids[SAMPLE.positions[n] + 1])
        present = [j for j in range(3) if n in toldest[j]]
        if function == "min_ce":
            if n in toldest[1]:
                told[n] = toldest[1][n]
            continue
        share = {j: weights[j] for j in present}
        if function == "blend":
            share = {j: sum(p for c, p in toldest[j][n][0].items() if label in c) for j in present}
            share = share if sum(share.values()) else dict.fromkeys(present, 1.0)
        named: dict[frozenset[int], float] = {}
        for j in present:
            if share[j] > 0:
                for cell, p in toldest[j][n][0].items():
                    named[cell] = named.get(cell, 0.0) + share[j] / sum(share.values()) * p
        other = sum(share[j] * toldest[j][n][1] for j in present) / sum(share.values())
        told[n] = named, other
    section = {"name": "fuse", "lambda": 0.3, "teachers": [each for each, _ in written]}
    objective = check(section | {"fusion": {"function": function}}, told, cells)
    sizes = {len(cell) for cell in cells}
    assert max(sizes) > (5 if function != "min_ce" else 4) and min(sizes) == 1
    assert (objective.position_fields(SAMPLE)["label_cell"] >= 0).any()


def test_what_has_no_effect_and_what_is_part_of_a_run(tmp_path: Path) -> None:
    section, _ = write(tmp_path / "a", 3, True)
    plain, _ = write(tmp_path / "c", 3, False, mapped=False)
    with pytest.raises(UserError, match=r"objective.consistent: no effect without objective.map, because"):
        build_objective(parse_objective({"name": "distill", **plain, "consistent": True}), TOKENIZER, VOCAB)
    with pytest.raises(UserError, match=r"objective.teachers.0.consistent: no effect without objective.teachers.0.map"):
        teachers = [plain | {"consistent": True}]
        build_objective(parse_objective({"name": "fuse", "teachers": teachers}), TOKENIZER, VOCAB)
    dataset: Any = SimpleNamespace(keys=[SAMPLE.key])
    hashes = []
    loaded = VocabularyMap.load(tmp_path / "a/map")
    for name, cell_T in (("same", loaded.cell_T), ("swapped", loaded.cell_T.copy())):
        if name == "swapped":  # two ids of one cell leave it
            outside = [i for i in range(VOCAB) if cell_T[i] != i][:2]
            cell_T[outside] = outside
        made = VocabularyMap(**{**vars(loaded), "cell_T": cell_T})
        made.save(tmp_path / name)
        chosen = section | {"map": str(tmp_path / name)}
        objective = build_objective(parse_objective({"name": "distill", **chosen}), TOKENIZER, VOCAB)
        hashes.append(objective.identity(dataset))
    assert hashes[0] != hashes[1] and hashes[0]["map"] == loaded.content_hash
    cell_T = loaded.cell_T
    largest = max(rep for i, rep in enumerate(cell_T.tolist()) if i < rep)  # of cells that begin below it
    with pytest.raises(UserError, match=rf"the map contains id \d+, and the model in training has .* of {largest}"):
        build_objective(parse_objective({"name": "distill", **section}), TOKENIZER, largest)
