"""`fusemega eval`: perplexity and bits per byte of a model on a data set, and its distance from a reference model."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pydantic import Field, field_validator

from fusemega.checkpoint.open_model import ModelConfig
from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.json_files import read_json
from fusemega.files.lock import locked
from fusemega.files.output import check_output_file
from fusemega.models.build import GPT
from fusemega.passes.batches import prepare_together
from fusemega.passes.frozen import FrozenModel, open_frozen
from fusemega.runtime.parallel import World, environment_rank, initialize
from fusemega.runtime.together import on_main
from fusemega.scoring.evaluation import Evaluation, evaluate_model
from fusemega.scoring.run_file import PassRun
from fusemega.text.data import DataConfig


class EvalRun(PassRun):
    """Run file of `fusemega eval`."""

    reference: ModelConfig | None = Field(
        None,
        description="a model with the same tokenizer, run in the same layout; adds kl and same_top_1 to the result",
    )
    output: str | None = Field(None, description="JSON file for the result; default: print it only")

    @field_validator("reference")
    @classmethod
    def _no_fp8(cls, reference: ModelConfig | None) -> ModelConfig | None:
        if reference is not None and reference.fp8 is not None:
            raise ValueError("fp8 is for the model that is scored; a reference runs in bf16 or fp32")
        return reference


class Scorer:
    """A model and its reference, built once, to score any data. Collective.

    Raises:
        UserError: bad input, before anything is allocated.
    """

    def __init__(self, run: EvalRun) -> None:
        self._source = run.open()
        reference = None
        if run.reference is not None:
            ranks = environment_rank()[1]
            reference = open_frozen(run.reference, run.parallel, ranks, self._source, key="reference")
        self.world = initialize(run.parallel)
        self._run, self._reference_source = run, reference
        self._gpt: GPT | None = None
        self._reference: FrozenModel | None = None

    def score(self, data: DataConfig) -> Evaluation:
        """The evaluation of `data`; a `Comparison` if there is a reference. Every rank gets it.

        Raises:
            UserError: bad data, before the model is built.
        """
        source, world = self._source, self.world
        dataset = prepare_together(data, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
        if self._gpt is None:
            self._gpt = source.build(world)
            if self._reference_source is not None:
                self._reference = FrozenModel.build(self._reference_source, "hidden", self._gpt, world)
        return evaluate_model(self._gpt, dataset, self._run.row_shape(source), world, self._reference)


def check_output(path: Path) -> None:
    """Refuses, before any long work, an output that cannot be written, or that would replace something else.

    Raises:
        UserError: a file is there that holds no evaluation.
    """
    check_output_file(path)
    if os.path.lexists(path):
        try:
            found = read_json(path)
        except UserError:
            found = {}
        if not Evaluation.model_fields.keys() <= found.keys():
            raise UserError(f"{path}: exists and is not a result of an evaluation; it is not replaced")


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
