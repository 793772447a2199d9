"""`fusemega rules`: responses scored by simple rules. The rows are written again with `reward`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.files.output import new_file
from fusemega.files.results_journal import check_no_output
from fusemega.reward.rows import GroupRow, read_rows
from fusemega.reward.rule_set import RewardRule, parse_rule


class RulesRun(Section):
    """Run file of `fusemega rules`."""

    data: str | list[str] = Field(
        description="rows of prompt and responses, as `fusemega collect` writes them: a file, folder or glob, or a list"
    )
    output: str = Field(description="JSONL file: the rows with `reward` of each response")
    rules: list[SerializeAsAny[RewardRule]] = Field(
        min_length=1, description="the reward is the sum of weight times score; `name` selects a rule, settings follow"
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [parse_rule(each, f"rules[{i}].") if isinstance(each, dict) else each for i, each in enumerate(value)]


class RulesFound(BaseModel):
    """What was scored.

    Attributes:
        rows, responses: how many were written.
        mean_reward: mean over responses.
        means: mean of each rule's score, in the order of the run file.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    responses: int
    mean_reward: float
    means: list[float]


def apply_rules(run: RulesRun) -> RulesFound:
    """Scores the responses of `run.data` and writes `run.output`.

    Raises:
        UserError: bad rows, a row without what a rule needs, an output that is there; before anything is written.
    """
    output = Path(run.output)
    check_no_output(output)
    rows = read_rows(run.data, ("reward", "score"))
    scored = [_scores(run.rules, row) for row in rows]
    with new_file(output) as file:
        for row, scores in zip(rows, scored, strict=True):
            added = [{"reward": _reward(run.rules, each)} for each in scores]
            file.write(json.dumps(row.with_added(added), ensure_ascii=False) + "\n")
    each = [scores for row in scored for scores in row]
    return RulesFound(
        rows=len(rows),
        responses=len(each),
        mean_reward=sum(_reward(run.rules, scores) for scores in each) / len(each),
        means=[sum(column) / len(each) for column in zip(*each, strict=True)],
    )


def _scores(rules: list[RewardRule], row: GroupRow) -> list[list[float]]:
    try:
        return [[rule.score(text, row.about) for rule in rules] for text in row.texts]
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from None


def _reward(rules: list[RewardRule], scores: list[float]) -> float:
    return sum(rule.weight * score for rule, score in zip(rules, scores, strict=True))
