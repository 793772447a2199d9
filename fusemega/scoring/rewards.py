"""`fusemega score`: a reward model's score of each response of a data set; the rows are written again with `rewards`.

A response is scored with its prompt, as a text of its own, whatever the shape of its row: `messages`, `prompt` with
`completion`, a pair, or `prompt` with `responses`. Equal texts are scored once.

Shape suffixes: S sequences of a micro-batch, H hidden size, M objectives.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.results_journal import ResultsJournal, check_no_output, results_journal
from fusemega.models.heads import REWARD
from fusemega.passes.batches import prepare_together
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.progress import progress
from fusemega.passes.rewards import GateTokens, reward_rows, rewards
from fusemega.passes.score import score_samples
from fusemega.runtime.console import say
from fusemega.runtime.parallel import World, initialize
from fusemega.runtime.together import on_main
from fusemega.scoring.run_file import PassRun
from fusemega.text.data import DataConfig, Source
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.document import BadRow
from fusemega.text.sample import Sample

_GIVEN = ("rewards", "scores", "objectives", "score_chosen", "score_rejected")  # beside which rewards would be refused
_WHOLE = 1 << 31
"""A row length at which no text is cut: a part of a text has no score of its own."""


class ScoreRun(PassRun):
    """Run file of `fusemega score`."""

    output: str = Field(
        description="JSONL file: the rows with `rewards`, one for each response; an interrupted run resumes where it "
        "stopped"
    )
    objectives: bool = Field(
        False, description="of ArmoRM: also write `objectives`, for each response the scores that its reward is made of"
    )

    @field_validator("data")
    @classmethod
    def _whole_texts(cls, data: DataConfig) -> DataConfig:
        for name in ("max_length", "truncation"):
            if getattr(data, name) != DataConfig.model_fields[name].default:
                raise ValueError(f"{name}: a part of a text has no score; leave it out, and raise seq_length instead")
        return data


class RewardsFound(BaseModel):
    """What was scored.

    Attributes:
        rows, responses: how many were written.
        skipped: rows left out, as `data.on_bad_row: skip` asks.
        mean_reward: mean over responses.
        pairs: how many of the rows are pairs.
        accuracy: share of the pairs whose chosen response has the higher reward; None without pairs.
        margin: mean difference of a pair's rewards, chosen minus rejected; None without pairs.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    responses: int
    skipped: int
    mean_reward: float
    pairs: int
    accuracy: float | None
    margin: float | None


@dataclass(frozen=True)
class _Texts:
    """The responses of a data set, in the rows' order.

    Attributes:
        rows: (`RawRow.file`, `RawRow.number`) -> its samples; rows that are left out are not among them.
        skipped: reason -> how many of these there are.
    """

    dataset: TokenizedDataset
    rows: Mapping[tuple[int, int], list[int]]
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, dataset: TokenizedDataset, longest: int, gates: GateTokens | None, skip: bool) -> _Texts:
        """Checks every text.

        Args:
            longest: tokens that a text may have.
            gates: finds what a gated head reads.
            skip: rows with an unusable text are left out; False: they are refused.

        Raises:
            UserError: names the row.
        """
        rows: dict[tuple[int, int], list[int]] = {}
        skipped = Counter(dataset.skipped)
        for number in range(dataset.num_units):
            unit = list(dataset.unit(number))
            try:
                for i in unit:
                    _check_text(dataset, i, longest, gates)
            except BadRow as error:
                if not skip:
                    raise UserError(f"{dataset[unit[0]].source}: {error}") from None
                skipped[error.reason] += 1
                continue
            rows[dataset.place(unit[0])] = unit
        if not rows:
            raise UserError(f"{dataset[0].source}: no row is left to score ({_listed(skipped)})")
        return cls(dataset, rows, skipped)


def _check_text(dataset: TokenizedDataset, i: int, longest: int, gates: GateTokens | None) -> None:
    if dataset.lengths[i] > longest:
        raise BadRow(
            "longer than a row",
            f"a response has {dataset.lengths[i]} tokens with its prompt, more than data.seq_length ({longest}), and a "
            "part of it has no score",
        )
    if gates is not None:
        gates.gate(dataset[i].ids)


def score(run: ScoreRun) -> tuple[RewardsFound, World]:
    """Score `run.data` with `run.model` and write `run.output`. Collective; every rank gets what was found.

    Raises:
        UserError: bad input, or an output that is there, before anything is allocated; a score that is not finite; a
            full disk.
    """
    source = run.open(REWARD)
    gates = GateTokens(source.tokenizer) if source.architecture.head == "gated" else None
    if run.objectives and gates is None:
        raise UserError(
            f"objectives: {source.hf} is a model of one score; allowed with LlamaForRewardModelWithGating (ArmoRM)"
        )
    world = initialize(run.parallel)
    output = Path(run.output)
    on_main(world, lambda: check_no_output(output))
    whole = run.data.model_copy(update={"seq_length": _WHOLE})
    dataset = prepare_together(whole, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
    texts = _Texts.of(dataset, run.data.seq_length, gates, run.data.on_bad_row == "skip")
    on_main(world, lambda: _check_rows(run.data, texts))
    identity = {
        "weights": world.from_main(source.weights_hash() if world.is_main else ""),
        "tokenizer": source.tokenizer.content_hash,
        "template": source.tokenizer.template_hash,
        "precision": run.model.model_dump(mode="json", exclude={"load", "trust_remote_code"}),
        "objectives": run.objectives,
    }
    with ExitStack() as held:
        journals: list[ResultsJournal] = []
        on_main(world, lambda: journals.append(held.enter_context(results_journal(output, identity))))
        journal = journals[0] if journals else None
        _score_missing(run, source, gates, texts, journal, world)
        result: list[RewardsFound] = []
        on_main(world, lambda: result.append(_write(run, texts, _held(journal))))
        on_main(world, held.close)
    return world.from_main(result[0] if result else None), world  # type: ignore[return-value]


def _held(journal: ResultsJournal | None) -> ResultsJournal:
    assert journal is not None  # the main process has it
    return journal


def _score_missing(
    run: ScoreRun,
    source: ModelSource,
    gates: GateTokens | None,
    texts: _Texts,
    journal: ResultsJournal | None,
    world: World,
) -> None:
    """Scores the texts that the journal lacks; the main process records them pass by pass. Collective."""
    dataset = texts.dataset
    # Of equal texts only one.
    keys = dataset.keys
    first = {keys[i].hex(): i for unit in reversed(list(texts.rows.values())) for i in unit}
    known = world.from_main(None if journal is None else set(journal.found)) or set()
    missing = sorted(i for key, i in first.items() if key not in known)
    if world.is_main:
        say(f"scoring {len(missing)} texts; {len(first) - len(missing)} are scored already")
    if not missing:
        return
    gpt = source.build(world)
    # The last stage's tensor- and context-parallel ranks all have the same rewards, so one of them tells.
    tells = world.tp_rank == 0 and world.cp_rank == 0 and world.is_last_stage

    def numbers(hidden: torch.Tensor, batch: MicroBatch, samples: Sequence[Sample]) -> dict[str, list[float]]:
        score_S, objectives_SM = rewards(gpt, hidden, batch, world)
        columns = score_S[:, None]
        if run.objectives and objectives_SM is not None:
            columns = torch.cat([columns, objectives_SM], dim=1)
        if not tells:
            return {}
        for sample, values in zip(samples, columns.tolist(), strict=True):
            if not all(math.isfinite(value) for value in values):
                raise UserError(f"{sample.source}: the model's score of a response is not finite")
        return {sample.key.hex(): values for sample, values in zip(samples, columns.tolist(), strict=True)}

    with progress("scoring", int(sum(dataset.lengths[i] for i in missing))) as advance:
        for _, collected in score_samples(
            gpt, dataset, missing, run.row_shape(source), numbers, world, advance, fields=gates, rows=reward_rows(gpt)
        ):
            parts = world.from_all({key: values for found in collected for key, values in found.items()})
            if journal is not None:
                journal.record({key: values for part in parts for key, values in part.items()})


def _rows_again(data: DataConfig, texts: _Texts) -> Iterator[tuple[Mapping[str, Any], list[int], str]]:
    """Each row that is scored, in order: its value, its samples, and its place for messages."""
    source = Source(data)
    left = len(texts.rows)
    for row in source.rows():
        unit = texts.rows.get((row.file, row.number))
        if unit is not None:
            yield row.value, unit, f"{source.names[row.file]}:{row.number}"
            left -= 1
            if not left:
                return


def _check_rows(data: DataConfig, texts: _Texts) -> None:
    """Refuses rows that could not be written with rewards.

    Raises:
        UserError: names the row.
    """
    for value, _, place in _rows_again(data, texts):
        given = [key for key in _GIVEN if value.get(key) is not None]
        for i, response in enumerate(value.get("responses") or ()):
            if isinstance(response, Mapping):
                given += [f"responses[{i}].{key}" for key in ("reward", "score") if response.get(key) is not None]
        if given:
            raise UserError(f"{place}: the row has {given[0]} already, beside new rewards; remove the old ones first")
        try:
            json.dumps(dict(value), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: the row cannot be written as JSON: {error}") from None


def _write(run: ScoreRun, texts: _Texts, journal: ResultsJournal) -> RewardsFound:
    """Writes the rows again, in order, with what the journal has of their responses."""
    keys = [key.hex() for key in texts.dataset.keys]
    rows = responses = 0
    total = 0.0
    differences: list[float] = []
    with open(journal.out, "w", encoding="utf-8") as file:
        for value, unit, _ in _rows_again(run.data, texts):
            found = [journal.found[keys[i]] for i in unit]
            given: dict[str, Any] = {"rewards": [numbers[0] for numbers in found]}
            if run.objectives:
                given["objectives"] = [numbers[1:] for numbers in found]
            file.write(json.dumps({**value, **given}, ensure_ascii=False) + "\n")
            rows, responses, total = rows + 1, responses + len(unit), total + sum(given["rewards"])
            if "chosen" in texts.dataset[unit[0]].scalars:
                differences.append(given["rewards"][0] - given["rewards"][1])
    if texts.skipped:
        say(f"skipped {_listed(texts.skipped)}")
    pairs = len(differences)
    return RewardsFound(
        rows=rows,
        responses=responses,
        skipped=sum(texts.skipped.values()),
        mean_reward=total / responses,
        pairs=pairs,
        accuracy=sum(difference > 0 for difference in differences) / pairs if pairs else None,
        margin=sum(differences) / pairs if pairs else None,
    )


def _listed(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in skipped.items()) or "none skipped"
