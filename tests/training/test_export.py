"""`hf/` is the weights that a run ended with: of this run, of the right iteration, from fp32, in the type asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusemega.checkpoint.open_model import ModelSource
from fusemega.config import validate
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.proof import check_written
from fusemega.hf.rounding import unchanged
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import initialize
from fusemega.scoring.evaluate import EvalRun, evaluate
from fusemega.scoring.evaluation import Evaluation
from fusemega.training import held_out as held_out_module
from fusemega.training.assembly import open_trainer, train
from fusemega.training.export import RECORD
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]
EMBEDDING = "model.embed_tokens.weight"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("sharded", [True, False])
def test_of_the_fp32_main_parameters(make_run: MakeRun, work: Path, tmp_path: Path, sharded: bool) -> None:
    """An update of 1e-5 is below bf16's spacing at most weights: in fp32 it is there, and rounded it is not."""
    run = make_run(
        model={"dtype": "bf16"},
        optimizer={"lr": 1e-5, "weight_decay": 0.0, "use_distributed_optimizer": sharded},
        training={"train_iters": 2, "save_interval": 1, "export_hf": True, "export_dtype": "fp32"},
    )
    assert train(run) == 0
    output = tmp_path / "run"
    exported, before = weights(output / "hf")[EMBEDDING], weights(work / "model")[EMBEDDING].bfloat16().float()
    moved = (exported - before).abs()
    assert exported.dtype == torch.float32 and 0 < moved.max() < 3e-5
    assert (exported.bfloat16().float() == before).float().mean() > 0.5 > (moved == 0).float().mean()
    # The same from the checkpoint by hand; another iteration; another type.
    export_megatron(output, tmp_path / "newest", dtype=torch.float32)
    assert torch.equal(weights(tmp_path / "newest")[EMBEDDING], exported)
    export_megatron(output / "checkpoints", tmp_path / "first", iteration=1, dtype=torch.bfloat16)
    assert weights(tmp_path / "first")[EMBEDDING].dtype == torch.bfloat16
    with pytest.raises(UserError, match="no checkpoint of iteration 7; there are: 1, 2$"):
        export_megatron(output, tmp_path / "none", iteration=7)
    # And as a model, in fp32: what `eval` and `teach` score.
    world = initialize(ParallelConfig())
    config = make_run(model={"load": str(output), "dtype": "fp32"}).model
    loaded = ModelSource(config, ParallelConfig(), 1).build(world)
    assert torch.equal(loaded.head.weight[: loaded.vocab_size], exported)


@pytest.mark.parametrize(("lr", "dtype", "told"), [(1e-6, "bf16", True), (1e-6, "fp32", False), (1e-2, "bf16", False)])
def test_an_update_that_rounding_takes_back_is_said(
    make_run: MakeRun, work: Path, tmp_path: Path, lr: float, dtype: str, told: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"train_iters": 1, "export_hf": True, "export_dtype": dtype}
    assert train(make_run(optimizer={"lr": lr, "weight_decay": 0.0}, training=settings)) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "are as before the training" in line]
    assert len(lines) == told and all("training.export_dtype: fp32 keeps what" in line for line in lines)
    # All matrices of all layers, counted by hand.
    before, after = weights(work / "model"), weights(tmp_path / "run" / "hf")
    names = [name for name, value in after.items() if ".layers." in name and value.ndim == 2]
    found = unchanged(HFFolder(work / "model"), HFFolder(tmp_path / "run" / "hf"))
    assert (found is None) == (dtype == "fp32")
    if found is not None:
        equal = torch.cat([(after[name] == before[name].bfloat16()).flatten() for name in names])
        assert found == pytest.approx(equal.float().mean().item(), abs=1e-6)


def test_by_hand_it_stops_where_the_run_taught_it(make_run: MakeRun, work: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(work / "model", model)
    for name in ("config.json", "generation_config.json"):  # as of a base model, which knows no turns
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | {"eos_token_id": 5}))
    closing = json.loads((work / "model" / "config.json").read_text())["eos_token_id"]
    assert train(make_run(model={"load": str(model)}, training={"train_iters": 1, "export_hf": True})) == 0
    export_megatron(tmp_path / "run", tmp_path / "by hand")
    for folder in (tmp_path / "run" / "hf", tmp_path / "by hand"):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text())["eos_token_id"] == [5, closing]
        check_written(HFFolder(folder))


def test_another_run_in_the_same_folder(make_run: MakeRun, tmp_path: Path, work: Path) -> None:
    output, settings = tmp_path / "run", {"train_iters": 1, "export_hf": True}
    assert train(make_run(training=settings)) == 0
    old = weights(output / "hf")[EMBEDDING]
    record = (output / "hf" / RECORD).stat().st_mtime_ns
    assert train(make_run(training=settings)) == 0
    assert (output / "hf" / RECORD).stat().st_mtime_ns == record, "the same is not made again"
    assert train(make_run(training={**settings, "export_dtype": "bf16"})) == 0
    assert weights(output / "hf")[EMBEDDING].dtype == torch.bfloat16
    (output / "done").unlink()  # killed between the export and the mark
    assert train(make_run(training=settings)) == 0 and (output / "done").read_text() == "1\n"
    shutil.rmtree(output / "checkpoints")
    other = make_run(training={**settings, "train_iters": 2}, optimizer={"lr": 1e-2})
    open_trainer(other)
    assert not (output / "done").exists(), "it is not done while it trains"
    assert train(other) == 0
    assert not torch.equal(weights(output / "hf")[EMBEDDING], old)
    assert json.loads((output / "hf" / RECORD).read_text())["iteration"] == 2
    silent = make_run(training={**settings, "train_iters": 2, "export_hf": False}, optimizer={"lr": 1e-2})
    assert train(silent) == 0 and (output / "hf" / RECORD).exists(), "it is of the same weights"
    record_file, notes = output / "hf" / RECORD, output / "hf" / "notes.txt"
    record_file.write_text(record_file.read_text().replace('"weights": "', '"weights": "0'))
    notes.write_text("precious")
    for run in (silent, other):
        with pytest.raises(UserError, match="notes.txt: not a file of the export .* move it away"):
            train(run)
    notes.unlink()
    (output / "hf.tmp").mkdir()
    (output / "hf.tmp" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"hf\.tmp: exists and was not made by fusemega"):
        train(silent)
    assert (output / "hf" / RECORD).exists() and (output / "hf.tmp" / "notes.txt").read_text() == "precious"
    shutil.rmtree(output / "hf.tmp")
    assert train(silent) == 0 and not (output / "hf").exists(), "it is of other weights"
    assert not (output / "hf.tmp").exists()
    (output / "hf").mkdir()
    with pytest.raises(UserError, match=f"hf: has no {RECORD}, so its weights are unknown"):
        train(other)


def test_no_update_was_any_good(make_run: MakeRun, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([1.0, 2.0, 3.0])
    found = {"perplexity": 1, "bits_per_byte": 1, "tokens": 1, "bytes": 1, "samples": 1}
    monkeypatch.setattr(held_out_module, "evaluate_model", lambda *_: Evaluation(loss=next(left), **found))
    section: dict[str, Any] = {"data": {"path": str(work / "chat.jsonl"), "seq_length": 96}, "interval": 1}
    run = make_run(training={"train_iters": 2, "export_hf": True}, evaluation={**section, "keep_best": True})
    assert train(run) == 0
    before, after = weights(work / "model"), weights(tmp_path / "run" / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("changed", ["model", "data", "the same elsewhere"])
def test_identity_is_content(make_run: MakeRun, work: Path, tmp_path: Path, changed: str) -> None:
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(work / "model", model)
    shutil.copy(work / "chat.jsonl", data)
    run = make_run(model={"load": str(model)}, data={"path": str(data)}, training={"train_iters": 1})
    assert train(run) == 0
    if changed == "model":
        tensors = weights(model)
        tensors[EMBEDDING][0, 0] += 1
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    elif changed == "data":
        text = data.read_text()
        at = text.index('"content": "') + len('"content": "')
        data.write_text(text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :])  # of the same size
    else:
        model, data = model.rename(tmp_path / "moved"), data.rename(tmp_path / "moved.jsonl")
        moved = make_run(model={"load": str(model)}, data={"path": str(data)}, training={"train_iters": 1})
        assert open_trainer(moved)[0].iteration == 1
        return
    with pytest.raises(UserError, match=f"cannot resume: the checkpoint has {changed} = "):
        open_trainer(run)


def test_a_number_too_large_for_the_type(work: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(work / "model", model)
    tensors = weights(model)
    tensors[EMBEDDING][3, 4] = 70000.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    import_hf(model, tmp_path / "megatron")
    with pytest.raises(UserError, match=f"tensor {EMBEDDING}: holds 70000, too large for float16"):
        export_megatron(tmp_path / "megatron", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_eval_of_a_run(make_run: MakeRun, work: Path, tmp_path: Path) -> None:
    assert train(make_run(training={"train_iters": 2, "export_hf": True})) == 0
    data = {"path": str(work / "chat.jsonl"), "seq_length": 96}
    losses = [
        evaluate(validate(EvalRun, {"model": {"load": str(load), "dtype": "fp32"}, "data": data}, "eval"), ExitStack())[
            0
        ].loss
        for load in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "iter_0000002", tmp_path / "run" / "hf")
    ]
    assert losses[0] == losses[1] == losses[2]
