"""`fusemega verify`: whether each response is right. The rows are written again with `correct` and `verdict`."""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fusemega.config import Section
from fusemega.files.results_journal import ResultsJournal, check_no_output, results_journal
from fusemega.passes.progress import progress
from fusemega.reward.code import CodeLimits, Program, code_verdicts
from fusemega.reward.maths import SECONDS, maths_verdicts, need_math_verify
from fusemega.reward.rows import GroupRow, key_of, read_rows, write_rows
from fusemega.reward.sandbox import find_sandbox
from fusemega.reward.verdict import Verdict
from fusemega.runtime.console import say
from fusemega.runtime.workers import default_workers

_MATHS, _CODE = "maths", "code"
_RECORD_SECONDS = 1.0  # of work that a kill may cost


class MathsSettings(Section):
    """How maths answers are compared."""

    timeout: float = Field(
        SECONDS,
        gt=0,
        description="seconds of processor time for a response (or six times as many by the wall's clock), after which "
        "it is undecided",
    )


class VerifyRun(Section):
    """Run file of `fusemega verify`."""

    data: str | list[str] = Field(
        description="rows of prompt and responses, as `fusemega collect` writes them: a file, folder or glob, or a list"
    )
    output: str = Field(
        description="JSONL file: the rows with `correct` and `verdict` of each response; an interrupted run resumes"
    )
    maths: MathsSettings = MathsSettings()
    code: CodeLimits = CodeLimits()
    workers: int | None = Field(
        None, ge=1, description="responses at the same time; default: one for each core, at most 8"
    )


class Verified(BaseModel):
    """What was found.

    Attributes:
        rows, responses: how many were written.
        correct, wrong, undecided: responses by verdict; undecided ones have `correct: null`.
        not_asked: responses of rows without answer and tests, which are written as they are.
        reasons: domain -> reason -> responses.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    responses: int
    correct: int
    wrong: int
    undecided: int
    not_asked: int
    reasons: dict[str, dict[str, int]]


def verify(run: VerifyRun) -> Verified:
    """Checks the responses of `run.data` and writes `run.output`.

    A row with `tests` is code; one with `answer` and no tests is maths. Equal responses to a task are checked once.

    Raises:
        UserError: bad rows, an output that is there, no sandbox or no math-verify, before any work; a full disk.
    """
    output = Path(run.output)
    check_no_output(output)
    rows = read_rows(run.data, ("correct", "verdict"))
    kinds = {_kind(row) for row in rows}
    if kinds == {""}:
        say(f"{run.data}: no row has `answer` (maths) or `tests` (code), so nothing is verified")
    if _MATHS in kinds:
        need_math_verify()
    if _CODE in kinds:
        say(f"programs run under {find_sandbox(run.code.sandbox).name}")
    identity: dict[str, Any] = {
        "maths": {"timeout": run.maths.timeout, "math-verify": _version("math-verify"), "sympy": _version("sympy")},
        "code": run.code.model_dump(mode="json", exclude={"sandbox"}),
    }
    with results_journal(output, identity) as journal:
        _check_missing(run, rows, journal)
        write_rows(journal.out, rows, lambda row: [_added(row, text, journal.found) for text in row.texts])
        return _counted(rows, journal.found)


def _check_missing(run: VerifyRun, rows: list[GroupRow], journal: ResultsJournal) -> None:
    asked: dict[str, dict[str, tuple[GroupRow, str]]] = {_MATHS: {}, _CODE: {}}
    for row in rows:
        if (what := _kind(row)) in asked:
            asked[what].update({_key(row, text): (row, text) for text in row.texts})
    missing = {what: {key: of for key, of in each.items() if key not in journal.found} for what, each in asked.items()}
    for what, each in missing.items():
        if not asked[what]:
            continue
        say(f"{what}: checking {len(each)} responses; {len(asked[what]) - len(each)} are checked already")
        keys = list(each)
        found: dict[str, Verdict] = {}
        recorded = time.monotonic()
        with progress(f"checking {what}", len(keys)) as advance:
            try:
                for place, verdict in _verdicts(run, what, [each[key] for key in keys]):
                    found[keys[place]] = verdict
                    advance(1)
                    if time.monotonic() - recorded > _RECORD_SECONDS:
                        journal.record(found)
                        found, recorded = {}, time.monotonic()
            finally:
                if found:
                    journal.record(found)


def _verdicts(run: VerifyRun, what: str, asked: list[tuple[GroupRow, str]]) -> Iterator[tuple[int, Verdict]]:
    workers = run.workers or default_workers()
    if what == _MATHS:
        pairs = [(row.about["answer"], text) for row, text in asked]
        return maths_verdicts(pairs, run.maths.timeout, workers)
    programs = [Program(text, row.about["tests"], row.about.get("entry_point")) for row, text in asked]
    return code_verdicts(programs, run.code, workers)


def _kind(row: GroupRow) -> str:
    """What decides about the row's responses: maths, code, or "" where nothing does."""
    if "tests" in row.about and row.about.get("domain") != _MATHS:
        return _CODE
    return _MATHS if "answer" in row.about and row.about.get("domain") != _CODE else ""


def _key(row: GroupRow, text: str) -> str:
    task = [row.about["answer"]] if _kind(row) == _MATHS else [row.about["tests"], row.about.get("entry_point")]
    return key_of(_kind(row), task, text)


def _verdict_of(row: GroupRow, text: str, found: Mapping[str, list[Any]]) -> Verdict | None:
    """None where nothing was asked."""
    if _kind(row):
        return Verdict(*found[_key(row, text)])
    if row.about.get("domain") in (_MATHS, _CODE):
        return Verdict(None, "the row has no answer" if row.about["domain"] == _MATHS else "the row has no tests")
    return None


def _added(row: GroupRow, text: str, found: Mapping[str, list[Any]]) -> dict[str, Any]:
    verdict = _verdict_of(row, text, found)
    return {} if verdict is None else {"correct": verdict.correct, "verdict": verdict.reason}


def _counted(rows: list[GroupRow], found: Mapping[str, list[Any]]) -> Verified:
    reasons: dict[str, Counter[str]] = {}
    by_result: Counter[bool | None] = Counter()
    not_asked = 0
    for row in rows:
        for text in row.texts:
            verdict = _verdict_of(row, text, found)
            if verdict is None:
                not_asked += 1
                continue
            by_result[verdict.correct] += 1
            reasons.setdefault(row.domain, Counter())[verdict.reason] += 1
    for domain, counts in reasons.items():
        say(f"{domain}: {', '.join(f'{count} ({reason})' for reason, count in counts.most_common())}")
    return Verified(
        rows=len(rows),
        responses=sum(len(row.texts) for row in rows),
        correct=by_result[True],
        wrong=by_result[False],
        undecided=by_result[None],
        not_asked=not_asked,
        reasons={domain: dict(counts.most_common()) for domain, counts in reasons.items()},
    )


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
