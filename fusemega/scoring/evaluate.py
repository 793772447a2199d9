"""`fusemega eval`: perplexity and bits per byte of a model on a data set."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pydantic import Field

from fusemega.assets import cache_folder
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.lock import locked
from fusemega.files.output import check_output_file, on_main
from fusemega.runtime.parallel import World, initialize
from fusemega.scoring.passes import PassRun
from fusemega.training.batches import prepare_together
from fusemega.training.evaluation import Evaluation, evaluate_model


class EvalRun(PassRun):
    """Run file of `fusemega eval`."""

    output: str | None = Field(None, description="JSON file of the result; null prints it only")


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
            raise UserError(f"{path}: exists and is no result of an evaluation; it is not replaced")


def evaluate(run: EvalRun, held: ExitStack | None = None) -> tuple[Evaluation, World]:
    """Score `run.data` with `run.model`. Collective; every rank gets the result.

    Args:
        run: what, and with which model.
        held: keeps the lock of `run.output` until the caller has written it; None: it is not locked.

    Raises:
        UserError: bad input, before anything is allocated; another process writes the same output.
    """
    source = run.open()
    world = initialize(run.parallel)
    if run.output is not None and held is not None:
        on_main(world, partial(held.enter_context, locked(run.output)))
    dataset = prepare_together(run.data, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
    return evaluate_model(source.build(world), dataset, run.row_shape(source), world), world
