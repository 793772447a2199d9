"""What a task is, and tasks by name. A new task that asks questions is one file: an `AnswerTask` under `@register`.

Two kinds: an `AnswerTask` asks a question for each row of its data, and judges the answers; a `LogProbTask` has the
model's log-probabilities of its data computed (`log_probs.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, ClassVar, TypeVar

from pydantic import Field, field_validator

from fusemega.config import Section, choose_section
from fusemega.errors import UserError, choose
from fusemega.sampling.engine import REFUSED, SamplingSettings, unless_given
from fusemega.sampling.prompts import PromptsConfig

Message = Mapping[str, Any]


class TaskSettings(Section):
    """A task of the run file: `name` selects it, its settings follow."""

    name: str


class AnswerSettings(TaskSettings):
    """What all tasks that ask have."""

    data: PromptsConfig = Field(description="the rows; each is a question")
    sampling: SamplingSettings | None = Field(None, description="in place of the run's, as a whole")

    @field_validator("sampling", mode="before")
    @classmethod
    def _is_greedy(cls, value: Any) -> Any:
        return unless_given(value, temperature=0.0)


@dataclass(frozen=True)
class TaskAnswer:
    """One answer to a question.

    Attributes:
        sample: its number among the answers to this question, from 0.
        text, finish_reason, tokens: as in `sampling.engine.Response`.
    """

    sample: int
    text: str
    finish_reason: str
    tokens: int | None

    @property
    def refused(self) -> bool:
        """Whether the engine could not answer, so that there is nothing to judge."""
        return self.finish_reason == REFUSED


@dataclass(frozen=True)
class TaskItem:
    """One row of the data, with its question and, after it was asked, the answers.

    Attributes:
        row: the row's fields.
        place: file and line.
        messages: the question.
        key: `prompt_key` of the messages.
        answers: by number; those that an engine refused are among them.
    """

    row: Mapping[str, Any]
    place: str
    messages: tuple[Message, ...]
    key: str
    answers: tuple[TaskAnswer, ...] = ()


@dataclass
class Judged:
    """What became of a task.

    Attributes:
        figures: name -> value; None where there was nothing to compute it from. `NAME_stderr` is the standard error of
            NAME over the rows.
        counts: name -> number of answers, or of rows: `rows`, `judged`, and what could not be judged or was unusual.
        rows: an object for each answer: what was found of it, beside its text.
        files: name -> content of further files of the task's folder.
    """

    figures: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AnsweredBy:
    """Who answered.

    Attributes:
        generator: the model's name.
        time: when its last answer came, seconds of the epoch.
    """

    generator: str
    time: float


class Task(ABC):
    """A task with its settings.

    Attributes:
        Settings: its section of the run file.
    """

    Settings: ClassVar[type[TaskSettings]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings


class AnswerTask(Task):
    """A task that asks a question for each row.

    Attributes:
        required: fields that a row must have.
        optional: further fields that it may have.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def check(self, sampling: SamplingSettings) -> None:  # noqa: B027  (most tasks ask nothing of it)
        """Refuses, before anything is asked, a machine or settings with which the answers could not be judged.

        Raises:
            UserError: names the key.
        """

    @abstractmethod
    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """The question of a row that has all `required` fields.

        Raises:
            BadRow: the row is not usable.
        """

    @abstractmethod
    def judge(self, items: Sequence[TaskItem], by: AnsweredBy) -> Judged:
        """What the answers are worth. Refused answers are counted, and are neither right nor wrong."""


_TASKS: dict[str, type[Task]] = {}
Cls = TypeVar("Cls", bound=type[Task])


def register(name: str) -> Callable[[Cls], Cls]:
    """Class decorator: the task is found under `name: <name>`."""

    def add(cls: Cls) -> Cls:
        _TASKS[name] = cls
        return cls

    return add


def task_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_TASKS)


def task_named(name: str) -> type[Task]:
    """The class registered under a name."""
    return _TASKS[choose("name", name, _TASKS)]


def parse_task(section: Mapping[str, Any], at: str) -> TaskSettings:
    """The settings of the task that `section["name"]` picks.

    Args:
        at: the section's place in the run file, for messages: "tasks.asdiv.".

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    return choose_section({name: each.Settings for name, each in _TASKS.items()}, section, at)


def build_task(settings: TaskSettings) -> Task:
    """The task that `parse_task` found the settings of."""
    return _TASKS[settings.name](settings)


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean over rows, and its standard error; None where there are too few rows.

    >>> mean_and_error("right", [2.0, 0.0])
    {'right': 1.0, 'right_stderr': 1.0}
    """
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {name: fmean(values) if values else None, f"{name}_stderr": error}


def one_answer(sampling: SamplingSettings) -> None:
    """For tasks whose file has one answer to a question.

    Raises:
        UserError: sampling.n is another number.
    """
    if sampling.n != 1:
        raise UserError(f"sampling.n: {sampling.n} answers to each question; allowed: 1, which the file has room for")
