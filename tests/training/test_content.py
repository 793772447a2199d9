"""What a run is made from is known by its contents: changed under the same path it is refused, or done again.

And `--dry-run` refuses the rows that the run would refuse.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fusemega.align.make_map import exact_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.checkpoint.open_model import weights_hash
from fusemega.errors import UserError
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import open_trainer, train
from fusemega.training.dry_run import describe
from fusemega.training.held_out import HeldOut
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer

MakeRun = Callable[..., TrainRun]


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.load(work / "model")


@pytest.fixture(scope="module")
def samples(work: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    config = DataConfig(path=str(work / "chat.jsonl"), seq_length=128)
    return prepare(config, tokenizer, tmp_path_factory.mktemp("cache"), vocab_size=509)


@pytest.fixture
def store(work: Path, tokenizer: Tokenizer, samples: TokenizedDataset, tmp_path: Path) -> Callable[..., Path]:
    """`store(without=i, logp=x)`: at the same path, rows that list the label alone, of all samples but `i`."""

    def write(without: int | None = None, logp: float = 0.0) -> Path:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        manifest = Manifest(
            weights=weights_hash(str(work / "model")),
            tokenizer=tokenizer.content_hash,
            template=tokenizer.template_hash,
            mask_policy=MASK_POLICY,
            truncation=128,
            temperature=1.0,
            top_k=1,
            vocab_size=509,
        )
        with StoreWriter(tmp_path / "store", manifest) as writer:
            for i, sample in enumerate(samples):
                labels_P1 = sample.ids[sample.positions + 1][:, None].astype(np.int32)
                logp_P1 = np.full(labels_P1.shape, logp, np.float32)
                residual_P = np.full(len(labels_P1), np.log1p(-np.exp(logp)) if logp else -np.inf, np.float32)
                ends_P = sample.end_bytes[sample.positions]
                if i != without:
                    writer.add(sample.key, Row(sample.ids_hash, ends_P, labels_P1, logp_P1, residual_P, -1.0, 1))
        return tmp_path / "store"

    return write


def _map(tokenizer: Tokenizer, path: Path, drop: int | None = None) -> Path:
    """An exact map of the tokenizer onto itself, without one token's counterpart."""
    vocabulary = Vocabulary.of(tokenizer)
    found = exact_map(vocabulary, vocabulary)
    if drop is not None:
        table = found.table_S.copy()
        table[drop] = -1
        found = dataclasses.replace(found, table_S=table)
    found.save(path)
    return path


def test_what_teaches(make_run: MakeRun, store: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = {"store": str(store()), "map": str(_map(tokenizer, tmp_path / "a.map"))}

    def opened(**places: str) -> Trainer:
        objective = {"name": "distill", "on_missing": "skip", **names, **places}
        return open_trainer(make_run(objective=objective, data={"limit": 8}))[0]

    trainer = opened()
    trainer.step()
    trainer.save()
    changes: list[tuple[str, Callable[[], object]]] = [
        ("store", lambda: store(logp=-0.5)),
        ("store", lambda: store(without=3)),
        ("map", lambda: _map(tokenizer, tmp_path / "a.map", drop=300)),
    ]
    for name, change in changes:
        change()
        with pytest.raises(UserError, match=rf"cannot resume: .*they differ in {name}; of files, by their contents"):
            opened()
        store()
    _map(tokenizer, tmp_path / "a.map")
    store(without=42)  # of a sample that is not trained on
    moved = (tmp_path / "store").rename(tmp_path / "elsewhere")
    assert opened(store=str(moved)).iteration == 1


def test_the_teacher_of_a_store(make_run: MakeRun, store: Callable[..., Path], work: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(work / "model", teacher)
    objective = {"name": "distill", "store": str(store())}
    trainer, _ = open_trainer(make_run(objective=objective))
    trainer.step()
    trainer.save()
    run = make_run(objective=objective | {"store_of": str(teacher)})
    assert open_trainer(run)[0].iteration == 1, "that the store is checked changes nothing of the run"
    _nudge(teacher)
    with pytest.raises(
        UserError, match=r"objective.store_of: .*store has rows of weights other than those of .*teacher"
    ):
        open_trainer(run)


def test_the_teacher_in_the_job(make_run: MakeRun, work: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(work / "model", teacher)
    run = make_run(objective={"name": "online_distill", "teacher": {"load": str(teacher), "dtype": "fp32"}})
    trainer, _ = open_trainer(run)
    trainer.step()
    trainer.save()
    _nudge(teacher)
    with pytest.raises(UserError, match="cannot resume: .*they differ in teacher; of files, by their contents"):
        open_trainer(run)


def test_held_out_text_begins_anew(
    make_run: MakeRun, work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    lines = (work / "chat.jsonl").read_text().splitlines()
    held_out.write_text("\n".join(lines[:3]))
    section = {"data": {"path": str(held_out), "seq_length": 128}, "interval": 1}
    assert train(make_run(evaluation=section, training={"train_iters": 1})) == 0
    held_out.write_text("\n".join(lines[3:6]))
    capfd.readouterr()
    trainer, _ = open_trainer(make_run(evaluation=section, training={"train_iters": 1}))
    assert trainer.callback(HeldOut).best.loss is None and trainer.iteration == 1
    assert "iter_0000001 was scored on other held-out text, so its losses are not comparable" in capfd.readouterr().err


def _nudge(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fault", ["a row is missing", "bad data", "bad held-out data", "a folder of something else"])
def test_a_dry_run_refuses_what_the_run_refuses(
    fault: str, make_run: MakeRun, store: Callable[..., Path], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"objective": {"name": "distill", "store": str(store())}}
    assert "43 samples" in describe(make_run(**sections), 1) and not (tmp_path / "run").exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 1}\n')
    if fault == "a row is missing":
        store(without=5)
    elif fault == "bad data":
        sections["data"] = {"path": str(bad)}
    elif fault == "bad held-out data":
        sections["evaluation"] = {"data": {"path": str(bad), "seq_length": 64}, "interval": 1}
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UserError) as of_dry_run:
        describe(make_run(**sections), 1)
    with pytest.raises(UserError) as of_run:
        train(make_run(**sections))
    assert str(of_dry_run.value) == str(of_run.value)
    words = {"a row": "no row in the store", "bad": "bad.jsonl:1: ", "a folder": "not the folder of a training run"}
    assert next(found for start, found in words.items() if fault.startswith(start)) in str(of_run.value)
