"""`fusemega show`: what is drawn is what a run would use, and what cannot be shown is refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from megatron.core.parallel_state import RankGenerator

from fusemega import cli
from fusemega.align.make_map import exact_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.config import validate
from fusemega.fusion.targets import Targets
from fusemega.fusion.teacher_store import TeacherStore
from fusemega.inspect.layout import place_of
from fusemega.inspect.rows import Rows, token_text
from fusemega.inspect.teacher import _why_nothing
from fusemega.runtime.layout import ParallelConfig
from fusemega.scoring.teach import TeachRun, teach
from fusemega.store import Store
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Runs `fusemega show ...`; status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(["show", *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def run_file(make_run: MakeRun, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(make_run().model_dump(mode="json", exclude_none=True)))
    return path


@pytest.fixture
def rows(make_run: MakeRun) -> Rows:
    return Rows.of(make_run())


def test_a_row_token_by_token(show: Show, run_file: Path, rows: Rows) -> None:
    status, out, _ = show("data", run_file, "--row", 3, "--tokens")
    assert status == 0
    samples = [sample for sample in rows.dataset if sample.source.endswith("chat.jsonl:3")]
    assert len(samples) == 2 and all(sample.key.hex() in out for sample in samples)
    lines = [line.split("|") for line in out.splitlines() if re.match(r"\s*\d+\s+\d+\s+\|", line)]
    ids = [int(line[0].split()[1]) for line in lines]
    assert ids == np.concatenate([sample.ids for sample in samples]).tolist()
    learnt = [line[-1].split()[0] == "yes" for line in lines]
    assert learnt == np.concatenate([sample.supervised for sample in samples]).tolist()
    ends = [line[-1].split()[-1].replace("-", "-1") for line in lines]
    assert list(map(int, ends)) == np.concatenate([sample.end_bytes for sample in samples]).tolist()
    # What is between the marks is what is learnt, as text.
    shown = "".join(re.findall(r"⟦(.*?)⟧", out.split("position")[0].replace("\n", ""), flags=re.DOTALL))
    text = "".join(token_text(rows.tokenizer, i) for i in samples[0].ids[samples[0].supervised])
    assert shown.replace(" ", "") == text.replace(" ", "")


def test_packing_is_that_of_the_first_update(show: Show, run_file: Path, make_run: MakeRun) -> None:
    status, out, _ = show("data", run_file)
    batches = open_trainer(make_run())[0].data.step(0).micro_batches
    drawn = out[out.index("The first update") :]
    assert status == 0 and len(re.findall(r"^micro-batch \d+:", drawn, flags=re.M)) == len(batches)
    for number, batch in enumerate(batches, start=1):
        head = f"micro-batch {number}: {batch.tokens.numel()} tokens, {len(batch.sources)} samples"
        assert head in drawn
        part = drawn[drawn.index(head) :].partition("\nmicro-batch")[0].replace("\n", "").replace(" ", "")
        for source, start, end in zip(batch.sources, batch.bounds, batch.bounds[1:], strict=False):
            assert f"{source}{end - start}(" in part


def test_groups(show: Show, make_run: MakeRun, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n} + 1 = ", "chosen": f"{n + 1}.", "rejected": "I do not know."} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = make_run(data={"path": str(tmp_path / "pairs.jsonl")}, training={"global_batch_size": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_none=True)))
    status, out, err = show("data", tmp_path / "run.yaml", "--row", 2)
    assert status == 0, err
    assert "pairs.jsonl:2, 1 of 2 samples of the row" in out and "1 + 1 = ⟦2.<|im_end|>⟧" in out
    assert "⟦ I do not know.<|im_end|>⟧" in out and "4 samples in 2 groups of 2, 2" in out


def test_layout(show: Show, run_file: Path) -> None:
    sizes = ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2")
    status, out, _ = show("layout", run_file, *(f"parallel.{size}" for size in sizes), "--nproc", 8)
    assert status == 0
    lines = {int(line.split()[0]): line for line in out.splitlines() if re.match(r"\s+\d ", line)}
    assert sorted(lines) == list(range(8))
    assert all(("0-1" in line and "embedding" in line) == (rank < 4) for rank, line in lines.items())
    assert all(("2-3" in line and "head" in line) == (rank >= 4) for rank, line in lines.items())
    samples = [int(re.findall(r"(\d+) samples", lines[rank])[0]) for rank in (0, 2)]  # data-parallel ranks
    assert sum(samples) == 6
    status, _, err = show("layout", run_file, "parallel.pipeline_model_parallel_size=3")
    assert status == 2 and "does not divide this model's 4 layers" in err and err.count("\n") == 1


def test_places_are_megatrons() -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    layout, world_size = ParallelConfig.model_validate(sizes), 24
    megatron = RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    for name in ("tp", "cp", "dp", "pp"):
        for group in megatron.get_ranks(name):
            places = [place_of(layout, world_size, rank) for rank in group]
            assert [getattr(place, f"{name}_rank") for place in places] == list(range(len(group)))


@pytest.fixture
def store(work: Path, tmp_path: Path) -> Path:
    model, data = {"load": str(work / "model"), "dtype": "fp32"}, {"path": str(work / "chat.jsonl"), "seq_length": 128}
    section = {"model": model, "data": {**data, "limit": 3}, "store": str(tmp_path / "store"), "top_k": 4}
    return teach(validate(TeachRun, section, "teach"))


def test_a_teachers_row_beside_the_text(
    show: Show, run_file: Path, store: Path, rows: Rows, work: Path, tmp_path: Path
) -> None:
    vocabulary = Vocabulary.of(rows.tokenizer)
    exact_map(vocabulary, vocabulary).save(tmp_path / "map")
    distill = f"objective={json.dumps({'name': 'distill', 'store': str(store)})}"
    mapped = f"objective={json.dumps({'name': 'distill', 'store': str(store), 'map': str(tmp_path / 'map')})}"
    of_store = (store, "--data", work / "chat.jsonl", "--tokenizer", work / "model")
    for arguments in ((run_file, distill), (run_file, mapped), of_store):
        status, out, err = show("teacher", *arguments, "--row", 1, "--top", 2)
        assert status == 0, err
        sample = rows.dataset[0]
        row = Store.open(store).get(sample.key)
        assert row is not None
        lines = [line for line in out.splitlines() if line.startswith("|")]
        samples = [s for s in rows.dataset if s.source == sample.source]
        assert len(lines) == sum(len(s.positions) for s in samples)
        label, best = sample.ids[sample.positions[0] + 1], row.ids_PK[0, 0]
        assert lines[0].startswith(f"|{token_text(rows.tokenizer, label)}|")
        assert (
            f"|{token_text(rows.tokenizer, best)}|{'*' if best == label else ''} {np.exp(row.logp_PK[0, 0]):.1%}"
            in lines[0]
        )
        # The rows of all samples that have one, not of the row shown alone.
        held = [(s, found) for s in rows.dataset if (found := Store.open(store).get(s.key)) is not None]
        labels = [s.ids[s.positions + 1] for s, _ in held]
        p = [
            np.exp(found.logp_PK)[found.ids_PK == y[:, None]].sum() for (_, found), y in zip(held, labels, strict=True)
        ]
        count = sum(map(len, labels))
        (line,) = re.findall(r"^equal .*$", out, flags=re.M)
        assert line.split()[1:4] == [f"{count:,}", "100.0%", f"{sum(p) / count:.3f}"]
    status, out, _ = show("teacher", run_file, distill, "--row", 20)
    assert status == 0 and "no row in the store" in out


def test_the_label_of_a_cell_is_marked(
    show: Show, run_file: Path, store: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row lists the id that stands for the label's cell, not the label."""
    row = Store.open(store).get(rows.dataset[0].key)
    assert row is not None
    best = int(row.ids_PK[0, 0])
    cell_V = np.full(rows.source.vocab_size, best)
    monkeypatch.setattr(TeacherStore, "cell_V", cell_V)
    objective = f"objective={json.dumps({'name': 'distill', 'store': str(store)})}"
    status, out, err = show("teacher", run_file, objective, "--row", 1)
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("|"))
    assert f"|{token_text(rows.tokenizer, best)}|* " in line and line.count("|*") == 1


@pytest.mark.parametrize(
    ("listed", "kind", "ends", "why"),
    [
        (True, 0, True, "the text ends here"),
        (True, None, True, "the text ends here"),
        (True, 1, False, "consistent: true"),
        (False, 0, False, "has a counterpart"),
        (False, -1, False, "ends at this byte"),
        (False, None, True, "ends at this byte"),
    ],
)
def test_why_a_position_is_taught_nothing(listed: bool, kind: int | None, ends: bool, why: str) -> None:
    ids = np.array([[5 if listed else -1]])
    nothing = Targets.nothing(1, 1)
    kinds = None if kind is None else np.array([kind], np.int8)
    assert why in _why_nothing(replace(nothing, ids_PK=ids, kind_P=kinds), 0, ends)


def test_a_key_finds_its_row(show: Show, run_file: Path, rows: Rows, work: Path) -> None:
    sample = rows.dataset[5]
    for given in (sample.key.hex(), sample.key.hex()[:8]):
        status, out, _ = show("key", given, run_file)
        assert status == 0 and out.split() == [sample.source, sample.key.hex(), "data"]
    status, out, err = show("key", "0123456789abcdef", run_file)
    assert (status, out) == (
        2,
        "",
    ) and f"no sample has a key that begins so (searched: {len(rows.dataset)} of data)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "RUN", "--row", "99"], "--row: no sample is of row 99; the data's rows go from"),
        (["data", "RUN", "--row", "x"], "--row: found 'x'; expected a row's number, or FILE:NUMBER"),
        (["key", "xyz", "RUN"], "xyz: not a sample's key"),
        (["teacher", "RUN"], "objective.name: sft reads no rows in the ids of the model in training"),
        (["teacher", "RUN", "--data", "x"], "a run file names its data and its model"),
        (["teacher", "."], "of a store, --data and --tokenizer are needed"),
        (["data", "RUN", "data.sequence=3"], "data.sequence: unknown key"),
    ],
)
def test_refused(show: Show, run_file: Path, arguments: list[str], message: str) -> None:
    status, out, err = show(*(str(run_file) if each == "RUN" else each for each in arguments))
    assert (status, out) == (2, "") and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_page(show: Show, run_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, out, _ = show("data", run_file, "--html", page)
    text = page.read_text(encoding="utf-8")
    assert (status, out) == (0, "") and text.startswith("<!doctype html>") and text.count("<html") == 1
    assert "<span style=" in text and "The first update" in text and "&lt;|im_start|&gt;" in text
    assert not re.search(r"(src|href)=", text)
    status, _, err = show("data", run_file, "--html", page)
    assert status == 2 and "exists; nothing is overwritten" in err and page.read_text(encoding="utf-8") == text
