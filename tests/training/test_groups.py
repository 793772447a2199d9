"""A loss over groups with a reference in the job: the trainer's updates against DPO written out with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import tiny
from fusemega.errors import UserError
from fusemega.losses import registry
from fusemega.losses.registry import register
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import Sample
from fusemega.training.assembly import open_trainer
from fusemega.training.dry_run import describe
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from tests.losses.pairwise import Pairwise, PairwiseScores, write_groups, write_scalar

MakeRun = Callable[..., TrainRun]
BETA = 0.5
CONSTANT = {"lr_decay_style": "constant", "lr_warmup_fraction": 0.0, "clip_grad": 0.0}


@pytest.fixture(scope="module")
def reference(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_groups(work / "groups.jsonl", work / "chat.jsonl")
    return tiny.write_model(folder / "model", work / "chat.jsonl", seed=5)


@pytest.fixture
def grouped(make_run: MakeRun, work: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRun]:
    """`make_run` for the pairwise loss on groups, with a reference."""
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))
    register("pairwise")(Pairwise)
    register("pairwise_scores")(PairwiseScores)

    def make(load: Path = reference, **sections: Any) -> TrainRun:
        objective = {"name": "pairwise", "beta": BETA, "reference": {"load": str(load), "dtype": "fp32"}}
        data = {"path": str(work / "groups.jsonl"), "seq_length": 512}
        return make_run(objective=objective, data=data, **sections)

    yield make


def opened(run: TrainRun) -> Trainer:
    return open_trainer(run)[0]


def logp(model: Any, sample: Sample) -> Tensor:
    ids, where = torch.tensor(sample.ids.astype("int64")), torch.tensor(sample.positions)
    rows: Tensor = model(ids[None]).logits[0, where].log_softmax(1)
    return rows.gather(1, ids[where + 1][:, None]).sum()


def test_updates_equal_the_plain_form(grouped: MakeRun, work: Path, reference: Path) -> None:
    trainer = opened(grouped(optimizer=CONSTANT, training={"global_batch_size": 4}))
    model, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (work / "model", reference))
    model.model.embed_tokens.padding_idx = None  # the turn's closing token too, whose gradient it would withhold
    parameters = list(model.named_parameters())
    adamw = torch.optim.AdamW(
        [{"params": [p for _, p in parameters if (p.dim() > 1) == decayed], "weight_decay": 0.1 * decayed}
         for decayed in (True, False)],
        lr=2e-3,
    )  # fmt: skip
    kinds = set()
    for iteration in range(2):
        samples = [sample for part in trainer.data.step(iteration).samples for sample in part]
        losses = []
        for group in sorted({sample.group for sample in samples if sample.group is not None}):
            members = [sample for sample in samples if sample.group == group]
            with torch.no_grad():
                before = torch.stack([logp(other, sample) for sample in members])
            ratios = BETA * (torch.stack([logp(model, sample) for sample in members]) - before)
            kinds.add(len(members))
            if "chosen" in members[0].scalars:
                losses.append(-torch.nn.functional.logsigmoid(ratios[0] - ratios[1]))
            else:
                target = torch.tensor([sample.scalars["reward"] for sample in members]).softmax(0)
                losses.append(-(target * ratios.log_softmax(0)).sum())
        assert len(losses) == 4
        loss = torch.stack(losses).mean()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
        adamw.step()
        row = trainer.step()
        assert row["pairwise loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)
        assert row["consumed-samples"] == 4 * (iteration + 1)
    assert kinds == {2, 3}


@pytest.mark.parametrize(
    "change", [{"packing": False}, {"micro_batch_size": 3}, {"share_prefix": True, "packing": False}], ids=str
)
def test_rows_do_not_change_the_curve(grouped: MakeRun, change: dict[str, Any]) -> None:
    a, b = opened(grouped()).step(), opened(grouped(training=change)).step()
    assert b["pairwise loss"] == pytest.approx(a["pairwise loss"], rel=1e-5)
    assert b["grad-norm"] == pytest.approx(a["grad-norm"], rel=1e-4)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Those of the step that was just made."""
    found: Any = trainer.gpt.named_parameters()
    return {name: parameter.main_grad.clone() for name, parameter in found}


@pytest.mark.parametrize("scores", [False, True])
def test_shared_prompts_change_no_gradient(
    grouped: MakeRun, make_run: MakeRun, work: Path, tmp_path: Path, scores: bool
) -> None:
    """Of any parameter: the prompt's last token predicts the first token of every response."""

    def taken(share: bool) -> tuple[list[MicroBatch], float, dict[str, Tensor]]:
        training = {"global_batch_size": 6, "share_prefix": share}
        run = grouped(optimizer=CONSTANT, training=training)
        if scores:
            model, data = {"load": str(tmp_path / "scalar")}, {"path": str(work / "groups.jsonl"), "seq_length": 512}
            objective = {"name": "pairwise_scores", "beta": 1.0}
            run = make_run(model=model, data=data, objective=objective, optimizer=CONSTANT, training=training)
        trainer = opened(run)
        loss = trainer.step()["pairwise loss"]
        return trainer.data.step(0).micro_batches, loss, gradients(trainer)

    if scores:
        write_scalar(tmp_path / "scalar", work / "model")
    (batches, loss, found), (plain, wanted, expected) = taken(True), taken(False)
    assert max(len(batch.group_sizes) for batch in batches) > 2
    assert sum(batch.tokens.numel() for batch in batches) < sum(batch.tokens.numel() for batch in plain)
    assert any(len(batch.positions.unique()) < len(batch.positions) for batch in batches)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_single_texts_have_nothing_to_share(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="share_prefix has no effect with objective.name sft, whose rows are single"):
        make_run(training={"share_prefix": True})


def test_of_a_reference_one_number_a_sequence_is_kept(grouped: MakeRun) -> None:
    trainer = opened(grouped())
    for batch, answer in zip(
        (batches := trainer.data.step(0).micro_batches), trainer.frozen["reference"].ask(batches), strict=True
    ):
        assert isinstance(answer, Tensor) and answer.shape == batch.sequence_tokens.shape and not answer.requires_grad


def test_goes_on_with_the_same_reference_only(grouped: MakeRun, work: Path) -> None:
    run = grouped()
    assert "reference  " in describe(run, 1) and "groups an update" in describe(run, 1)
    trainer = opened(run)
    trainer.step()
    trainer.save()
    with pytest.raises(UserError, match="cannot resume: the checkpoint has objective = .* differ in reference"):
        opened(grouped(load=work / "model"))


@pytest.mark.parametrize("packing", [True, False])
def test_scores_of_a_scalar_head(
    grouped: MakeRun, make_run: MakeRun, work: Path, tmp_path: Path, packing: bool
) -> None:
    """Of each sequence's last token, as transformers scores it alone."""
    model = write_scalar(tmp_path / "scalar", work / "model")
    model.model.embed_tokens.padding_idx = None  # as above
    sections: dict[str, Any] = {
        "model": {"load": str(tmp_path / "scalar")},
        "data": {"path": str(work / "groups.jsonl"), "seq_length": 512},
        "objective": {"name": "pairwise_scores", "beta": 1.0},
        "optimizer": CONSTANT,
        "training": {"global_batch_size": 4, "packing": packing},
    }
    trainer = opened(make_run(**sections))
    samples = [sample for part in trainer.data.step(0).samples for sample in part]
    losses = []
    for group in sorted({sample.group for sample in samples if sample.group is not None}):
        members = [sample for sample in samples if sample.group == group]
        ids = [torch.tensor(sample.ids.astype("int64"))[None] for sample in members]
        scores = torch.cat([model.score(model.model(each).last_hidden_state[:, -1])[0] for each in ids])
        if "chosen" in members[0].scalars:
            losses.append(-torch.nn.functional.logsigmoid(scores[0] - scores[1]))
        else:
            target = torch.tensor([sample.scalars["reward"] for sample in members]).softmax(0)
            losses.append(-(target * scores.log_softmax(0)).sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
    row = trainer.step()
    assert row["pairwise loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)
    with pytest.raises(UserError, match="evaluation.data: text, of which a model's log-probability is measured"):
        opened(make_run(**sections, evaluation={"data": sections["data"] | {"path": str(work / "chat.jsonl")},
                                                "interval": 1}))  # fmt: skip
    with pytest.raises(UserError, match="allowed here: LlamaForCausalLM"):
        opened(make_run(model=sections["model"]))
