"""The search: order and every candidate's perplexity are those of a plain loop on transformers; savings change neither;
a killed search goes on to the same result; each setting acts."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fusemega.errors import UserError
from fusemega.fixtures import data as assets
from fusemega.hf.cut_layers import cut_layers
from fusemega.prune.order import ResidualBlock, read_order
from fusemega.prune.run_file import PruneRun
from fusemega.prune.search import Pruned, search
from fusemega.runtime.parallel import ParallelConfig, initialize
from tests.prune.plain import Plain

Make = Callable[..., PruneRun]
FULL_RUNS = {"search": {"name": "exact", "early_stop": False}}


def found(run: PruneRun) -> Pruned:
    return search(run)[0]


def rounds_of(run: PruneRun) -> list[dict[tuple[str, int], tuple[float, int]]]:
    """Of each round in which single blocks were removed, candidate -> (cost, rows)."""
    lines = (Path(run.output) / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line)["candidates"] for line in lines]
    return [{tuple(block): (c["cost"], c["rows"]) for c in each for (block,) in [c["blocks"]]} for each in rounds]


@pytest.fixture(scope="module")
def plain(work: Path) -> Plain:
    return Plain(work / "model", work / "texts.jsonl", limit=8, length=40)


@pytest.fixture(scope="module")
def searched(plain: Plain) -> tuple[list[Any], list[Any]]:
    return plain.search(3)


def test_real_weights_as_on_transformers(tmp_path: Path, make_run: Make, smollm2_folder: Path) -> None:
    texts = assets.domain_data("encyclopedia").train
    cut = tmp_path / "six"
    cut_layers(smollm2_folder, cut, range(3, 27), initialize(ParallelConfig()))
    plain = Plain(cut, texts, limit=1, length=64)
    order, rounds = plain.search(2)
    changes: dict[str, Any] = {"data": {"path": str(texts), "seq_length": 64, "limit": 1}, "blocks": 2}
    run = make_run(model={"load": str(cut)}, **changes, **FULL_RUNS)
    result = found(run)
    assert result.order == [f"{kind} {layer}" for kind, layer in order]
    for mine, theirs in zip(rounds_of(run), rounds, strict=True):
        measured = {block: math.exp(cost / result.tokens) for block, (cost, _) in mine.items()}
        assert measured == pytest.approx(theirs, rel=1e-4)


def test_every_candidate_as_on_transformers(make_run: Make, plain: Plain, searched: Any) -> None:
    order, rounds = searched
    run = make_run(**FULL_RUNS)
    result = found(run)
    assert result.order == [f"{kind} {layer}" for kind, layer in order]
    assert result.dense_perplexity == pytest.approx(plain.perplexity([]), rel=1e-4)
    for mine, theirs in zip(rounds_of(run), rounds, strict=True):
        assert {block: math.exp(cost / result.tokens) for block, (cost, _) in mine.items()} == pytest.approx(
            theirs, rel=1e-4
        )
    output = Path(run.output)
    written = read_order(output / "order.json")
    assert [str(block) for block in written.blocks] == result.order
    assert [step.perplexity for step in written.steps] == result.perplexities
    assert written.model is not None and written.model.layers == 4 and written.settings["tokens"] == result.tokens
    assert read_order(output / "authors.json").blocks == written.blocks
    page = (output / "report.html").read_text(encoding="utf-8")
    assert f"{result.perplexities[-1]:.4f}" in page and '<td class="gone">3</td>' in page
    assert {path.name for path in output.iterdir()} >= {"rounds.jsonl", "perplexity.png"}
    work = result.work
    assert (work.candidates, work.plain_candidates) == (8 + 7 + 6,) * 2
    windows = len(plain.windows)
    assert work.head_runs == windows * (1 + 8 + 7 + 6) and work.plain_block_runs == windows * (8 * 7 + 7 * 6 + 6 * 5)
    assert work.block_runs < 0.65 * work.plain_block_runs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 3},
        {"cache_mib": 0, **FULL_RUNS},
        {"search": {"name": "top_m", "m": 8}},
        {"search": {"name": "racing", "first_share": 1.0}},
    ],
)
def test_what_saves_work_changes_nothing(make_run: Make, searched: Any, changes: dict[str, Any]) -> None:
    order, rounds = searched
    result = found(make_run(**changes))
    assert result.order == [f"{kind} {layer}" for kind, layer in order]
    best = [rounds[n][block] for n, block in enumerate(order)]
    assert result.perplexities == pytest.approx(best, rel=1e-4)
    if "cache_mib" in changes:
        whole = found(make_run(**FULL_RUNS)).work
        assert result.work.cached_mib < 0.3 * whole.cached_mib and result.work.block_runs > whole.block_runs


def test_runs_that_cannot_win_end_early(make_run: Make) -> None:
    short: dict[str, Any] = {"data": {"seq_length": 5, "limit": 6}, "blocks": 2}
    early, whole = make_run(**short), make_run(**short, **FULL_RUNS)
    results = found(early), found(whole)
    assert results[0].order == results[1].order and results[0].perplexities == results[1].perplexities
    rows = [rows for each in rounds_of(early) for _, rows in each.values()]
    assert min(rows) < max(rows) and results[0].work.head_runs < results[1].work.head_runs


def test_fast_searches_measure_less_and_say_how_they_differ(make_run: Make, capfd: pytest.CaptureFixture[str]) -> None:
    exact = make_run(**FULL_RUNS)
    whole = found(exact)
    compare = str(Path(exact.output) / "order.json")
    top = found(make_run(search={"name": "top_m", "m": 2}, compare=compare))
    assert (top.work.candidates, top.work.plain_candidates) == (8 + 2 + 2, 8 + 7 + 6)
    assert top.compared is not None and top.compared.its_perplexity == whole.perplexities[-1]
    assert top.compared.perplexity == top.perplexities[-1] and top.compared.blocks == 3
    assert "beside the other order: the first" in capfd.readouterr().err
    race = make_run(search={"name": "racing", "first_share": 0.25, "keep": 0.5})
    assert found(race).work.head_runs < 0.7 * whole.work.head_runs
    rows = sorted({rows for _, rows in rounds_of(race)[0].values()})
    assert len(rows) > 1 and rows[-1] == max(rows for _, rows in rounds_of(exact)[0].values())


def test_types(make_run: Make) -> None:
    for kind in ("mha", "mlp"):
        assert {name.split()[0] for name in found(make_run(type=kind)).order} == {kind}


def test_neighbours_are_removed_together_for_an_ordinary_model(make_run: Make, plain: Plain) -> None:
    run = make_run(blocks=4, constraint="plain", **FULL_RUNS)
    result = found(run)
    kept, removed, perplexities = sorted_blocks(4), [], []
    for _ in range(2):
        pairs = [[(block.kind, block.layer) for block in pair] for pair in pairwise(kept)]
        values = [plain.perplexity([*removed, *pair]) for pair in pairs]
        best = values.index(min(values))
        perplexities += [plain.perplexity([*removed, pairs[best][0]]), values[best]]
        removed += pairs[best]
        kept = [block for block in kept if (block.kind, block.layer) not in removed]
    assert result.order == [f"{kind} {layer}" for kind, layer in removed]
    assert result.perplexities == pytest.approx(perplexities, rel=1e-4)
    work = result.work
    assert (work.candidates, work.plain_candidates) == (7 + 5,) * 2 and work.head_runs == len(plain.windows) * 15
    assert found(make_run(blocks=4, constraint="plain")).order == result.order
    assert found(make_run(blocks=4, constraint="plain", search={"name": "top_m", "m": 7})).order == result.order


def sorted_blocks(layers: int) -> list[ResidualBlock]:
    both = [ResidualBlock(kind, layer) for layer in range(layers) for kind in ("mha", "mlp")]  # type: ignore[arg-type]
    return sorted(both, key=lambda block: block.place)


def test_the_data(make_run: Make, work: Path, plain: Plain) -> None:
    drawn = found(make_run(samples=4, blocks=1))
    assert drawn.tokens < found(make_run(blocks=1)).tokens
    assert drawn.dense_perplexity != found(make_run(samples=4, seed=1, blocks=1)).dense_perplexity
    rows = found(make_run(windows="rows", data={"path": str(work / "chat.jsonl"), "seq_length": 64}, blocks=1))
    assert rows.tokens > 0
    rounded = found(make_run(ce="bf16_reference", blocks=1)).dense_perplexity
    logits_NV = plain.logits([])
    labels = torch.cat([window[0, 1:] for window in plain.windows])
    hidden: list[torch.Tensor] = []
    hook = plain.model.model.norm.register_forward_hook(lambda _, __, out: hidden.append(out[0, :-1]))
    plain.logits([])
    hook.remove()
    weight = plain.model.lm_head.weight.bfloat16()
    losses = torch.nn.functional.cross_entropy(torch.cat(hidden).bfloat16() @ weight.T, labels, reduction="none")
    assert rounded == pytest.approx(math.exp(losses.double().mean()), rel=2e-3)
    exact = math.exp(torch.nn.functional.cross_entropy(logits_NV, labels))
    assert rounded != pytest.approx(exact, rel=1e-6)


KILLED = """
import os, signal, sys
from fusemega.config import load
from fusemega.files.results_journal import ResultsJournal
from fusemega.prune.run_file import PruneRun
from fusemega.prune.search import search
record = ResultsJournal.record
def dying(self, found):
    if "round 3" in found:
        self._file.write('{"round 3": [["mh')  # a torn line, as a kill in the middle of a write leaves it
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, found)
ResultsJournal.record = dying
search(load(PruneRun, sys.argv[1]))
"""


def test_killed_and_resumed(
    make_run: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(blocks=4)
    wanted = found(whole)
    run = make_run(blocks=4)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path(run.output).exists()
    with pytest.raises(UserError, match=r"begun with another model or settings \(seed differ"):
        search(run.model_copy(update={"seed": 7}))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"begun with .* \(journal differ"):
        patch.setattr("fusemega.prune.search._JOURNAL", 1)
        search(run)
    capfd.readouterr()
    result = found(run)
    assert "2 of 4 blocks are removed already" in capfd.readouterr().err
    assert (result.order, result.perplexities) == (wanted.order, wanted.perplexities)
    files = ("order.json", "rounds.jsonl", "authors.json")
    assert [(Path(run.output) / f).read_text() for f in files] == [(Path(whole.output) / f).read_text() for f in files]
    with pytest.raises(UserError, match="exists; nothing is overwritten"):
        search(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": 8}, "blocks: 8, and .*model has 8 blocks; allowed: 1 to 7"),
        ({"blocks": 5, "type": "mha"}, "has 4 attention blocks; allowed: 1 to 4"),
        ({"constraint": "plain"}, "3 of the 8 blocks of .* cannot be removed with constraint: plain"),
        ({"data": {"seq_length": 4000}}, "too few for one window of data.seq_length 4000"),
        ({"samples": 9}, "samples: 9, and .* has 8 rows; allowed: 1 to 8"),
        ({"data": {"path": "chat"}}, r"chat.jsonl:1: windows: joined takes rows of text; .* use windows: rows"),
        ({"compare": "missing.json"}, "missing.json"),
    ],
)
def test_refused_before_anything_is_written(make_run: Make, work: Path, changes: dict[str, Any], said: str) -> None:
    if changes.get("data") == {"path": "chat"}:
        changes = {"data": {"path": str(work / "chat.jsonl")}}
    run = make_run(**changes)
    with pytest.raises(UserError, match=said):
        search(run)
    assert list(Path(run.output).parent.glob(".out*")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"name": "top"}}, r"search.name: unknown name 'top' \(did you mean 'top_m'\?\)"),
        ({"search": {"m": 3}}, "search.m: unknown key"),
        ({"search": {"name": "racing", "keep": 1.0}}, "search.keep"),
        ({"constraint": "plain", "type": "mha"}, "constraint: plain needs type: mix"),
        ({"measure": "random", "search": {"name": "top_m", "m": 1}}, "search: no effect with measure: random"),
        ({"measure": "random", "constraint": "plain"}, "constraint: no effect with measure: random"),
        ({"granularity": "block"}, "granularity: no effect with measure: perplexity"),
        ({"measure": "block_influence"}, "ranks whole layers: type must be mix and blocks even"),
        ({"measure": "angular_distance"}, "ranks whole layers"),
        ({"measure": "perplexty"}, r"did you mean 'perplexity'\?"),
        ({"data": {"truncation": "drop"}}, "data.truncation: no effect with windows: joined"),
        ({"model": {"fp8": "hybrid", "dtype": "bf16"}, "data": {"seq_length": 48}}, "model.fp8: not supported here"),
        (
            {"parallel": {"tensor_model_parallel_size": 2}, "ce": "bf16_reference"},
            "ce: bf16_reference needs parallel.tensor_model_parallel_size 1",
        ),
        (
            {"parallel": {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}},
            "virtual_pipeline_model_parallel_size: not supported here",
        ),
    ],
)
def test_refused_run_files(make_run: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_run(**changes)
