"""A teacher in the same job: the loss and its gradients against whole logits of both models in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import tiny
from fusemega.errors import UserError
from fusemega.training.assembly import open_trainer
from fusemega.training.checkpoints import Checkpoints
from fusemega.training.dry_run import describe
from fusemega.training.records import COSTS
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from tests.logits.dense_divergence import dense_sums

MakeRun = Callable[..., TrainRun]
VOCAB = 509


@pytest.fixture(scope="module")
def wide(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the same tokenizer, of another shape and with more vocabulary rows."""
    folder = tmp_path_factory.mktemp("teacher") / "wide"
    tiny.write_model(folder, work / "chat.jsonl", seed=2, hidden_size=32, tie_word_embeddings=False)
    return tiny.pad_vocabulary(folder, VOCAB + 8)


@pytest.fixture
def online(make_run: MakeRun, wide: Path) -> MakeRun:
    """`make_run` for this objective: lambda 0.3, T 2, forward KL unless said otherwise."""

    def make(objective: dict[str, Any] | None = None, **sections: Any) -> TrainRun:
        settings = {"lambda": 0.3, "temperature": 2.0, "teacher": {"load": str(wide), "dtype": "fp32"}}
        return make_run(objective={"name": "online_distill", **settings, **(objective or {})}, **sections)

    return make


def take(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    rows = [trainer.step() for _ in range(steps)]
    return [{name: value for name, value in row.items() if name not in COSTS} for row in rows]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


def opened(run: TrainRun) -> Trainer:
    return open_trainer(run)[0]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_updates_equal_transformers_and_adamw(online: MakeRun, work: Path, wide: Path, divergence: str) -> None:
    constant = {"lr_decay_style": "constant", "lr_warmup_fraction": 0.0, "clip_grad": 0.0}
    trainer = opened(online({"divergence": divergence}, optimizer=constant))
    model, teacher = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (work / "model", wide))
    model.model.embed_tokens.padding_idx = None  # the turn's closing token too, whose gradient it would withhold
    adamw = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if (p.dim() > 1) == decayed], "weight_decay": 0.1 * decayed}
         for decayed in (True, False)],
        lr=2e-3,
    )  # fmt: skip
    for iteration in range(2):
        lm = distill = torch.zeros(())
        count = 0
        for sample in (sample for part in trainer.data.step(iteration).samples for sample in part):
            ids = torch.tensor(sample.ids.astype("int64"))
            where = torch.tensor(sample.positions)
            own = model(ids[None]).logits[0, where]
            with torch.no_grad():
                taught = teacher(ids[None]).logits[0, where, :VOCAB]
            sums = dense_sums(own, taught, ids[where + 1], divergence, 2.0)
            lm, distill, count = lm + sums[0], distill + sums[1], count + len(where)
        loss = (0.3 * lm + 0.7 * 2.0**2 * distill) / count
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
        adamw.step()
        row = trainer.step()
        assert row["lm loss"] == pytest.approx(lm.item() / count, rel=2e-6)
        assert row["distill loss"] == pytest.approx(distill.item() / count, rel=2e-5)
        assert row["loss"] == pytest.approx(loss.item(), rel=5e-6)
        assert row["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)


def test_every_option_changes_the_gradient(online: MakeRun, work: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"lambda": 0.5},
        {"temperature": 1.0},
        {"teacher": {"load": str(work / "model"), "dtype": "fp32"}},
    ]
    norms = [opened(online(change)).step()["grad-norm"] for change in changes]
    assert len({f"{norm:.4e}" for norm in norms}) == len(changes), norms


def test_with_labels_alone_it_is_sft(online: MakeRun, make_run: MakeRun) -> None:
    alone, sft = take(opened(online({"lambda": 1.0})), 2), take(opened(make_run()), 2)
    for row, wanted in zip(alone, sft, strict=True):
        assert row["lm loss"] == pytest.approx(wanted["lm loss"], rel=1e-6)
        assert row["grad-norm"] == pytest.approx(wanted["grad-norm"], rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_nothing_to_learn_from_its_own_start(online: MakeRun, work: Path, divergence: str) -> None:
    oneself = {"teacher": {"load": str(work / "model"), "dtype": "fp32"}, "lambda": 0.0, "divergence": divergence}
    first, second = take(opened(online(oneself, optimizer={"clip_grad": 0.0})), 2)
    assert abs(first["distill loss"]) < 1e-6 and first["grad-norm"] < 1e-5
    assert second["distill loss"] != first["distill loss"]


@pytest.mark.parametrize("change", [{"packing": False}, {"micro_batch_size": 3}], ids=str)
def test_rows_do_not_change_the_curve(online: MakeRun, change: dict[str, Any]) -> None:
    for a, b in zip(take(opened(online()), 2), take(opened(online(training=change)), 2), strict=True):
        assert [b[name] for name in a if "loss" in name] == pytest.approx([a[name] for name in a if "loss" in name])
        assert b["grad-norm"] == pytest.approx(a["grad-norm"], rel=1e-5)


def test_resumed_with_the_same_teacher_only(online: MakeRun, make_run: MakeRun, tmp_path: Path) -> None:
    trainer = opened(online())
    teacher = trainer.frozen["teacher"].gpt
    before = [parameter.clone() for parameter in teacher.parameters()]
    rows = take(trainer, 2)
    folder = trainer.callback(Checkpoints).save(trainer)
    rows += take(trainer, 2)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(map(torch.equal, before, teacher.parameters()))
    sft = opened(make_run(output_dir=str(tmp_path / "sft")))
    sft.step()
    assert size(folder) == pytest.approx(size(sft.callback(Checkpoints).save(sft)), rel=0.01), (
        "the student's state alone"
    )
    assert take(opened(online()), 2) == rows[2:]
    with pytest.raises(UserError, match=r"cannot resume: the checkpoint has objective = .*'forward_kl'.*'jsd'"):
        opened(online({"divergence": "jsd"}))


def test_dry_run_names_the_teacher_and_its_layouts(online: MakeRun, work: Path, tmp_path: Path) -> None:
    text = describe(online(parallel={"pipeline_model_parallel_size": 2}), 2)
    assert "wide: llama, 0.1M parameters, fp32" in text
    for shape, parallel, message in (
        (
            {"intermediate_size": 99},
            {"tensor_model_parallel_size": 2},
            "tensor_model_parallel_size: 2 does not divide",
        ),
        ({"num_hidden_layers": 3}, {"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size: 2 .* 3 layers"),
    ):
        folder = tiny.write_model(tmp_path / next(iter(shape)), work / "chat.jsonl", **shape)
        with pytest.raises(UserError, match=rf"objective.teacher: parallel.{message}"):
            describe(online({"teacher": {"load": str(folder)}}, parallel=parallel), 2)
