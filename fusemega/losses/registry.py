"""Training objectives by name: what a loss must say about itself for the trainer to run it under any layout.

A new loss is one file: a subclass of `Objective` with its formula in the docstring, under `@register(name)`. Two things
are chosen independently of each other: what the loss is a sum over (`unit`: tokens, sequences, or groups of them), and
which frozen models it asks (`frozen`: none, a teacher, a reference, ...), with what it wants of each.

Shape suffixes: N supervised positions of a micro-batch, S sequences, H hidden size, V this rank's vocabulary rows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
from torch import Tensor

from fusemega.config import Section, choose_section
from fusemega.errors import UserError, choose
from fusemega.passes.answers import HiddenStates
from fusemega.passes.frozen import Request
from fusemega.passes.micro_batch import Fields, MicroBatch

if TYPE_CHECKING:
    from fusemega.losses.reference import Reference
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.tokenizer import Tokenizer

Output = TypeVar("Output", HiddenStates, Tensor)


class ObjectiveSettings(Section):
    """The `objective` section of a run file: `name`, then that objective's own settings."""

    name: str


class Objective(Fields, ABC, Generic[Output]):
    """A loss, its terms and the global counts that each term is divided by.

    `Objective[HiddenStates]` is a sum over tokens: `loss` gets the final hidden states with the head that reads them.
    `Objective[Tensor]` couples the tokens of a sequence, or the sequences of a group: `loss` gets one number a
    sequence. The methods of `Fields` say what a micro-batch carries for it besides tokens and labels.

    Attributes:
        Settings: its section of the run file.
        terms: names of the parts of the loss, each with a denominator of its own.
        unit: what the loss is a sum over, and what a global batch counts: a `group` is all that the loss has to see
            together, such as a pair, and lies in one micro-batch.
        wants: for unit sequence or group, what `loss` gets of each sequence: "logp" of its supervised tokens,
            or "score", what a scalar head gives for its last token. The model in training has to have that head.
        splits_samples: False: the tokens of a sample must lie on one rank, and context parallelism is refused.
        measures: names of metrics that it tells besides its terms; see `measured`.
        statistics: names of metrics that depend on the model's output, such as the accuracy on pairs. `loss` returns
            their sums; the metric is the sum divided by the count of the first term.
        frozen: the frozen models that it asks, by name, which is also their key in its section of the run file. Their
            answers are in the micro-batch's `answers` under that name; nothing passes back to them.
        reference: the reference that its loss compares the model with; None: it has none.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    terms: tuple[str, ...]
    unit: ClassVar[Literal["token", "sequence", "group"]]
    wants: ClassVar[Literal["logp", "score"]] = "logp"
    splits_samples: ClassVar[bool] = True
    measures: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    frozen: Mapping[str, Request] = MappingProxyType({})
    reference: Reference | None = None

    @classmethod
    @abstractmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> Objective[Any]:
        """The objective for a model with this tokenizer and vocabulary, everything that it reads opened and checked.

        Raises:
            UserError: something it reads is missing, damaged, or does not fit the tokenizer.
        """

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        """Hashes of what the settings name by a path, in the settings' own form. They replace the paths when two runs
        are compared.

        Args:
            dataset: the training data.
        """
        return {}

    def check_data(self, dataset: TokenizedDataset) -> None:  # noqa: B027  (most objectives ask nothing of it)
        """Refuses, before anything is allocated, data that this objective could not be computed on.

        Raises:
            UserError: names the sample.
        """

    def for_data(self, dataset: TokenizedDataset) -> Self:
        """The same loss for held-out data, which may have other sources. Raises as `check_data`."""
        other = copy.copy(self)
        other.check_data(dataset)
        return other

    def begin_step(self, iteration: int, train_iters: int) -> None:  # noqa: B027  (most losses do not depend on it)
        """Told before each update, and before held-out data are scored, how far the run is.

        Args:
            iteration: updates done; a resumed run goes on counting.
            train_iters: updates of the whole run.
        """

    @abstractmethod
    def counts(self, batch: MicroBatch) -> dict[str, int]:
        """This micro-batch's part of each term's denominator; the trainer sums it over the whole step first.

        Called while the batch's tensors are still in host memory: on a GPU the host would wait for a count.
        Under context parallelism an objective of unit token counts the positions that this rank has; one of unit
        sequence or group counts whole sequences or groups, which its ranks all have.
        """

    def measured(self, batch: MicroBatch) -> Mapping[str, tuple[float, float]]:
        """This micro-batch's part of the sum and of the count of each of `measures`, summed over the step as `counts`
        are. The metric is sum / count, and is left out of a step in which the count is 0. Called when `counts` is."""
        return {}

    @abstractmethod
    def loss(
        self, output: Output, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the global loss.

        Args:
            output: what the model in training gives for the micro-batch. For unit token: `HiddenStates`, for
                `logits.vocab.fused_token_loss` and its like. For unit sequence or group: a tensor [S] of fp32 or wider,
                the same on every rank that shares the tokens: the log-probability of each sequence's supervised
                tokens, summed, or its score, as `wants` says. With `token_weights`, the log-probabilities' weighted
                sums [S, M].
            batch: labels, bounds, this objective's fields, and its frozen models' answers.
            denominators: each term's count over the whole step, at least 1.

        Returns:
            The scalar to differentiate, already divided: micro-batches and data-parallel ranks simply add. And each
            term's sum over this micro-batch, unweighted and not divided, detached: with `counts` it gives the metric.
            Beside them the sums of `statistics`.
        """


def check_data(objective: Objective[Any], dataset: TokenizedDataset) -> None:
    """Refuses data of another unit than the objective's, and what its own `check_data` refuses.

    Raises:
        UserError: names the sample.
    """
    name = objective.Settings.model_fields["name"].default
    wrong = np.flatnonzero(dataset.in_group != (objective.unit == "group"))
    if len(wrong):
        sample = dataset[int(wrong[0])]
        if sample.group is None:
            raise UserError(
                f"{sample.source}: the row is one text, and objective.name {name} compares several responses to one "
                "prompt; allowed: prompt with chosen and rejected, or prompt with responses"
            )
        raise UserError(
            f"{sample.source}: the row has several responses to one prompt, and objective.name {name} trains "
            "on one text per row; allowed: messages, prompt and completion, or text"
        )
    objective.check_data(dataset)


_OBJECTIVES: dict[str, type[Objective[Any]]] = {}
Cls = TypeVar("Cls", bound=type[Objective[Any]])


def register(name: str) -> Callable[[Cls], Cls]:
    """Class decorator: the objective is found under `objective.name: <name>` in run files."""

    def add(cls: Cls) -> Cls:
        _OBJECTIVES[name] = cls
        return cls

    return add


def objective_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_OBJECTIVES)


def objective_named(name: str) -> type[Objective[Any]]:
    """The class registered under a name."""
    return _OBJECTIVES[choose("objective.name", name, _OBJECTIVES)]


def parse_objective(section: Mapping[str, Any]) -> ObjectiveSettings:
    """The settings of the objective that `section["name"]` picks.

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    return choose_section({name: each.Settings for name, each in _OBJECTIVES.items()}, section, "objective.")


def build_objective(settings: ObjectiveSettings, tokenizer: Tokenizer, vocab_size: int) -> Objective[Any]:
    """The objective that `parse_objective` found the settings of; raises as `Objective.build`."""
    return _OBJECTIVES[choose("objective.name", settings.name, _OBJECTIVES)].build(settings, tokenizer, vocab_size)
