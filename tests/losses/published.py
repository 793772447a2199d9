"""Cases of the published cross-tokenizer objectives, with each formula by plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemega.align.student_projection import by_columns
from fusemega.fusion.teacher_rows import TeacherRows
from fusemega.losses.merge import MergedGroups
from fusemega.losses.project_student import ProjectStudent
from fusemega.losses.registry import Objective, build_objective, parse_objective
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch
from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample
from tests.logits.loops import make_head
from tests.passes.bare import bare_batch

VOCAB = 141
TOKENIZER: Any = SimpleNamespace(content_hash="own", template_hash=None, eos_id=None)
# Where the supervised positions of two samples end, for the model in training and for the teacher.
OURS = [[3, 5, 6, 9, 9, 12, -1], [-1, 0, 4]]
THEIRS = [[-1, 3, 4, 6, 7, 9, 12], [0, 2, 4]]
CHUNKS = [[(0, 2), (2, 4), (4, 5), (5, 7)], [(1, 2), (2, 3)]]  # of OURS, as they follow from the bytes
THEIR_CHUNKS = [[(1, 3), (3, 5), (5, 6), (6, 7)], [(0, 2), (2, 3)]]


def sample_of(number: int, ends: list[int] | None = None) -> Sample:
    """A sample with these ends at its supervised positions, which are all but the first token's."""
    ends = OURS[number] if ends is None else ends
    length = len(ends) + 1
    return Sample(
        key=bytes([number]) * 16,
        ids=np.random.default_rng(number).integers(0, VOCAB, length).astype(np.int32),
        supervised=np.arange(length) > 0,
        end_bytes=np.array([*ends, -1], dtype=np.int32),
        num_bytes=9,
        source=f"chat.jsonl:{number + 1}",
    )


def row_of(number: int, ends: list[int], logp_P: np.ndarray | None = None, **changes: Any) -> Row:
    """A teacher's row with these ends; its labels' log-probs are stored without error."""
    rng = np.random.default_rng(9 + number)
    drawn_P = -rng.exponential(3.0, len(ends))
    logp_P = drawn_P if logp_P is None else logp_P
    p_PK = rng.dirichlet(np.ones(3), len(ends)) * 0.7
    fields: dict[str, Any] = {
        "ids_hash": bytes(8),
        "end_bytes": np.array(ends, dtype=np.int32),
        "ids_PK": np.stack([rng.permutation(50)[:3] for _ in ends]).astype(np.int32),
        "logp_PK": np.log(p_PK).astype(np.float32),
        "log_residual_P": np.full(len(ends), math.log(0.3), dtype=np.float32),
        "sum_logp": float(logp_P.sum()),
        "num_bytes": 9,
        "label_ids_P": rng.integers(0, 50, len(ends)).astype(np.int32),
        "label_logp_P": logp_P.astype(np.float16).astype(np.float32),
    }
    return Row(**(fields | changes))


NO_LABELS = {"label_ids_P": None, "label_logp_P": None}


def store_of(folder: Path, rows: Mapping[int, Row], **changes: Any) -> Store:
    about = {"weights": "w", "tokenizer": "theirs", "template": None, "mask_policy": MASK_POLICY, "truncation": 16}
    with StoreWriter(folder, Manifest(**(about | {"temperature": 1.0, "top_k": 3, "vocab_size": 50} | changes))) as out:
        for number, row in rows.items():
            out.add(bytes([number]) * 16, row)
    return Store.open(folder)


def built(section: dict[str, Any]) -> Objective[Any]:
    return build_objective(parse_objective(section), TOKENIZER, VOCAB)


def packed(objective: Objective[Any], samples: list[Sample]) -> MicroBatch:
    """One row of the samples, with the objective's fields."""
    parts = [objective.position_fields(sample) for sample in samples]
    fields = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    labels = np.concatenate([sample.ids[sample.positions + 1] for sample in samples]).astype(np.int64)
    return bare_batch(torch.from_numpy(labels), fields)


@dataclass(frozen=True)
class Case:
    """An objective with a micro-batch and its loss by plain loops over a whole float64 head."""

    objective: Objective[Any]
    batch: MicroBatch
    by_hand: Callable[[Tensor, Tensor], Tensor]

    @property
    def denominators(self) -> dict[str, float]:
        return {name: 2.0 * count for name, count in self.objective.counts(self.batch).items()}  # another rank's, too

    def check(self, group: Any = None, rank: int = 0, ranks: int = 1) -> float:
        """Largest error of value, d_hidden (summed over ranks) and this rank's d_weight."""
        hidden, weight = make_head(tokens=len(self.batch.labels), rows=152)
        wanted = self.by_hand(hidden, weight[:VOCAB])
        d_hidden, d_weight = torch.autograd.grad(wanted, (hidden, weight))
        mine = slice(rank * 152 // ranks, (rank + 1) * 152 // ranks)
        own_hidden, own = (part.detach().clone().requires_grad_() for part in (hidden, weight[mine]))
        head = {"group": group, "vocab_size": VOCAB, "chunk_tokens": 3}
        loss, _ = self.objective.loss(HiddenStates(own_hidden, own, head), self.batch, self.denominators)
        got_hidden, got = torch.autograd.grad(loss, (own_hidden, own))
        if group is not None:
            torch.distributed.all_reduce(got_hidden, group=group)
        errors = (loss - wanted, got_hidden - d_hidden, got - d_weight[mine])
        return max(float(error.abs().max()) for error in errors)


def chunk_case(folder: Path, **settings: Any) -> Case:
    """Two samples in a row, and between them one that has no row."""
    store = store_of(folder, {n: row_of(n, ends) for n, ends in enumerate(THEIRS)})
    objective = built({"name": "chunk", "store": str(store.path), "on_missing": "skip", **settings})
    samples = [sample_of(0), sample_of(7, [2, 4]), sample_of(1)]
    batch = packed(objective, samples)
    tau, weight_of_lm = settings.get("binarization_temperature", 100.0), settings.get("lambda", 0.9)

    def divergence(p: float, q: Tensor) -> Tensor:
        if settings.get("divergence", "kl") == "total_variation":
            return abs(p - q)
        fixed = torch.tensor(p, dtype=torch.float64)
        one, two = (fixed, q) if settings.get("divergence", "kl") == "kl" else (q, fixed)
        return one * torch.log(one / two) + (1 - one) * torch.log((1 - one) / (1 - two))

    def by_hand(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = [(hidden[n] @ weight.t()).log_softmax(0)[label] for n, label in enumerate(batch.labels.tolist())]
        total, chunks = torch.zeros((), dtype=torch.float64), 0
        for number, begin in ((0, 0), (1, len(OURS[0]) + 2)):
            row = store.get(bytes([number]) * 16)
            assert row is not None and row.label_logp_P is not None
            for (a, b), (c, d) in zip(CHUNKS[number], THEIR_CHUNKS[number], strict=True):
                theirs = float(np.float32(sum(float(row.label_logp_P[j]) for j in range(c, d))))  # the field's type
                ours = sum(logp[begin + t] for t in range(a, b))
                total = total + divergence(math.exp(theirs / tau - 1e-6), torch.exp(ours / tau - 1e-6))
                chunks += 1
        ce = -sum(logp)
        return weight_of_lm * ce / (2 * len(logp)) + (1 - weight_of_lm) * tau * total / (2 * chunks)

    return Case(objective, batch, by_hand)


CHUNK_SETTINGS: list[dict[str, Any]] = [
    {},
    {"lambda": 0.2},
    {"lambda": 0.2, "binarization_temperature": 1.5},
    {"lambda": 0.0, "divergence": "reverse_kl"},
    {"lambda": 0.0, "divergence": "total_variation", "binarization_temperature": 4.0},
]


def weights() -> np.ndarray:
    """W [VOCAB, 50]: student ids with a teacher id of their own, with shares of several, and without any."""
    rng = np.random.default_rng(3)
    found = np.zeros((VOCAB, 50))
    for v, kind in enumerate(rng.permutation(VOCAB)):
        if kind < 30:  # the only one of its column, with others, or of nobody's column
            found[v, kind] = 1.0
        elif kind < 110:
            pieces = 8 + rng.permutation(38)[: 2 + kind % 3]  # columns 46 to 49 stay empty
            decays = 0.9 * 0.1 ** np.arange(len(pieces))
            found[v, pieces] = decays / decays.sum()
    return found


def project_case(folder: Path, rows: dict[str, Any] | None = None, **settings: Any) -> Case:
    """As `chunk_case`; positions that are not aligned learn their label."""
    about = {"temperature": settings.pop("store_temperature", 1.0)}
    store = store_of(folder, {n: row_of(n, ends, **(rows or {})) for n, ends in enumerate(THEIRS)}, **about)
    section = {"name": "project_student", "store": str(store.path), "tokenizer": "t", "on_missing": "skip", **settings}
    W = weights()
    columns = {g: {v: W[v, g] for v in np.flatnonzero(W[:, g])} for g in range(50) if W[:, g].any()}
    parsed = parse_objective(section)
    assert isinstance(parsed, ProjectStudent.Settings)
    objective = ProjectStudent(parsed, TeacherRows(parsed, "objective"), by_columns(columns, VOCAB, 50), None)
    batch = packed(objective, [sample_of(0), sample_of(7, [2, 4]), sample_of(1)])
    T, renormalise = parsed.temperature, parsed.tail == "renormalise"

    def by_hand(hidden: Tensor, weight: Tensor) -> Tensor:
        scores = [hidden[n] @ weight.t() for n in range(len(batch.labels))]
        labels = batch.labels.tolist()
        kd, taught = torch.zeros((), dtype=torch.float64), 0
        for number, begin in ((0, 0), (1, len(OURS[0]) + 2)):
            row = store.get(bytes([number]) * 16)
            assert row is not None
            shared = {OURS[number].index(b) if b != 9 else 4: THEIRS[number].index(b) for b in OURS[number]
                      if b >= 0 and b in THEIRS[number]}  # fmt: skip
            for t in range(len(OURS[number])):
                logq = (scores[begin + t] / T).log_softmax(0)
                if t not in shared:
                    if parsed.unaligned == "label":
                        kd, taught = kd - logq[labels[begin + t]], taught + 1
                    continue
                entries = {int(g): math.exp(float(x) * about["temperature"] / T)
                           for g, x in zip(row.ids_PK[shared[t]], row.logp_PK[shared[t]], strict=True)}  # fmt: skip
                known = {g: p for g, p in entries.items() if W[:, g].any()}
                if not known:
                    if parsed.unaligned == "label":
                        kd, taught = kd - logq[labels[begin + t]], taught + 1
                    continue
                taught += 1
                q = {g: sum(logq[v].exp() * W[v, g] for v in range(VOCAB)) for g in known}
                if renormalise:
                    for g, p in known.items():
                        kd = kd - p / sum(known.values()) * torch.log(q[g] / sum(q.values()))
                else:
                    rest = math.exp(float(row.log_residual_P[shared[t]])) + sum(entries.values()) - sum(known.values())
                    for g, p in known.items():
                        kd = kd - p * torch.log(q[g])
                    left = sum(logq[v].exp() * (1 - sum(W[v, g] for g in known)) for v in range(VOCAB))
                    kd = kd - rest * torch.log(left)
        ce = -sum(one.log_softmax(0)[label] for one, label in zip(scores, labels, strict=True))
        return parsed.lambda_ * ce / (2 * len(labels)) + (1 - parsed.lambda_) * T**2 * kd / (2 * taught)

    return Case(objective, batch, by_hand)


PROJECT_SETTINGS: list[dict[str, Any]] = [
    {},
    {"lambda": 0.2},
    {"lambda": 0.2, "unaligned": "nothing"},
    {"lambda": 0.2, "tail": "renormalise"},
    {"lambda": 0.0, "tail": "renormalise", "temperature": 2.0},
    {"lambda": 0.0, "temperature": 2.0, "store_temperature": 2.0},
]


def merge_case(folder: Path, **settings: Any) -> Case:
    """As `chunk_case`. Teacher ids 10 to 49 are target ids 30 to 69, two of them the same."""
    store = store_of(folder, {n: row_of(n, ends) for n, ends in enumerate(THEIRS)})
    parsed = parse_objective({"name": "merge", "store": str(store.path), "on_missing": "skip", **settings})
    assert isinstance(parsed, MergedGroups.Settings)
    table = np.append(np.full(10, -1), np.arange(30, 70))
    table[11] = table[12]
    objective = MergedGroups(parsed, TeacherRows(parsed, "objective", "merge"), table, VOCAB, None)
    batch = packed(objective, [sample_of(0), sample_of(7, [2, 4]), sample_of(1)])
    shares = (parsed.matched_weight, parsed.unmatched_weight) if parsed.matched_weight is not None else (0.8, 0.2)
    last, beta = parsed.token_merge_strategy == "bayesian", parsed.beta
    unmatched = [v for v in range(VOCAB) if v not in table]

    def by_hand(hidden: Tensor, weight: Tensor) -> Tensor:
        logq = [(hidden[n] @ weight.t()).log_softmax(0) for n in range(len(batch.labels))]
        labels = batch.labels.tolist()
        total, groups = torch.zeros((), dtype=torch.float64), 0
        for number, begin in ((0, 0), (1, len(OURS[0]) + 2)):
            row = store.get(bytes([number]) * 16)
            assert row is not None and row.label_logp_P is not None
            for (a, b), (c, d) in zip(CHUNKS[number], THEIR_CHUNKS[number], strict=True):
                base, t = (d - 1, begin + b - 1) if last else (c, begin + a)
                theirs = math.prod(max(math.exp(float(row.label_logp_P[j])), 1e-8) for j in range(c, d) if j != base)
                ours = torch.ones((), dtype=torch.float64)
                for n in range(begin + a, begin + b):
                    if n != t:
                        ours = ours * logq[n][labels[n]].exp().clamp(min=1e-8)
                P: dict[int, float] = {}
                rest = []
                for g, x in zip(row.ids_PK[base].tolist(), row.logp_PK[base].tolist(), strict=True):
                    if table[g] < 0:
                        rest.append(math.exp(x) * theirs)
                    else:
                        P[int(table[g])] = P.get(int(table[g]), 0.0) + math.exp(x) * theirs
                for v, p in P.items():
                    q = logq[t][v].exp() * ours
                    m = beta * p + (1 - beta) * q
                    if beta < 1:
                        total = total + shares[0] * (
                            beta * p * (math.log(p) - torch.log(m)) if beta else p * torch.log(p / q)
                        )
                    if beta > 0:
                        total = total + shares[0] * (
                            (1 - beta) * q * torch.log(q / m) if beta < 1 else q * torch.log(q / p)
                        )
                largest = sorted((logq[t][v].exp() * ours for v in unmatched), key=float, reverse=True)[:3]
                for p, q in zip([*sorted(rest, reverse=True), 0.0, 0.0, 0.0], largest, strict=False):
                    total = total + shares[1] * (p - q).abs()
                groups += 1
        ce = -sum(one[label] for one, label in zip(logq, labels, strict=True))
        return parsed.lambda_ * ce / (2 * len(labels)) + (1 - parsed.lambda_) * total / (2 * groups)

    return Case(objective, batch, by_hand)


MERGE_SETTINGS: list[dict[str, Any]] = [
    {},
    {"lambda": 0.2},
    {"lambda": 0.2, "token_merge_strategy": "bayesian"},
    {"lambda": 0.0, "beta": 0.0},
    {"lambda": 0.0, "beta": 1.0},
    {"lambda": 0.0, "matched_weight": 1.0, "unmatched_weight": 0.0},
    {"lambda": 0.0, "matched_weight": 0.0, "unmatched_weight": 3.0},
]
