"""`fusemega prune search`: which blocks of a model to remove, in which order."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.results_journal import ResultsJournal, check_no_output, results_journal
from fusemega.passes.progress import progress
from fusemega.prune.calibration import Calibration, calibration
from fusemega.prune.constraint import check_count
from fusemega.prune.costs import cross_entropy, perplexity
from fusemega.prune.masked_runs import Found, MaskedRuns
from fusemega.prune.measures.js_divergence import js_divergence
from fusemega.prune.measures.rank import ranked
from fusemega.prune.order import ModelIdentity, Order, Removal, ResidualBlock, Step, blocks_of, read_order
from fusemega.prune.outputs import write_outputs
from fusemega.prune.rounds import Round, Rounds
from fusemega.prune.run_file import SEARCHED, PruneRun
from fusemega.prune.stage import StageBlocks
from fusemega.runtime.console import say
from fusemega.runtime.parallel import World, initialize
from fusemega.runtime.together import on_main

_JOURNAL = 2  # the form of a round's record; 1 had a single block


class Compared(BaseModel):
    """How an order differs from another one.

    Attributes:
        same_first: how many of the first removals are the same, in order.
        same_blocks: how many of the removed blocks are the same, of `blocks`.
        blocks: removals that both orders have.
        perplexity, its_perplexity: after these; None: not measured.
    """

    model_config = ConfigDict(frozen=True)

    same_first: int
    same_blocks: int
    blocks: int
    perplexity: float | None
    its_perplexity: float | None


class Work(BaseModel):
    """What this call has run, beside what a plain search of the same rounds runs: the whole model for each candidate.

    Attributes:
        candidates, plain_candidates: blocks that were masked and measured.
        block_runs, plain_block_runs: blocks run for a micro-batch, on all replicas.
        head_runs: vocabulary heads run for a micro-batch, on all replicas.
        cached_mib: the most that a rank kept of blocks' inputs.
    """

    model_config = ConfigDict(frozen=True)

    candidates: int
    plain_candidates: int
    block_runs: int
    plain_block_runs: int
    head_runs: int
    cached_mib: float


class Pruned(BaseModel):
    """What a search found.

    Attributes:
        order: the removed blocks, in order.
        dense_perplexity: of the whole model on the calibration data.
        perplexities: after each removal.
        tokens: predicted tokens of the calibration data.
        seconds: that this call took to search, without opening the model.
        work: what was run.
        compared: with the order of the run file's `compare`.
    """

    model_config = ConfigDict(frozen=True)

    order: list[str]
    dense_perplexity: float
    perplexities: list[float]
    tokens: int
    seconds: float
    work: Work
    compared: Compared | None = None


def search(run: PruneRun) -> tuple[Pruned, World]:
    """Search `run.model` and write `run.output`. Collective; every rank gets the result.

    Raises:
        UserError: bad input, or an output that is there, before anything is allocated.
    """
    source = run.open()
    blocks = blocks_of(source.architecture)
    check_count(blocks, run.blocks, run.type, run.constraint, run.model.load)
    if run.whole_layers and not source.architecture.complete:
        raise UserError(f"measure: {run.measure} ranks whole layers, and {run.model.load} lacks blocks of some")
    other = None if run.compare is None else read_order(run.compare)
    output = Path(run.output)
    world = initialize(run.parallel)
    on_main(world, lambda: check_no_output(output))
    weights = world.from_main(source.weights_hash() if world.is_main else "")
    if other is not None:
        other.check_model(source.architecture, weights, run.model.load)
    shape = run.row_shape(source)
    cache = cache_folder() / "data"
    data = calibration(run.data, run.windows, run.samples, run.seed, source, shape, world, cache)
    settings = _settings(run, data)
    precision = run.model.model_dump(mode="json", exclude={"load", "trust_remote_code"})
    identity = {
        "journal": _JOURNAL,
        "weights": weights,
        "tokenizer": source.tokenizer.content_hash,
        "precision": precision,
        **settings,
    }
    with ExitStack() as held:
        journals: list[ResultsJournal] = []
        on_main(world, lambda: journals.append(held.enter_context(results_journal(output, identity))))
        call = _Call(run, source, data, journals[0] if journals else None, world)
        begun = time.monotonic()
        order, dense, perplexities, rounds = call.find()
        found = Order(
            steps=tuple(Step(block, value) for block, value in zip(order, perplexities, strict=True)),
            type=run.type,
            dense_perplexity=dense,
            measure=run.measure,
            settings=settings,
            model=ModelIdentity.of(source.architecture, weights),
            source=str(output / "order.json"),
        )
        result = Pruned(
            order=[str(block) for block in order],
            dense_perplexity=dense,
            perplexities=perplexities,
            tokens=data.tokens,
            seconds=round(time.monotonic() - begun, 3),
            work=call.work(),
            compared=None if other is None else _compared(found, other),
        )
        if world.is_main:
            _tell(result)

        def publish() -> None:
            write_outputs(journals[0].out, found, rounds, source.architecture, source.dtypes(), data.tokens)
            held.close()

        on_main(world, publish)
    return result, world


def _settings(run: PruneRun, data: Calibration) -> dict[str, Any]:
    """What the order depends on, besides the weights and the tokenizer."""
    return {
        "type": run.type,
        "blocks": run.blocks,
        "constraint": run.constraint,
        "measure": run.measure,
        "search": run.search.model_dump(mode="json") if run.measure in SEARCHED else None,
        "granularity": ("layer" if run.whole_layers else "block") if run.measure not in SEARCHED else None,
        "data": data.content_hash,
        "tokens": data.tokens,
        "windows": run.windows,
        "seq_length": run.data.seq_length,
        "micro_batch_size": run.micro_batch_size,
        "samples": run.samples,
        "seed": run.seed,
        "ce": run.ce,
        "dtype": run.model.dtype,
    }


class _Call:
    """One call's search: the journal is read and continued."""

    def __init__(
        self, run: PruneRun, source: ModelSource, data: Calibration, journal: ResultsJournal | None, world: World
    ) -> None:
        self._run, self._data, self._world, self._journal = run, data, world, journal
        self._known: Mapping[str, list[Any]] = world.from_main({} if journal is None else dict(journal.found))
        gpt = source.build(world)
        self._stage = StageBlocks(gpt, world)
        self._rows = self._stage.rows(data.batches)
        self._candidates = self._plain_candidates = self._plain_blocks = self._head_rows = 0
        self._cached = 0

    def find(self) -> tuple[list[ResidualBlock], float, list[float], list[Round]]:
        """The order, the whole model's perplexity, that after each removal, and the search's rounds, if it had any."""
        gpt, world, run = self._stage.gpt, self._world, self._run
        tokens = self._data.tokens
        ce = cross_entropy(gpt, world, run.ce)
        rounds: list[Round] = []
        if run.measure == "perplexity":
            dense, rounds = self._searched(MaskedRuns(self._stage, self._rows, ce, self._cache_bytes()), "round")
            values = [perplexity(cost, tokens) for each in rounds for cost in each.costs]
            return _order_of(rounds), perplexity(dense, tokens), values, rounds
        if run.measure == "js_divergence":
            by_js = js_divergence(gpt, world)
            _, rounds = self._searched(MaskedRuns(self._stage, self._rows, by_js, self._cache_bytes()), "round")
            order = _order_of(rounds)
        else:
            order = self._ranked()
        dense, costs = self._costs(order, MaskedRuns(self._stage, self._rows, ce, self._cache_bytes()))
        return order, perplexity(dense, tokens), [perplexity(cost, tokens) for cost in costs], rounds

    def work(self) -> Work:
        """Of all ranks."""
        world = self._world
        counts = world.tp_rank == 0 and world.cp_rank == 0  # the others share these runs
        parts = world.from_all(
            (self._stage.blocks_run, self._head_rows, self._cached) if counts else (0, 0, self._cached)
        )
        return Work(
            candidates=self._candidates,
            plain_candidates=self._plain_candidates,
            block_runs=sum(part[0] for part in parts),
            plain_block_runs=self._plain_blocks,
            head_runs=sum(part[1] for part in parts),
            cached_mib=round(max(part[2] for part in parts) / 2**20, 3),
        )

    def _cache_bytes(self) -> int | None:
        return None if self._run.cache_mib is None else self._run.cache_mib << 20

    def _searched(self, runs: MaskedRuns, name: str) -> tuple[float, list[Round]]:
        run, world = self._run, self._world
        begun = time.monotonic()
        dense = runs.start().cost
        if world.is_main and run.measure == "perplexity":
            say(f"perplexity of the whole model: {perplexity(dense, self._data.tokens):.4f}")
        number = len(self._rows)
        planned = self._planned(len(runs.kept)) * self._data.tokens
        with progress("searching", planned) as advance:
            search = Rounds(
                *(runs, number, dense, run.search, run.type, run.constraint, run.blocks, world),
                advance=lambda rows: advance(rows * self._data.tokens // number),
            )
            rounds = [_round_of(self._known[key]) for key in self._keys(name)]
            for done in rounds:
                search.again(done)
            if rounds and world.is_main:
                say(f"{len(_order_of(rounds))} of {run.blocks} blocks are removed already")
            for found in search.run():
                self._record(f"{name} {len(rounds) + 1}", _record_of(found))
                rounds.append(found)
                self._cached = max(self._cached, runs.cached_bytes)
                if world.is_main:
                    self._tell_round(rounds, begun)
        self._candidates, self._plain_candidates = search.evaluations, search.plain_evaluations
        self._plain_blocks = search.plain_blocks
        self._head_rows += runs.head_rows
        return dense, rounds

    def _tell_round(self, rounds: Sequence[Round], begun: float) -> None:
        found = rounds[-1]
        value = f"perplexity {perplexity(found.cost, self._data.tokens):.4f}"
        if self._run.measure == "js_divergence":
            value = f"divergence {found.cost / self._data.tokens:.5f}"
        removed = " and ".join(str(block) for block in found.removed)
        say(
            f"removed {removed} ({len(_order_of(rounds))} of {self._run.blocks}), {value}, "
            f"{len(found.candidates)} removals measured, {time.monotonic() - begun:.0f} s so far"
        )

    def _ranked(self) -> list[ResidualBlock]:
        if "ranking" in self._known:
            return list(_removal(self._known["ranking"]))
        order = ranked(self._run, self._stage, self._rows)
        self._record("ranking", [block.words for block in order])
        return order

    def _costs(self, order: Sequence[ResidualBlock], runs: MaskedRuns) -> tuple[float, list[float]]:
        """The whole model's cost, and that after each removal."""
        dense, costs = runs.start().cost, []
        for number, block in enumerate(order, start=1):
            key = f"cost {number}"
            if key not in self._known:
                self._record(key, [runs.masked((block,)).cost])
            costs.append(float(self._known[key][0]))
            runs.remove((block,))
        self._head_rows += runs.head_rows
        return dense, costs

    def _planned(self, blocks: int) -> int:
        """About how many candidates this replica will run."""
        run = self._run
        if run.type != "mix":
            blocks //= 2
        at_once = 2 if run.constraint == "plain" else 1
        each = [blocks + 1 - at_once - n for n in range(0, run.blocks, at_once)]
        if run.search.name == "top_m":
            each = [each[0], *(min(n, run.search.m) for n in each[1:])]  # type: ignore[attr-defined]
        return sum(math.ceil(n / self._world.dp_size) for n in each)

    def _keys(self, name: str) -> list[str]:
        keys = [f"{name} {n}" for n in range(1, self._run.blocks + 1)]
        return [key for key in keys if key in self._known]

    def _record(self, key: str, value: list[Any]) -> None:
        self._known = {**self._known, key: value}
        if self._journal is not None:
            self._journal.record({key: value})


def _order_of(rounds: Sequence[Round]) -> list[ResidualBlock]:
    return [block for each in rounds for block in each.removed]


def _record_of(found: Round) -> list[Any]:
    candidates = [
        [[block.words for block in removal], each.cost, each.rows] for removal, each in found.candidates.items()
    ]
    return [[block.words for block in found.removed], list(found.costs), candidates]


def _round_of(record: Sequence[Any]) -> Round:
    removed, costs, candidates = record
    found = {_removal(words): Found(cost, rows) for words, cost, rows in candidates}
    return Round(_removal(removed), tuple(costs), found)


def _removal(words: Sequence[Sequence[Any]]) -> Removal:
    return tuple(ResidualBlock(kind, layer) for kind, layer in words)


def _compared(order: Order, other: Order) -> Compared:
    number = min(len(order), len(other))
    own, its = order.blocks[:number], other.blocks[:number]
    same = next((i for i, (a, b) in enumerate(zip(own, its, strict=True)) if a != b), number)
    return Compared(
        same_first=same,
        same_blocks=len(set(own) & set(its)),
        blocks=number,
        perplexity=order.steps[number - 1].perplexity if number else order.dense_perplexity,
        its_perplexity=other.steps[number - 1].perplexity if number else other.dense_perplexity,
    )


def _tell(result: Pruned) -> None:
    compared = result.compared
    if compared is not None:
        its = "not known" if compared.its_perplexity is None else f"{compared.its_perplexity:.4f}"
        say(
            f"beside the other order: the first {compared.same_first} of {compared.blocks} removals are the same, "
            f"{compared.same_blocks} of the blocks; perplexity {compared.perplexity:.4f}, the other's {its}"
        )
