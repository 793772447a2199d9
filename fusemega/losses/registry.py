"""Training objectives by name: what a loss must say about itself for the trainer to run it under any layout.

A new loss is one file: a subclass of `TokenObjective`, `OnlineObjective` or `SequenceObjective` with its formula in the
docstring, under `@register(name)`.

Shape suffixes: N supervised positions of a micro-batch, P of one sample, S samples of a micro-batch, H hidden size,
G a teacher's, V this rank's vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from fusemega.config import Section, mistakes
from fusemega.errors import UserError, choose

if TYPE_CHECKING:
    from fusemega.checkpoint.open_model import ModelConfig
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer


class ObjectiveSettings(Section):
    """The `objective` section of a run file: `name`, then that objective's own settings."""

    name: str


class Objective(ABC):
    """A loss, its terms and the global counts that each term is divided by.

    Attributes:
        Settings: its section of the run file.
        terms: names of the parts of the loss, each with a denominator of its own.
        unit: what the loss is a sum over.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    terms: ClassVar[tuple[str, ...]]
    unit: ClassVar[Literal["token", "sequence"]]

    @classmethod
    @abstractmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> Objective:
        """The objective for a model with this tokenizer and vocabulary, everything that it reads opened and checked.

        Raises:
            UserError: something it reads is missing, damaged, or does not fit the tokenizer.
        """

    @abstractmethod
    def sample_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """Arrays [P, ...] of one sample that the micro-batch will carry as tensors [N, ...]."""

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        """Hashes of what the settings name by a path, in the settings' own form: they replace the paths where it is
        asked whether two runs compute the same.

        Args:
            dataset: that is trained on.
        """
        return {}

    def check_data(self, dataset: TokenizedDataset) -> None:  # noqa: B027  (most objectives ask nothing of it)
        """Refuses, before anything is allocated, data that this objective could not be computed on.

        Raises:
            UserError: names the sample.
        """

    @abstractmethod
    def counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """This micro-batch's part of each term's denominator; the trainer sums it over the whole step first.

        Called while the batch's tensors are still in host memory: on a GPU a count would have to be waited for.
        Under context parallelism a token objective counts what this rank has, a sequence objective whole samples.
        """


class TokenObjective(Objective):
    """A loss that is a sum over supervised tokens. Context-parallel ranks each have some of them, and simply add."""

    unit = "token"

    @abstractmethod
    def loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        batch: Mapping[str, Any],
        denominators: Mapping[str, Tensor | float],
        head_kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the global loss.

        Args:
            hidden_NH: hidden states of the supervised positions.
            weight_VH: this rank's rows of the output weight.
            batch: `labels` int64 [N] and this objective's fields.
            denominators: each term's count over the whole step, at least 1.
            head_kwargs: `group`, `vocab_size`, and what else the vocabulary kernel takes.

        Returns:
            The scalar to differentiate, already divided: micro-batches and data-parallel ranks simply add. And each
            term's sum over this micro-batch, unweighted and not divided, detached: with `counts` it gives the metric.
        """


@dataclass(frozen=True, eq=False)
class TeacherOutput:
    """What a teacher makes of a micro-batch that the model in training reads too.

    Attributes:
        hidden_NG: its final hidden states at the supervised positions.
        weight_VG: its output weight's rows for the ids of the model's own rows on this rank.
        softcap: of its logits.
    """

    hidden_NG: Tensor
    weight_VG: Tensor
    softcap: float | None


class OnlineObjective(Objective):
    """A sum over supervised tokens, as `TokenObjective`, that asks a second, frozen model about the same tokens.

    The trainer builds the teacher in the model's own layout and runs it over a step's micro-batches before the model.

    Attributes:
        teacher: of the model's tokenizer, and of its vocabulary or a larger one.
    """

    unit = "token"
    teacher: ModelConfig

    @abstractmethod
    def loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        teacher: TeacherOutput,
        batch: Mapping[str, Any],
        denominators: Mapping[str, Tensor | float],
        head_kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `TokenObjective.loss`; nothing passes back to the teacher."""


class SequenceObjective(Objective):
    """A loss that couples the tokens of a sample: a function of its summed label log-probability.

    Context-parallel ranks share the tokens of a sample. The trainer sums its log-probability over them, so every one of
    them computes the same loss, passes the gradient to its own tokens, and counts once in the metrics.
    """

    unit = "sequence"

    @abstractmethod
    def loss(
        self, logp_S: Tensor, batch: Mapping[str, Any], denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the global loss.

        Args:
            logp_S: log-probability of each sample's supervised tokens, summed; of fp32 or wider.
            batch: `sequence_tokens` int64 [S], how many those are.
            denominators: as of `TokenObjective.loss`.

        Returns:
            As of `TokenObjective.loss`.
        """


_OBJECTIVES: dict[str, type[Objective]] = {}
Cls = TypeVar("Cls", bound=type[Objective])


def register(name: str) -> Callable[[Cls], Cls]:
    """Class decorator: the objective is found under `objective.name: <name>` in run files."""

    def add(cls: Cls) -> Cls:
        _OBJECTIVES[name] = cls
        return cls

    return add


def objective_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_OBJECTIVES)


def objective_named(name: str) -> type[Objective]:
    """The class registered under a name."""
    return _OBJECTIVES[choose("objective.name", name, _OBJECTIVES)]


def parse_objective(section: Mapping[str, Any]) -> ObjectiveSettings:
    """The settings of the objective that `section["name"]` picks.

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    if "name" not in section:
        raise UserError(f"objective.name: required, and not given; allowed: {', '.join(objective_names())}")
    settings = _OBJECTIVES[choose("objective.name", str(section["name"]), _OBJECTIVES)].Settings
    try:
        return settings.model_validate(dict(section))
    except ValidationError as error:
        raise UserError(mistakes(settings, error, "objective.")) from None


def build_objective(settings: ObjectiveSettings, tokenizer: Tokenizer, vocab_size: int) -> Objective:
    """The objective that `parse_objective` found the settings of; raises as `Objective.build`."""
    return _OBJECTIVES[choose("objective.name", settings.name, _OBJECTIVES)].build(settings, tokenizer, vocab_size)
