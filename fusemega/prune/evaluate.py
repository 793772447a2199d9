"""`fusemega prune eval`: a model's perplexity with the first k blocks of an order masked; no model is written."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fusemega.files.cache import cache_folder
from fusemega.files.output import check_result_file
from fusemega.passes.progress import progress
from fusemega.prune.calibration import calibration
from fusemega.prune.costs import cross_entropy, perplexity
from fusemega.prune.masked_runs import MaskedRuns
from fusemega.prune.order import read_order
from fusemega.prune.run_file import PruneEvalRun
from fusemega.prune.stage import StageBlocks
from fusemega.runtime.parallel import World, initialize


class OrderEvaluation(BaseModel):
    """Perplexities along an order.

    Attributes:
        perplexities: number of removed blocks, as text -> perplexity.
        loss: the same -> mean cross-entropy a token, nats.
        tokens: predicted tokens of the data.
    """

    model_config = ConfigDict(frozen=True)

    perplexities: dict[str, float]
    loss: dict[str, float]
    tokens: int


def evaluate_order(run: PruneEvalRun) -> tuple[OrderEvaluation, World]:
    """Measure `run.order` on `run.data`. Collective; every rank gets the result.

    Raises:
        UserError: bad input, before anything is allocated.
    """
    source = run.open()
    order = read_order(run.order)
    counts = list(range(len(order) + 1)) if run.counts is None else run.counts
    order.removed(counts[-1])  # called for its error
    world = initialize(run.parallel)
    known = order.model is not None and world.is_main
    weights = world.from_main(source.weights_hash() if known else None)
    order.check_model(source.architecture, weights, run.model.load)
    shape, cache = run.row_shape(source), cache_folder() / "data"
    data = calibration(run.data, run.windows, run.samples, run.seed, source, shape, world, cache)
    stage = StageBlocks(source.build(world), world)
    rows = stage.rows(data.batches)
    costs: dict[str, float] = {}
    with progress("measuring", len(counts) * data.tokens) as advance:
        # One replica's work is small, so each of them does all of it.
        runs = MaskedRuns(stage, rows, cross_entropy(stage.gpt, world, run.ce))
        dense = runs.start().cost
        for number in range(counts[-1] + 1):
            if number in counts:
                costs[str(number)] = runs.masked((order.blocks[number - 1],)).cost if number else dense
                advance(data.tokens)
            if number:
                runs.remove((order.blocks[number - 1],))
    return (
        OrderEvaluation(
            perplexities={number: perplexity(cost, data.tokens) for number, cost in costs.items()},
            loss={number: cost / data.tokens for number, cost in costs.items()},
            tokens=data.tokens,
        ),
        world,
    )


def check_eval_output(path: Path) -> None:
    """Refuses, before any long work, an output that cannot be written, or that would replace something else.

    Raises:
        UserError: see `check_result_file`.
    """
    check_result_file(path, OrderEvaluation.model_fields, "a result of `fusemega prune eval`")
