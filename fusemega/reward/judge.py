"""`fusemega judge`: a model compares responses in pairs. The rows are written again with `reward`, shares of wins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.files.results_journal import ResultsJournal, check_no_output, results_journal
from fusemega.reward.comparisons import PLACES, TEMPLATE, asked, pairs_of, points_of, shares
from fusemega.reward.rows import GroupRow, key_of, read_rows, write_rows
from fusemega.runtime.console import say
from fusemega.sampling.engine import SampleRequest, SamplingSettings, unless_given
from fusemega.sampling.engines import EngineSettings, open_engine, parse_engine
from fusemega.sampling.progress import progress


class JudgeRun(Section):
    """Run file of `fusemega judge`."""

    data: str | list[str] = Field(
        description="rows of prompt and responses, as `fusemega collect` writes them: a file, folder or glob, or a list"
    )
    output: str = Field(description="JSONL file: the rows with `reward` of each response; an interrupted run resumes")
    engine: SerializeAsAny[EngineSettings] = Field(description="the judge, as the engine of `fusemega sample`")
    sampling: SamplingSettings = Field(
        SamplingSettings(temperature=0.0),
        description="how the judge's answers are drawn; temperature 0 unless given",
    )
    template: str = Field(
        TEMPLATE,
        description="what the judge is asked, with {prompt}, {first} and {second}; it ends in [[A]], [[B]] or [[C]]",
    )
    opponents: int | None = Field(
        None, ge=1, description="others that each response is compared with, drawn at random; default: all of its row"
    )
    seed: int = Field(0, ge=0, description="decides the opponents")

    @field_validator("sampling", mode="before")
    @classmethod
    def _is_greedy(cls, value: Any) -> Any:
        return unless_given(value, temperature=0.0)

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return parse_engine(value) if isinstance(value, dict) else value

    @field_validator("template")
    @classmethod
    def _has_places(cls, value: str) -> str:
        for place in PLACES:
            if place not in value:
                raise ValueError(f"has no {place}; allowed: a text with {', '.join(PLACES)}")
        return value

    @field_validator("sampling")
    @classmethod
    def _asks_once(cls, value: SamplingSettings) -> SamplingSettings:
        if value.n != 1:
            raise ValueError("n: a pair is judged once in each order; leave it out")
        return value


class JudgeFound(BaseModel):
    """What the judge said.

    Attributes:
        rows, responses: how many were written.
        rows_without: rows that got no `reward`, because a response in them has no comparison with a verdict.
        comparisons: pairs, each asked in both orders.
        answers: what was asked for; of these, `malformed` have no verdict and count for nothing.
        ties: answers that say so.
        contradictions: pairs whose two answers name the same place as the better one.
        first: share of the answers, ties left out, for the response that stood first; 0.5 of a fair judge.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    responses: int
    rows_without: int
    comparisons: int
    answers: int
    malformed: int
    ties: int
    contradictions: int
    first: float | None


@dataclass(frozen=True)
class _Question:
    """One order of one pair. `key`: of what the judge is asked."""

    row: GroupRow
    first: int
    second: int
    text: str

    @property
    def key(self) -> str:
        return key_of(self.text)


def judge(run: JudgeRun) -> JudgeFound:
    """Compares the responses of `run.data` and writes `run.output`.

    Raises:
        UserError: bad rows, an output that is there, a judge that cannot be asked, before any work; answers that are
            missing (the same command then asks for these alone); a full disk.
    """
    output = Path(run.output)
    check_no_output(output)
    rows = read_rows(run.data, ("reward", "score"))
    if not any(len(row.texts) > 1 for row in rows):
        raise UserError(f"{run.data}: no row has two responses to compare")
    engine = open_engine(run.engine)
    identity = {"engine": dict(engine.identity), "sampling": run.sampling.model_dump(mode="json")}
    with results_journal(output, identity) as journal:
        _ask_missing(run, rows, engine, journal)
        rewards = [_rewards(run, row, journal) for row in rows]
        places = {id(row): place for place, row in enumerate(rows)}
        write_rows(journal.out, rows, lambda row: rewards[places[id(row)]])
        return _counted(run, rows, rewards, journal)


def _ask_missing(run: JudgeRun, rows: list[GroupRow], engine: Any, journal: ResultsJournal) -> None:
    requests = {
        question.key: SampleRequest(question.key, ({"role": "user", "content": question.text},))
        for row in rows
        for question in _questions(run, row)
    }
    known = journal.found.keys() & requests.keys()
    say(f"judging {len(requests) - len(known)} times; {len(known)} answers are there already")
    if len(known) == len(requests):
        return
    engine.prepare()
    with progress(len(requests) - len(known)) as (_, count):
        skip = {(key, 0) for key in known}
        for response in engine.generate(list(requests.values()), run.sampling, skip):
            journal.record({response.key: [points_of(response.text)]})
            count(response)


def _questions(run: JudgeRun, row: GroupRow) -> Iterator[_Question]:
    texts = row.texts
    for one, other in pairs_of(len(texts), run.opponents, key_of(run.seed, texts)):
        for first, second in ((one, other), (other, one)):
            yield _Question(row, first, second, asked(run.template, row.messages, texts[first], texts[second]))


def _rewards(run: JudgeRun, row: GroupRow, journal: ResultsJournal) -> list[dict[str, float]]:
    points = {(q.first, q.second): journal.found[q.key][0] for q in _questions(run, row)}
    found = shares(len(row.texts), points)
    # Readers of rows want a reward of each response or of none.
    return [{"reward": each} for each in found if each is not None] if None not in found else [{} for _ in found]


def _counted(
    run: JudgeRun, rows: list[GroupRow], rewards: list[list[dict[str, float]]], journal: ResultsJournal
) -> JudgeFound:
    comparisons = contradictions = 0
    said: list[float | None] = []
    for row in rows:
        both = [journal.found[question.key][0] for question in _questions(run, row)]
        said += both
        pairs = list(zip(both[::2], both[1::2], strict=True))
        comparisons += len(pairs)
        contradictions += sum(one == other and one in (0.0, 1.0) for one, other in pairs)
    decided = [points for points in said if points in (0.0, 1.0)]
    found = JudgeFound(
        rows=len(rows),
        responses=sum(len(row.texts) for row in rows),
        rows_without=sum(not each[0] for each in rewards),
        comparisons=comparisons,
        answers=len(said),
        malformed=said.count(None),
        ties=said.count(0.5),
        contradictions=contradictions,
        first=decided.count(1.0) / len(decided) if decided else None,
    )
    if found.malformed or found.rows_without:
        say(f"{found.malformed} answers of the judge have no verdict; {found.rows_without} rows got no reward")
    return found
