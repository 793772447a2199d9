"""Losses over responses by plain loops in float64, and cases to hold them against the objectives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemega.losses.registry import Objective, build_objective, parse_objective
from fusemega.passes.answers import HiddenStates
from fusemega.passes.forward import sequence_log_probs
from fusemega.passes.micro_batch import FieldShapes, MicroBatch, collate
from fusemega.text.sample import Sample
from tests.logits.loops import make_head

VOCAB, ROWS = 141, 152
SOURCES = ["source a", "source b", "target"]
TOKENIZER: Any = SimpleNamespace(content_hash="own", template_hash=None)
IN_JOB = {"in_job": {"load": "a folder that nobody opens"}}


@dataclass
class Response:
    """One response: its tokens' log-probabilities by the model and by the reference, and its numbers."""

    logp: list[Tensor]
    reference: list[float]
    numbers: Mapping[str, float]

    @property
    def tokens(self) -> int:
        return len(self.logp)

    def h(self, mean: bool = False, shared: int | None = None, beyond: float = 1.0) -> Tensor:
        """Sum (or mean) over the tokens of log pi - log pi_ref; those from `shared` on count `beyond`."""
        found = torch.zeros((), dtype=torch.float64)
        for t in range(self.tokens):
            factor = 1.0 if shared is None or t < shared else beyond
            found = found + factor * (self.logp[t] - self.reference[t])
        return found / self.tokens if mean else found

    @property
    def mean(self) -> Tensor:
        found = torch.zeros((), dtype=torch.float64)
        for each in self.logp:
            found = found + each
        return found / self.tokens

    @property
    def kl(self) -> Tensor:
        d = self.h() / self.tokens
        return self.tokens * (torch.exp(-d) - 1 + d)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def smooth(x: Tensor, e: float) -> Tensor:
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def pair(group: Sequence[Response]) -> tuple[Response, Response]:
    if "chosen" in group[0].numbers:
        first = group[0].numbers["chosen"] == 1
        return (group[0], group[1]) if first else (group[1], group[0])
    ranked = sorted(group, key=lambda r: r.numbers["reward"])
    return ranked[-1], ranked[0]


def dpo(s: Any, group: Sequence[Response]) -> Tensor:
    chosen, rejected = pair(group)
    beyond = {} if s.ld_alpha is None else {"shared": min(chosen.tokens, rejected.tokens), "beyond": s.ld_alpha}
    mean = s.loss_type in ("sigmoid_norm", "ipo")
    d = chosen.h(mean, **beyond) - rejected.h(mean, **beyond)
    if s.loss_type.startswith("sigmoid"):
        loss = smooth(s.beta * d, s.label_smoothing)
    elif s.loss_type == "hinge":
        loss = torch.relu(1 - s.beta * d)
    else:
        loss = (d - 0.5 / s.beta) ** 2
    return loss if s.rpo_alpha is None else loss - s.rpo_alpha * chosen.mean


def simpo(s: Any, group: Sequence[Response]) -> Tensor:
    chosen, rejected = pair(group)
    return -log_sigmoid(s.beta * chosen.mean - s.beta * rejected.mean - s.gamma_beta_ratio * s.beta)


def orpo(s: Any, group: Sequence[Response]) -> Tensor:
    chosen, rejected = pair(group)
    odds = [torch.exp(r.mean) / (1 - torch.exp(r.mean)) for r in (chosen, rejected)]
    return -chosen.mean - s.beta * log_sigmoid(torch.log(odds[0] / odds[1]))


def rloo(s: Any, group: Sequence[Response]) -> Tensor:
    found = torch.zeros((), dtype=torch.float64)
    for j, response in enumerate(group):
        others = [r.numbers["reward"] for i, r in enumerate(group) if i != j]
        advantage = response.numbers["reward"] - sum(others) / len(others)
        found = found - advantage * response.mean * response.tokens
        if s.beta:
            found = found + s.beta * response.kl
    return found / len(group)


def sources(group: Sequence[Response]) -> dict[float, list[Response]]:
    found: dict[float, list[Response]] = {}
    for response in group:
        found.setdefault(response.numbers["source"], []).append(response)
    return found


def wrpo(s: Any, group: Sequence[Response], t: float = 0.0) -> Tensor:
    """`t`: the share of the run that is done."""
    alpha = s.alpha * (t if s.schedule == "linear" else 1.0)
    if s.target is None:
        triple = list(group)
    else:
        target = float(SOURCES.index(s.target))
        own = sorted((r for r in group if r.numbers["source"] == target), key=lambda r: r.numbers["reward"])
        others = [r for r in group if r.numbers["source"] != target]
        triple = [max(others, key=lambda r: r.numbers["reward"]), own[-1], own[0]]
    h = [r.mean if s.loss_type == "simpo" else r.h() for r in triple]
    d = alpha * h[0] + (1 - alpha) * h[1] - h[2]
    if s.loss_type == "ipo":
        return (d - 0.5 / s.beta) ** 2
    return smooth(s.beta * d - s.beta * (s.gamma_beta_ratio or 0.0), s.label_smoothing)


def softmax(rewards: Sequence[float], alpha: float) -> list[float]:
    parts = [math.exp(r / alpha) for r in rewards]
    return [part / sum(parts) for part in parts]


def fuse_sft(s: Any, group: Sequence[Response]) -> Tensor:
    ranked = sorted(group, key=lambda r: -r.numbers["reward"])
    if s.top_k_responses is None:
        ranked = [max(of, key=lambda r: r.numbers["reward"]) for of in sources(group).values()]
    kept = ranked[: s.top_k_responses]
    weights = softmax([r.numbers["reward"] for r in kept], s.alpha)
    return -sum((w * r.mean for w, r in zip(weights, kept, strict=True)), torch.zeros((), dtype=torch.float64))


def fuse_po(s: Any, group: Sequence[Response]) -> Tensor:
    usable = [of for of in sources(group).values() if len({r.numbers["reward"] for r in of}) > 1]
    weights = softmax([max(r.numbers["reward"] for r in of) for of in usable], s.alpha)
    found = torch.zeros((), dtype=torch.float64)
    for weight, of in zip(weights, usable, strict=True):
        if s.loss_type == "rloo":
            found = found + weight * rloo(s, of)
            continue
        ranked = sorted(of, key=lambda r: r.numbers["reward"])
        if s.loss_type == "simpo":
            found = found + weight * simpo(s, [ranked[-1], ranked[0]])
        else:
            found = found - weight * log_sigmoid(s.beta * (ranked[-1].h() - ranked[0].h()))
    return found


PLAIN: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo, "simpo": simpo, "orpo": orpo, "rloo": rloo, "wrpo": wrpo, "fuse_sft": fuse_sft, "fuse_po": fuse_po
}  # fmt: skip

PAIRS: list[list[tuple[int, dict[str, float]]]] = [
    [(4, {"chosen": 1, "weight": 0.5}), (2, {"chosen": 0, "weight": 0.5})],
    [(1, {"chosen": 1}), (3, {"chosen": 0})],
    [(2, {"reward": 0.1}), (3, {"reward": 0.7}), (1, {"reward": -0.2})],
]
"""Groups of responses: of each its number of tokens and its numbers. The last is scored: its best and worst are a pair.
"""
SCORED: list[list[tuple[int, dict[str, float]]]] = [
    [
        (3, {"source": 2, "reward": 0.3}), (1, {"source": 0, "reward": 0.5}), (2, {"source": 0, "reward": 0.1}),
        (4, {"source": 2, "reward": 0.2}), (2, {"source": 1, "reward": 0.6}),
    ],
    [
        (2, {"source": 1, "reward": -0.2, "weight": 2}), (2, {"source": 2, "reward": 0.4, "weight": 2}),
        (3, {"source": 1, "reward": 0.1, "weight": 2}), (1, {"source": 2, "reward": 0.0, "weight": 2}),
        (2, {"source": 1, "reward": 0.3, "weight": 2}),
    ],
]  # fmt: skip
TRIPLES: list[list[tuple[int, dict[str, float]]]] = [[(2, {}), (3, {}), (1, {})], [(1, {}), (2, {}), (4, {})]]


def samples_of(groups: Sequence[Sequence[tuple[int, dict[str, float]]]]) -> list[list[Sample]]:
    """Samples of two prompt tokens and as many of the response as asked."""
    found, rng = [], np.random.default_rng(3)
    for number, group in enumerate(groups):
        found.append([
            Sample(
                key=bytes([number, place]) * 8,
                ids=rng.integers(0, VOCAB, 2 + tokens).astype(np.int32),
                supervised=np.arange(2 + tokens) > 1,
                end_bytes=np.full(2 + tokens, -1, dtype=np.int32),
                num_bytes=9,
                source=f"rows.jsonl:{number + 1}",
                group=number,
                scalars=numbers,
            )
            for place, (tokens, numbers) in enumerate(group)
        ])  # fmt: skip
    return found


class Data:
    """What an objective reads of a `TokenizedDataset`."""

    def __init__(self, groups: Sequence[Sequence[Sample]], on_bad_row: str = "error") -> None:
        self._samples = [sample for group in groups for sample in group]
        self._starts = np.cumsum([0, *(len(group) for group in groups)])
        self.num_units, self.sources = len(groups), SOURCES
        self.config = SimpleNamespace(on_bad_row=on_bad_row)

    def __getitem__(self, i: int) -> Sample:
        return self._samples[i]

    def unit(self, i: int) -> range:
        return range(int(self._starts[i]), int(self._starts[i + 1]))


def built(section: Mapping[str, Any], groups: Sequence[Sequence[Sample]], on_bad_row: str = "error") -> Objective[Any]:
    """The objective of a run file's section, which has seen this data."""
    objective = build_objective(parse_objective(section), TOKENIZER, VOCAB)
    data: Any = Data(groups, on_bad_row)
    objective.check_data(data)
    return objective


def batch_of(objective: Objective[Any], groups: Sequence[Sequence[Sample]], like: Sequence[Sample]) -> MicroBatch:
    tokens = sum(len(sample.ids) for group in groups for sample in group) + 3
    return collate(groups, objective, tokens, 0, FieldShapes.of(objective, like))


def world_of(cp_size: int = 1) -> Any:
    return SimpleNamespace(cp_size=cp_size, cp_group=None)


@dataclass
class PreferenceCase:
    """An objective with its data in one micro-batch, and its loss by plain loops.

    Args:
        section: of the run file.
        groups: its data.
        done: the share of the run that is done.
    """

    section: Mapping[str, Any]
    groups: Sequence[Sequence[tuple[int, dict[str, float]]]]
    done: float = 0.5

    def __post_init__(self) -> None:
        self.samples = samples_of(self.groups)
        self.objective = built(self.section, self.samples)
        self.objective.begin_step(int(100 * self.done), 100)
        self.batch = batch_of(self.objective, self.samples, self.samples[0])
        generator = torch.Generator().manual_seed(1)
        self.reference_N = -3 - torch.rand(len(self.batch.labels), generator=generator, dtype=torch.float64)
        self.batch = self.with_reference(self.batch, self.reference_N)
        self.denominators = {self.section["name"]: 3.0 * len(self.groups)}  # other ranks' too

    @staticmethod
    def with_reference(batch: MicroBatch, reference_N: Tensor) -> MicroBatch:
        """With the answer of a frozen model of these log-probabilities."""
        weights = torch.ones(len(reference_N)) if batch.token_weights is None else batch.token_weights
        values = (reference_N.view(-1, *[1] * (weights.dim() - 1)) * weights.double()).double()
        sums = values.new_zeros(len(batch.sequence_tokens), *values.shape[1:]).index_add(0, batch.sequences, values)
        return replace(batch, answers={"reference": sums})

    def responses(self, hidden: Tensor, weight: Tensor) -> list[list[Response]]:
        logp = [(hidden[n] @ weight.t()).log_softmax(0)[label] for n, label in enumerate(self.batch.labels.tolist())]
        found, start = [], 0
        for group in self.groups:
            found.append([])
            for tokens, numbers in group:
                part = slice(start, start + tokens)
                found[-1].append(Response(logp[part], self.reference_N[part].tolist(), numbers))
                start += tokens
        return found

    def by_hand(self, hidden: Tensor, weight: Tensor) -> Tensor:
        name, settings = self.section["name"], parse_objective(self.section)
        total = torch.zeros((), dtype=torch.float64)
        for group in self.responses(hidden, weight):
            extra = (self.done,) if name == "wrpo" else ()
            total = total + group[0].numbers.get("weight", 1.0) * PLAIN[name](settings, group, *extra)
        return total / self.denominators[name]

    def loss(self, hidden: Tensor, weight: Tensor, group: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        head = {"group": group, "vocab_size": VOCAB, "chunk_tokens": 3}
        logp = sequence_log_probs(HiddenStates(hidden, weight, head), self.batch, world_of())
        found: tuple[Tensor, dict[str, Tensor]] = self.objective.loss(logp, self.batch, self.denominators)
        return found

    def check(self, group: Any = None, rank: int = 0, ranks: int = 1) -> float:
        """Largest error of value, d_hidden (summed over ranks) and this rank's d_weight."""
        hidden, weight = make_head(tokens=len(self.batch.labels), rows=ROWS)
        wanted = self.by_hand(hidden, weight[:VOCAB])
        d_hidden, d_weight = torch.autograd.grad(wanted, (hidden, weight))
        mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        own_hidden, own = (part.detach().clone().requires_grad_() for part in (hidden, weight[mine]))
        loss, _ = self.loss(own_hidden, own, group)
        got_hidden, got = torch.autograd.grad(loss, (own_hidden, own))
        if group is not None:
            torch.distributed.all_reduce(got_hidden, group=group)
        errors = (loss - wanted, got_hidden - d_hidden, got - d_weight[mine])
        return max(float(error.abs().max()) for error in errors)


def _dpo(**settings: Any) -> dict[str, Any]:
    return {"name": "dpo", "beta": 0.5, "reference": IN_JOB, **settings}


KINDS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum")
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    **{f"dpo, {kind}": (_dpo(loss_type=kind), PAIRS) for kind in KINDS},
    "dpo, all options": (_dpo(label_smoothing=0.1, ld_alpha=0.3, rpo_alpha=0.7, loss_type="sigmoid_norm"), PAIRS),
    "simpo": ({"name": "simpo", "gamma_beta_ratio": 0.4}, PAIRS),
    "orpo": ({"name": "orpo", "beta": 0.3}, PAIRS),
    "rloo": ({"name": "rloo", "beta": 0.2, "reference": IN_JOB}, SCORED),
    "wrpo": ({"name": "wrpo", "beta": 0.5, "alpha": 0.6, "target": "target", "reference": IN_JOB}, SCORED),
    "wrpo, in order": ({"name": "wrpo", "beta": 0.5, "alpha": 0.6, "reference": IN_JOB}, TRIPLES),
    "wrpo, simpo": (
        {"name": "wrpo", "loss_type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "target": "target"}, SCORED
    ),
    "wrpo, ipo": (
        {"name": "wrpo", "loss_type": "ipo", "beta": 0.5, "target": "target", "reference": IN_JOB}, SCORED
    ),
    "fuse_sft": ({"name": "fuse_sft", "alpha": 0.3}, SCORED),
    "fuse_po": ({"name": "fuse_po", "alpha": 0.3, "beta": 0.5, "reference": IN_JOB}, SCORED),
    "fuse_po, simpo": (
        {"name": "fuse_po", "loss_type": "simpo", "alpha": 0.3, "beta": 2.0, "gamma_beta_ratio": 0.3}, SCORED
    ),
    "fuse_po, rloo": (
        {"name": "fuse_po", "loss_type": "rloo", "alpha": 0.3, "beta": 0.2, "reference": IN_JOB}, SCORED
    ),
}  # fmt: skip


def write_sources(path: Path, chat: Path) -> Path:
    """Rows of eight prompts of a file of conversations, each with three responses of a source and two of the target."""
    turns = [json.loads(line)["messages"][:2] for line in chat.read_text().splitlines()]
    texts = [pair[1]["content"] for pair in turns]
    with path.open("w") as file:
        for n, (question, _) in enumerate(turns[:8]):
            responses = [
                {
                    "messages": [{"role": "assistant", "content": texts[(n + i) % len(texts)][: 10 + 7 * i]}],
                    "source": "target" if i % 2 else "source a",
                    "reward": ((n + 3 * i) % 5) / 10,
                }
                for i in range(5)
            ]
            prompt = [{**question, "content": question["content"][:40]}]
            file.write(json.dumps({"prompt": prompt, "responses": responses}) + "\n")
    return path


def errors_over_ranks(group: Any, rank: int, ranks: int) -> dict[str, float]:
    """See `PreferenceCase.check`, over this many tensor-parallel ranks."""
    names = ("dpo, all options", "orpo", "rloo", "wrpo", "fuse_sft", "fuse_po")
    return {f"{name}, TP{ranks}": PreferenceCase(*CASES[name]).check(group, rank, ranks) for name in names}
