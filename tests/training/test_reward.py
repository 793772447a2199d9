"""A reward model trained from a language model's folder, exported, and scored in transformers and by `score`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.config import validate
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import verify
from fusemega.errors import UserError
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.new_score import NewScore
from fusemega.models.dense_logits import dense_logits
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.scoring.rewards import RewardsFound, ScoreRun, score
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import open_trainer, train
from fusemega.training.dry_run import describe
from fusemega.training.records import read_evaluations
from fusemega.training.run_file import TrainRun
from tests.distributed.test_families import MODELS, SHAPE
from tests.losses.pairwise import write_groups

MakeRun = Callable[..., TrainRun]
SEED = 3
OBJECTIVE = {"name": "reward", "margin": 0.5, "center_rewards_coefficient": 0.05}


@pytest.fixture(scope="module")
def pairs(work: Path) -> Path:
    """Pairs of conversations, and one of texts, which end in the id that the model takes for padding."""
    groups = write_groups(work / "groups.jsonl", work / "chat.jsonl").read_text().splitlines()
    rows = [line for line in groups if "chosen" in json.loads(line)]
    rows.append(json.dumps({"prompt": "two and two is ", "chosen": "four.", "rejected": "something else"}))
    (work / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return work / "pairs.jsonl"


def sections(work: Path, pairs: Path, **objective: Any) -> dict[str, Any]:
    return {
        "model": {"load": str(work / "model")},
        "data": {"path": str(pairs), "seq_length": 256},
        "objective": {**OBJECTIVE, **objective},
        "optimizer": {"lr_decay_style": "constant", "lr_warmup_fraction": 0.0, "clip_grad": 0.0},
        "evaluation": {"data": {"path": str(pairs), "seq_length": 512}, "interval": 3},
        "training": {"train_iters": 3, "global_batch_size": 4, "seed": SEED, "export_hf": True},
    }


def scored(model: Path, data: Path, output: Path, **changes: Any) -> tuple[RewardsFound, list[dict[str, Any]]]:
    """What `score` finds, and the rows that it writes."""
    section: dict[str, Any] = {
        "model": {"load": str(model), "dtype": "fp32"},
        "data": {"path": str(data), "seq_length": 256},
        "output": str(output),
    }
    found, _ = score(validate(ScoreRun, {**section, **changes}, "score.yaml"))
    return found, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def texts_of(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """A pair's two texts, as a user of transformers writes them."""
    both = []
    for key in ("chosen", "rejected"):
        if isinstance(row["prompt"], str):
            both.append(row["prompt"] + row[key] + tokenizer.eos_token)
        else:
            both.append(tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=False))
    return both


def test_from_a_language_model_to_a_folder_that_transformers_scores_with(
    make_run: MakeRun, work: Path, pairs: Path, tmp_path: Path
) -> None:
    run = make_run(**sections(work, pairs))
    assert "pairs.jsonl; 7 groups" in describe(run, 1)
    trainer, _ = open_trainer(run.model_copy(update={"output_dir": str(tmp_path / "tried")}))
    model = AutoModelForSequenceClassification.from_pretrained(work / "model", num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    folder = NewScore(work / "model", SEED, Tokenizer.load(work / "model"))
    with torch.no_grad():
        model.score.weight.copy_(folder.read("score.weight", ((0, 1), (0, 64))))
    assert 0.01 < float(model.score.weight.std()) < 0.03  # initializer_range is 0.02
    assert not torch.equal(NewScore(work / "model", SEED + 1, folder_tokenizer(work)).read(*WHOLE), folder.read(*WHOLE))
    model.model.embed_tokens.padding_idx = None  # it would withhold the gradient of a row that the data has
    samples = [sample for part in trainer.data.step(0).samples for sample in part]
    rewards = []
    for sample in samples:
        ids = sample.ids[: -1 if sample.ids[-1] == tokenizer.pad_token_id else None]
        rewards.append(model.score(model.model(torch.tensor(ids.astype("int64"))[None]).last_hidden_state[0, -1])[0])
    chosen, rejected = torch.stack(rewards[0::2]), torch.stack(rewards[1::2])
    bt, center = -torch.nn.functional.logsigmoid(chosen - rejected - 0.5).mean(), (chosen + rejected).square().mean()
    (bt + 0.05 * center).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
    row = trainer.step()
    assert row["reward loss"] == pytest.approx(bt.item(), rel=1e-5)
    assert row["center loss"] == pytest.approx(center.item(), rel=1e-4)
    assert row["accuracy"] == float((chosen > rejected).float().mean())
    assert row["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-6)
    assert row["mean_reward"] == pytest.approx(float(torch.stack(rewards).mean()), abs=1e-6)
    assert row["loss"] == pytest.approx((bt + 0.05 * center).item(), rel=1e-5)
    assert row["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)

    assert train(run) == 0
    hf = Path(run.output_dir) / "hf"
    config = AutoConfig.from_pretrained(hf)
    assert config.architectures == ["LlamaForSequenceClassification"] and config.num_labels == 1
    assert config.problem_type == "regression" and config.pad_token_id == tokenizer.pad_token_id
    assert set(HFFolder(hf)) == set(folder)
    found, rows = scored(hf, pairs, tmp_path / "scored.jsonl")
    trained = AutoModelForSequenceClassification.from_pretrained(hf, dtype=torch.float32).eval()
    texts = [text for row in rows for text in texts_of(row, tokenizer)]
    padded = AutoTokenizer.from_pretrained(hf)(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert 0 in padded["attention_mask"]
    with torch.no_grad():
        wanted = trained(**padded).logits[:, 0].tolist()
    assert max(wanted) - min(wanted) > 1e-2
    assert [reward for row in rows for reward in row["rewards"]] == pytest.approx(wanted, abs=1e-5)
    differences = [a - b for a, b in zip(wanted[0::2], wanted[1::2], strict=True)]
    assert found.pairs == found.rows == len(differences)
    assert found.accuracy == sum(difference > 0 for difference in differences) / len(differences)
    assert found.margin == pytest.approx(sum(differences) / len(differences), abs=1e-5)
    assert found.mean_reward == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
    first, last = read_evaluations(Path(run.output_dir))
    assert (first["iteration"], last["iteration"], last["groups"]) == (0, 3, found.pairs)
    assert first["accuracy"] < last["accuracy"] == found.accuracy  # held-out pairs, here the same ones
    assert last["margin"] == pytest.approx(found.margin, abs=1e-5)
    # The run's checkpoint is the same model; training goes on from the export without a new head.
    assert scored(Path(run.output_dir), pairs, tmp_path / "again.jsonl")[1] == [
        {**row, "rewards": pytest.approx(row["rewards"], abs=1e-6)} for row in rows
    ]
    again = ModelSource(run.model.model_copy(update={"load": str(hf)}), ParallelConfig(), 1, None, ("scalar",), 0)
    assert type(again.folder) is HFFolder


WHOLE = ("score.weight", ((0, 1), (0, 64)))


def folder_tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.load(work / "model")


def test_a_run_of_a_language_model_gets_no_new_score(make_run: MakeRun, work: Path, pairs: Path) -> None:
    train(make_run(training={"train_iters": 1}))
    first = make_run().output_dir
    with pytest.raises(UserError, match="a language model without a score; .* use the run's hf/"):
        open_trainer(make_run(**{**sections(work, pairs), "model": {"load": first}}, output_dir=f"{first}-reward"))


@pytest.mark.parametrize("name", ["mistral-windowed", "qwen2-windowed-tied", "qwen3-tied"])
def test_a_new_score_on_every_family(name: str, work: Path, tmp_path: Path) -> None:
    settings = {**SHAPE, **MODELS[name], "vocab_size": 509, "pad_token_id": 1}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(tmp_path / "base")
    config = ModelConfig(load=str(tmp_path / "base"), dtype="fp32")
    source = ModelSource(config, ParallelConfig(), 1, None, ("scalar",), SEED)
    world = initialize(ParallelConfig())
    gpt = source.build(world)
    export_hf(gpt, tmp_path / "out", source.hf, world, dtype=source.dtypes())
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and type(model).__name__.startswith(type(base).__name__.removesuffix("ForCausalLM"))
    ids = [5, 300, 41, 77, 502, 18, 9, 64]
    scores = dense_logits(gpt, world, [ids])
    assert scores is not None
    with torch.no_grad():
        wanted = model.float().eval()(torch.tensor([ids])).logits
    assert abs(float(wanted)) > 1e-4
    torch.testing.assert_close(scores[-1:], wanted, atol=1e-5, rtol=0)
    import_hf(tmp_path / "out", tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "again")
    assert verify(tmp_path / "out", tmp_path / "again").identical
