"""`fusemega eval`: perplexity and bits per byte of a model on a data set."""

from __future__ import annotations

from pydantic import Field

from fusemega.assets import cache_folder
from fusemega.runtime.parallel import World, initialize
from fusemega.scoring.passes import PassRun
from fusemega.training.batches import prepare_together
from fusemega.training.evaluation import Evaluation, evaluate_model


class EvalRun(PassRun):
    """Run file of `fusemega eval`."""

    output: str | None = Field(None, description="JSON file of the result; null prints it only")


def evaluate(run: EvalRun) -> tuple[Evaluation, World]:
    """Score `run.data` with `run.model`. Collective; every rank gets the result.

    Raises:
        UserError: bad input, before anything is allocated.
    """
    source = run.open()
    world = initialize(run.parallel)
    dataset = prepare_together(run.data, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
    return evaluate_model(source.build(world), dataset, run.row_shape(source), world), world
