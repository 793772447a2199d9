"""The trainer against transformers and torch: losses, gradients, updates; resume; what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusemega.errors import UserError
from fusemega.scoring.evaluation import Evaluation
from fusemega.training.assembly import open_trainer, train
from fusemega.training.callbacks import Callback
from fusemega.training.dry_run import describe
from fusemega.training.metrics import Metrics
from fusemega.training.records import COSTS, read_metrics
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer

MakeRun = Callable[..., TrainRun]


def opened(run: TrainRun) -> Trainer:
    return open_trainer(run)[0]


def curve(run: TrainRun, steps: int | None = None) -> list[dict[str, float]]:
    trainer = opened(run)
    rows = [trainer.step() for _ in range(steps or trainer.train_iters)]
    return [without_costs(row) for row in rows]


def without_costs(row: dict[str, float]) -> dict[str, float]:
    """A row of metrics without what is never the same twice."""
    return {key: value for key, value in row.items() if key not in COSTS}


def reference_loss(model: Any, trainer: Trainer, iteration: int) -> torch.Tensor:
    """Mean cross-entropy of transformers' model over a step's samples, one unpadded sample at a time."""
    batch = trainer.data.step(iteration)
    total, count = torch.zeros(()), 0
    for sample in (sample for part in batch.samples for sample in part):
        ids = torch.tensor(sample.ids.astype("int64"))
        logp = model(ids[None]).logits[0].log_softmax(-1)
        targets = torch.tensor(sample.positions)
        total = total - logp[targets, ids[targets + 1]].sum()
        count += len(targets)
    return total / count


def test_three_updates_equal_transformers_and_adamw(make_run: MakeRun, work: Path) -> None:
    run = make_run(optimizer={"lr_decay_style": "constant", "lr_warmup_fraction": 0.0, "clip_grad": 0.5})
    trainer = opened(run)
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    # transformers withholds the gradient of the pad token's embedding even where it is also the turn's closing token.
    model.model.embed_tokens.padding_idx = None
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=2e-3
    )
    for iteration in range(3):
        loss = reference_loss(model, trainer, iteration)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        row = trainer.step()
        assert row["lm loss"] == pytest.approx(loss.item(), rel=2e-6)
        assert row["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)


def test_bf16_follows_fp32(make_run: MakeRun) -> None:
    fp32, bf16 = curve(make_run()), curve(make_run(model={"dtype": "bf16"}))
    for a, b in zip(fp32, bf16, strict=True):
        assert b["lm loss"] == pytest.approx(a["lm loss"], rel=5e-3)
        assert b["lm loss"] != a["lm loss"]


CHANGES: list[dict[str, dict[str, Any]]] = [
    {"optimizer": {"lr": 1e-3}},
    {"optimizer": {"min_lr": 1e-3}},
    {"optimizer": {"lr_decay_style": "linear"}},
    {"optimizer": {"lr_decay_style": "constant"}},
    {"optimizer": {"lr_warmup_fraction": 0.5}},
    {"optimizer": {"weight_decay": 0.0}},
    {"optimizer": {"adam_beta1": 0.5}},
    {"optimizer": {"adam_beta2": 0.9}},
    {"optimizer": {"adam_eps": 1e-3}},
    {"optimizer": {"clip_grad": 0.1}},
    {"training": {"global_batch_size": 7}},
    {"training": {"seed": 5}},
    {"data": {"seq_length": 64}},
    {"data": {"limit": 12}},
]


@pytest.fixture(scope="module")
def plain_curve() -> dict[str, list[dict[str, float]]]:
    return {}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: json.dumps(c).translate({ord(x): None for x in '{}"'}))
def test_every_option_changes_the_curve(
    make_run: MakeRun, change: dict[str, dict[str, Any]], plain_curve: dict[str, list[dict[str, float]]]
) -> None:
    base = plain_curve.setdefault("curve", curve(make_run()) if not plain_curve else [])
    assert [row["lm loss"] for row in curve(make_run(**change))] != [row["lm loss"] for row in base]


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"packing": False}},
        {"training": {"micro_batch_size": 3}},
        {"optimizer": {"use_distributed_optimizer": False}},
    ],
)
def test_what_must_not_change_the_curve(make_run: MakeRun, change: dict[str, dict[str, Any]]) -> None:
    for a, b in zip(curve(make_run()), curve(make_run(**change)), strict=True):
        assert b["lm loss"] == pytest.approx(a["lm loss"], rel=1e-6)
        assert b["grad-norm"] == pytest.approx(a["grad-norm"], rel=1e-5)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_run: MakeRun, tmp_path: Path) -> None:
    whole = make_run(output_dir=str(tmp_path / "whole"))
    train(whole)
    broken = make_run(output_dir=str(tmp_path / "broken"), training={"save_interval": 2})
    trainer = opened(broken)
    metrics = trainer.callback(Metrics)
    metrics.on_start(trainer)
    for _ in range(3):
        metrics.on_step_end(trainer, trainer.step())
        if trainer.iteration == 2:
            trainer.save()  # stopped after iteration 3; the checkpoint is of iteration 2
    metrics.on_end(trainer, None)
    torch.manual_seed(99)
    train(broken)
    a, b = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "broken")
    assert [row["iteration"] for row in b] == [1, 2, 3, 4]
    assert [without_costs(row) for row in a] == [without_costs(row) for row in b]


class Recorder(Callback):
    """Notes what it is told; asks for a checkpoint after update 1, and ends the run after update 3."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_start(self, trainer: Trainer) -> None:
        self.events.append(f"start {trainer.iteration}")

    def on_step_begin(self, trainer: Trainer) -> None:
        self.events.append(f"begin {trainer.iteration}")

    def on_step_end(self, trainer: Trainer, values: MutableMapping[str, float]) -> None:
        assert values["lm loss"] > 0
        values["noted"] = 0.5
        self.events.append(f"end {trainer.iteration}")

    def on_evaluate(self, trainer: Trainer, found: Evaluation) -> None:
        self.events.append(f"evaluation {trainer.iteration}")

    def on_save(self, trainer: Trainer, last: bool) -> None:
        self.events.append(f"save {trainer.iteration}{', the last' if last else ''}")

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.events.append(f"over, {error}")

    def wants_save(self, trainer: Trainer) -> bool:
        return trainer.iteration == 1

    def wants_end(self, trainer: Trainer) -> bool:
        return trainer.iteration == 3


def test_what_a_callback_is_told_and_may_ask_for(make_run: MakeRun, work: Path) -> None:
    held_out = {"data": {"path": str(work / "chat.jsonl"), "seq_length": 96}, "interval": 2}
    run = make_run(evaluation=held_out)
    trainer, recorder = opened(run), Recorder()
    trainer.callbacks.insert(0, recorder)  # before the metrics, which write what it adds
    assert trainer.fit() == 0 and trainer.finished
    assert recorder.events == [
        "start 0",
        "evaluation 0",
        "begin 0",
        "end 1",
        "save 1",
        "begin 1",
        "end 2",
        "evaluation 2",
        "begin 2",
        "end 3",
        "save 3, the last",
        "over, None",
    ]
    folder = Path(run.output_dir)
    assert {path.name for path in (folder / "checkpoints").glob("iter_*")} == {"iter_0000001", "iter_0000003"}
    assert [row["noted"] for row in read_metrics(folder)] == [0.5] * 3
    assert opened(run).iteration == 3


def test_callbacks_end_where_a_step_fails(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, recorder = opened(make_run()), Recorder()
    trainer.callbacks.append(recorder)
    monkeypatch.setattr(trainer, "step", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert recorder.events == ["start 0", "begin 0", "over, integer division or modulo by zero"]


def test_resume_refuses_other_settings(make_run: MakeRun) -> None:
    train(make_run(training={"train_iters": 1}))
    with pytest.raises(UserError, match=r"iter_0000001: cannot resume: the checkpoint has optimizer = .*this run"):
        train(make_run(training={"train_iters": 1}, optimizer={"lr": 1e-3}))
    with pytest.raises(UserError, match="cannot resume: the checkpoint has data"):
        train(make_run(training={"train_iters": 1}, data={"limit": 5}))


def test_a_trainer_that_nobody_needs_is_freed_with_its_groups(make_run: MakeRun) -> None:
    """Each layout has 21 groups with three threads each, which wake a hundred times a second."""

    def threads_after_a_step() -> int:
        trainer = opened(make_run())
        trainer.step()
        alive.append(weakref.ref(trainer.ddp[0].module))
        return psutil.Process().num_threads()

    alive: list[weakref.ref[torch.nn.Module]] = []
    counts = [threads_after_a_step() for _ in range(4)]
    assert counts[3] - counts[1] < 20
    assert all(model() is None for model in alive[:-1])


def test_export_is_what_was_trained(make_run: MakeRun, work: Path) -> None:
    run = make_run(training={"export_hf": True})
    train(run)
    output = Path(run.output_dir)
    before, after = (load_file(folder / "model.safetensors") for folder in (work / "model", output / "hf"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    trainer = opened(run)  # resumes at the end
    assert trainer.iteration == 4
    loaded = AutoModelForCausalLM.from_pretrained(output / "hf", dtype=torch.float32)
    again = make_run(output_dir=str(output / "again"), model={"load": str(output / "hf")})
    assert opened(again).step()["lm loss"] == pytest.approx(reference_loss(loaded, trainer, 0).item(), rel=2e-6)


def test_a_pad_token_that_the_model_lacks_changes_nothing(make_run: MakeRun, work: Path, tmp_path: Path) -> None:
    padded = tmp_path / "padded"
    shutil.copytree(work / "model", padded)
    settings = json.loads((padded / "tokenizer_config.json").read_text())
    (padded / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    unpacked = {"packing": False}
    trainer = opened(make_run(model={"load": str(padded)}, training=unpacked))
    assert trainer.data.shape.pad_id == 0
    losses = [trainer.step()["lm loss"] for _ in range(2)]
    assert losses == [row["lm loss"] for row in curve(make_run(training=unpacked), 2)]


def test_a_loss_that_is_not_finite_stops_the_run(make_run: MakeRun, work: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-model"
    broken.mkdir()
    for file in (work / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = make_run(model={"load": str(broken)})
    places = {place for batch in opened(run).data.step(0).micro_batches for place in batch.sources}
    with pytest.raises(UserError, match="iteration 1: the loss is not finite; stopped before the update") as caught:
        train(run)
    assert str(caught.value).partition("hold the samples: ")[2].split(", ")[0] in places
    assert f"{work / 'chat.jsonl'}:" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_of_something_else_is_left_alone(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="run: exists and is not the folder of a training run"):
        train(make_run())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_dry_run_checks_and_writes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    text = describe(make_run(parallel={"pipeline_model_parallel_size": 2}), 4)
    assert "4 process(es): TP 1 x PP 2 x DP 2" in text and "llama, 0.2M parameters" in text
    assert "read by each of 2 data-parallel replica(s)" in text and "2 rank(s) read" in text
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="does not divide this model's 4 layers"):
        describe(make_run(parallel={"pipeline_model_parallel_size": 3}), 3)
    with pytest.raises(UserError, match="2 key/value heads"):
        describe(make_run(parallel={"tensor_model_parallel_size": 8}), 8)
    with pytest.raises(UserError, match="does not divide the 3 process"):
        describe(make_run(parallel={"pipeline_model_parallel_size": 2}), 3)


def test_rows_longer_than_the_model_is_made_for_are_said_once(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(make_run(data={"seq_length": 512}), 1)
    assert "trained on texts" not in capsys.readouterr().err
    describe(make_run(data={"seq_length": 513}), 1)
    said = capsys.readouterr().err
    assert said.count("data.seq_length is 513, and the model was trained on texts of up to 512 tokens") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"train_epochs": 1.0}}, "give exactly one of train_iters and train_epochs"),
        ({"training": {"train_iters": None}}, "give exactly one of train_iters and train_epochs"),
        ({"training": {"global_batch_sise": 2}}, "global_batch_sise: unknown key .*global_batch_size"),
        ({"optimizer": {"min_lr": 1.0}}, "min_lr 1 is above lr 0.002"),
        ({"optimizer": {"lr_decay_style": "cosin"}}, r"found 'cosin' \(did you mean 'cosine'"),
        ({"objective": {"name": "stf"}}, r"objective.name: unknown name 'stf' \(did you mean 'sft'"),
        ({"objective": {"name": "distill", "store": "s", "lamda": 0.5}}, "lamda: unknown key"),
        (
            {
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
                "data": {"seq_length": 127},
            },
            "127 is not a multiple of tensor_model_parallel_size 2",
        ),
    ],
)
def test_run_files_refused(make_run: MakeRun, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run(**change)
