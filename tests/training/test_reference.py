"""The reference of a preference loss: stored and in the job are the same, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import tiny
from fusemega.cli.store import app, verify
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.scoring.teach import TeachRun, teach
from fusemega.store import Row, Store, StoreWriter
from fusemega.store.samples import scored_samples
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import open_trainer
from fusemega.training.dry_run import describe
from fusemega.training.run_file import TrainRun
from tests.losses.pairwise import write_groups

MakeRun = Callable[..., TrainRun]


@pytest.fixture(scope="module")
def folder(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """groups.jsonl; another model; and stores: of the model (sums; most probable ids; in bf16) and of the other one."""
    place = tmp_path_factory.mktemp("reference")
    write_groups(place / "groups.jsonl", work / "chat.jsonl")
    tiny.write_model(place / "other", work / "chat.jsonl", seed=5)
    taught(place / "sums", work / "model", place, rows="none")
    taught(place / "top", work / "model", place, top_k=2)
    taught(place / "others", place / "other", place, rows="none")
    return place


def taught(store: Path, model: Path, folder: Path, dtype: str = "fp32", **settings: Any) -> Path:
    data = {"path": str(folder / "groups.jsonl"), "seq_length": 512, **settings.pop("data", {})}
    run = {"model": {"load": str(model), "dtype": dtype}, "data": data, "store": str(store), **settings}
    return teach(validate(TeachRun, run, "teach"))


@pytest.fixture
def referenced(make_run: MakeRun, folder: Path) -> MakeRun:
    """`make_run` for `dpo` with this reference."""

    def make(reference: dict[str, Any], **sections: Any) -> TrainRun:
        data = {"path": str(folder / "groups.jsonl"), "seq_length": 512}
        return make_run(objective={"name": "dpo", "beta": 1.0, "reference": reference}, data=data, **sections)

    return make


def in_job(model: Path, **settings: Any) -> dict[str, Any]:
    return {"in_job": {"load": str(model), "dtype": "fp32"}, **settings}


def two_steps(run: TrainRun) -> list[float]:
    trainer, _ = open_trainer(run)
    rows = [trainer.step() for _ in range(2)]
    return [row[name] for row in rows for name in ("dpo loss", "grad-norm")]


def test_stored_and_in_the_job_are_the_same(referenced: MakeRun, work: Path, folder: Path) -> None:
    wanted = two_steps(referenced(in_job(work / "model")))
    for store in ("sums", "top"):
        found = two_steps(referenced({"store": str(folder / store)}))
        assert found[:2] == pytest.approx(wanted[:2], rel=1e-5)
        assert found == pytest.approx(wanted, rel=1e-4)  # Adam's first update makes rounding visible
    other = two_steps(referenced(in_job(folder / "other", same_model=False)))
    stored = two_steps(referenced({"store": str(folder / "others"), "same_model": False}))
    assert stored == pytest.approx(other, rel=1e-4) and stored != pytest.approx(wanted, rel=1e-2)


def test_a_model_that_is_not_the_reference_is_refused_before_anything_is_written(
    referenced: MakeRun, folder: Path, tmp_path: Path
) -> None:
    for reference in ({"store": str(folder / "others")}, in_job(folder / "other")):
        run = referenced(reference)
        with pytest.raises(
            UserError, match=r"objective.reference: .* allowed 0.0001 in fp32\): .*groups.jsonl:\d+ \(-"
        ) as told:
            open_trainer(run)
        assert "same_model: false" in str(told.value) and str(told.value).count("groups.jsonl:") == 8
        assert not Path(run.output_dir).exists()


def test_a_single_sequence_is_enough_in_fp32_and_the_mean_counts_in_bf16(
    referenced: MakeRun, work: Path, folder: Path, tmp_path: Path
) -> None:
    opened = Store.open(folder / "sums")
    trainer, _ = open_trainer(referenced({"store": str(folder / "sums")}))
    (first, *_), *_ = trainer.data.step(0).samples

    def changed(name: str, by: float, every: bool) -> dict[str, Any]:
        with StoreWriter(tmp_path / name, opened.manifest) as writer:
            for sample in trainer.data.dataset:
                row = opened.get(sample.key)
                assert row is not None
                factor = by if every or sample.key == first.key else 1.0
                sums = row.num_tokens, row.sum_logp * factor, row.num_bytes
                writer.add(sample.key, Row.of_sum(row.ids_hash, *sums))
        return {"store": str(tmp_path / name)}

    with pytest.raises(UserError, match=f"in fp32.: {first.source} "):
        open_trainer(referenced(changed("one", 1 + 2e-4, False)))
    open_trainer(referenced(changed("little", 1 + 5e-5, True)))
    bf16 = {"dtype": "bf16"}
    open_trainer(referenced(changed("more", 1 + 5e-3, True), model=bf16))
    with pytest.raises(UserError, match=r"relative difference 0.0\d+ on average, allowed 0.02 in bf16"):
        open_trainer(referenced(changed("much", 1 + 4e-2, True), model=bf16))


def test_a_run_that_resumes_is_not_compared_and_has_the_same_reference(
    referenced: MakeRun, work: Path, folder: Path, tmp_path: Path
) -> None:
    run = referenced({"store": str(folder / "sums")})
    trainer, _ = open_trainer(run)
    trainer.step()
    trainer.save()
    again = taught(tmp_path / "again", work / "model", folder, rows="none", micro_batch_size=4)
    resumed, _ = open_trainer(referenced({"store": str(again)}))
    assert resumed.iteration == 1
    for reference in ({"store": str(folder / "others")}, in_job(work / "model")):
        with pytest.raises(UserError, match="cannot resume: .* differ in reference"):
            open_trainer(referenced(reference))


def test_samples_that_a_store_lacks_or_has_otherwise(
    referenced: MakeRun, work: Path, folder: Path, tmp_path: Path
) -> None:
    taught(tmp_path / "some", work / "model", folder, rows="none", data={"limit": 3})
    for check in (open_trainer, lambda run: describe(run, 1)):
        with pytest.raises(
            UserError, match=r"groups.jsonl:4: no row in objective.reference.store .*some: it has \d of"
        ):
            check(referenced({"store": str(tmp_path / "some")}))
    opened = Store.open(folder / "sums")
    trainer, _ = open_trainer(referenced({"store": str(folder / "sums")}))
    for name, ids_hash, more in (("ids", bytes(8), 0), ("masks", None, 1)):
        with StoreWriter(tmp_path / name, opened.manifest) as writer:
            for sample in trainer.data.dataset:
                positions = len(sample.positions) + more
                writer.add(sample.key, Row.of_sum(ids_hash or sample.ids_hash, positions, -1.0, 1))
    with pytest.raises(UserError, match="groups.jsonl:1: the row in objective.reference.store .* has other token ids"):
        open_trainer(referenced({"store": str(tmp_path / "ids")}))
    with pytest.raises(UserError, match=r"has \d+ positions, the sample \d+ supervised tokens"):
        open_trainer(referenced({"store": str(tmp_path / "masks")}))
    for field, value in (("tokenizer", "x"), ("template", None), ("mask_policy", "all")):
        with StoreWriter(tmp_path / field, opened.manifest.model_copy(update={field: value})):
            pass
        with pytest.raises(UserError, match=f"the store's {field} is "):
            open_trainer(referenced({"store": str(tmp_path / field)}))
    projected = {"rows": "top_k", "top_k": 2, "projected": {"map": "m"}}
    with StoreWriter(tmp_path / "projected", opened.manifest.model_copy(update=projected)):
        pass
    with pytest.raises(UserError, match="was made by `fusemega project`"):
        open_trainer(referenced({"store": str(tmp_path / "projected")}))


def test_a_store_of_cut_responses_is_verified(work: Path, folder: Path, tmp_path: Path) -> None:
    store = taught(tmp_path / "cut", work / "model", folder, rows="none", data={"max_length": 40})
    asked = ["verify", str(store), "--tokenizer", str(work / "model"), "--data", str(folder / "groups.jsonl")]
    whole = CliRunner().invoke(app, asked)
    assert whole.exit_code == 1 and json.loads(whole.stdout)["missing"] > 0
    cut = CliRunner().invoke(app, [*asked, "--max-length", "40"])
    assert cut.exit_code == 0 and json.loads(cut.stdout)["missing"] == 0
    other_end = CliRunner().invoke(app, [*asked, "--max-length", "40", "--truncation", "keep_end"])
    assert other_end.exit_code == 1 and json.loads(other_end.stdout)["missing"] > 0
    for options, words in (
        ({"max_length": 512}, "max_length 512: no effect beside seq_length 512"),
        ({"truncation": "keep"}, "data: truncation: found .keep."),
    ):
        with pytest.raises(UserError, match=words):
            scored_samples(Store.open(store), asked[-1], Tokenizer.load(str(work / "model")), **options)
    with pytest.raises(UserError, match="--max-length and --truncation say how --data is read"):
        verify(store, max_length=40)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ({}, "objective.reference: give exactly one of store and in_job"),
        ({"store": "a", "in_job": {"load": "b"}}, "objective.reference: give exactly one of store and in_job"),
        (
            {"in_job": {"load": "b", "dtype": "bf16", "fp8": "hybrid"}},
            "objective.reference.in_job: fp8 is for the model",
        ),
        ({"stor": "a"}, "objective.reference.stor: unknown key (did you mean 'store'?)"),
    ],
)
def test_settings(referenced: MakeRun, reference: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as told:
        referenced(reference)
    assert words in str(told.value)
