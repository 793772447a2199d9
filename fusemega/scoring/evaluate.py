"""`fusemega eval`: perplexity and bits per byte of a model on a data set, and its distance from another model; on pairs
also how often the chosen response is the more probable one.

The other one is a model with the same tokenizer that runs beside it, or one whose rows are stored.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from fusemega.checkpoint.open_model import ModelConfig
from fusemega.files.cache import cache_folder
from fusemega.files.lock import locked
from fusemega.files.output import check_result_file
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.losses.distill import Distill, Taught
from fusemega.models.build import GPT
from fusemega.passes.batches import prepare_together
from fusemega.passes.frozen import FrozenModel, open_frozen
from fusemega.runtime.console import say
from fusemega.runtime.parallel import World, environment_rank, initialize
from fusemega.runtime.together import on_main
from fusemega.scoring.evaluation import Evaluation, evaluate_model
from fusemega.scoring.pair_accuracy import are_pairs, evaluate_pairs
from fusemega.scoring.run_file import PassRun
from fusemega.store import Store
from fusemega.text.data import DataConfig
from fusemega.text.tokenizer import Tokenizer


class EvalRun(PassRun):
    """Run file of `fusemega eval`."""

    reference: ModelConfig | None = Field(
        None,
        description="a model with the same tokenizer, run in the same layout; adds kl and same_top_1 to the result",
    )
    teacher: TeacherStoreConfig | None = Field(
        None,
        description="a teacher's rows of this data, written by `fusemega teach`, with a map if its tokenizer is "
        "another one; adds kl and taught to the result",
    )
    output: str | None = Field(None, description="JSON file for the result; default: print it only")

    @field_validator("reference")
    @classmethod
    def _no_fp8(cls, reference: ModelConfig | None) -> ModelConfig | None:
        if reference is not None and reference.fp8 is not None:
            raise ValueError("fp8 is for the model that is scored; a reference runs in bf16 or fp32")
        return reference

    @model_validator(mode="after")
    def _one_distance(self) -> EvalRun:
        if self.reference is not None and self.teacher is not None:
            raise ValueError("reference and teacher: give one of them; both would be the result's kl")
        return self


class Scorer:
    """A model and what it is compared with, built once, to score any data. Collective.

    Raises:
        UserError: bad input, before anything is allocated.
    """

    def __init__(self, run: EvalRun) -> None:
        self._source = run.open()
        reference = None
        if run.reference is not None:
            ranks = environment_rank()[1]
            reference = open_frozen(run.reference, run.parallel, ranks, self._source, key="reference")
        rows = None
        if run.teacher is not None:
            rows = rows_of(run.teacher, self._source.tokenizer, self._source.vocab_size)
        self.world = initialize(run.parallel)
        self._run, self._reference_source, self._rows = run, reference, rows
        self._gpt: GPT | None = None
        self._reference: FrozenModel | None = None

    def score(self, data: DataConfig) -> Evaluation:
        """The evaluation of `data`; a `Comparison` with a reference, a `RowsComparison` with rows; without them, of
        pairs, a `PairsEvaluation`. Every rank gets it.

        Raises:
            UserError: bad data, or a sample without a row, before the model is built.
        """
        source, world = self._source, self.world
        dataset = prepare_together(data, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
        if self._rows is not None:
            self._rows.check_data(dataset)
        if self._gpt is None:
            self._gpt = source.build(world)
            if self._reference_source is not None:
                self._reference = FrozenModel.build(self._reference_source, "hidden", self._gpt, world)
        shape = self._run.row_shape(source)
        if are_pairs(dataset):
            if self._reference is None and self._rows is None:
                return evaluate_pairs(self._gpt, dataset, shape, world)
            say("the rows are pairs, whose accuracy is not computed beside a reference or a teacher")
        return evaluate_model(self._gpt, dataset, shape, world, self._reference, self._rows)


def rows_of(config: TeacherStoreConfig, tokenizer: Tokenizer, vocab_size: int) -> Taught:
    """The rows of a store as they are compared with a model: at the store's temperature, nothing where no row teaches.

    Raises:
        UserError: as `TeacherStore`; rows of draws.
    """
    opened = Store.open(config.store)
    opened.check({"rows": "top_k"})  # KL from shares of draws is not KL from what they were drawn from
    settings = Distill.Settings.model_validate(
        config.model_dump() | {"unaligned": "nothing", "temperature": opened.manifest.temperature}
    )
    store = TeacherStore(config, "teacher", tokenizer, vocab_size, settings.temperature, settings.tail, "label")
    store.can_skip = False
    return Distill(settings, store)


def check_output(path: Path) -> None:
    """Refuses, before any long work, an output that cannot be written, or that would replace something else.

    Raises:
        UserError: see `check_result_file`.
    """
    check_result_file(path, Evaluation.model_fields, "a result of an evaluation")


def evaluate(run: EvalRun, held: ExitStack | None = None) -> tuple[Evaluation, World]:
    """Score `run.data` with `run.model`. Collective; every rank gets the result.

    Args:
        run: the run file: which data, with which model.
        held: keeps the lock of `run.output` until the caller has written it; None: it is not locked.

    Raises:
        UserError: bad input, before anything is allocated; another process writes the same output.
    """
    scorer = Scorer(run)
    if run.output is not None and held is not None:
        on_main(scorer.world, partial(held.enter_context, locked(run.output)))
    return scorer.score(run.data), scorer.world
