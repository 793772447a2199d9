"""A model with experts trained on two ranks: the curve of one process under SFT, distillation and preferences, also
after a resume in another layout. So do evaluation, conversion and `teach`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from benchmarks import tiny
from fusemega.config import validate
from fusemega.convert.convert import export_megatron
from fusemega.fixtures import data as assets
from fusemega.hf.folder import HFFolder
from fusemega.passes.batches import TrainingData
from fusemega.scoring.evaluation import evaluate_model
from fusemega.scoring.teach import TeachRun, teach
from fusemega.store import Store
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import run_ranks
from tests.losses.pairwise import write_groups

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "EP2, allgather": (EP2 | {"moe_token_dispatcher_type": "allgather"}, {}),
    "TP2 x EP2 x ETP1": (TP2 | EP2 | {"expert_tensor_parallel_size": 1}, {}),
    "PP2": ({"pipeline_model_parallel_size": 2}, {}),
    "EP2, overlapped": (EP2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}
COEFFICIENT = 0.3
SHAPE = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, chat_files: assets.ChatData) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    chat = tiny.write_chat(folder / "chat.jsonl", rows=16, characters=120)
    write_groups(folder / "groups.jsonl", chat)
    tiny.write_model(folder / "model", chat, **SHAPE)
    tiny.write_model(folder / "teacher", chat, seed=1, **SHAPE)
    return folder


def section(work: Path, name: str, objective: dict[str, Any], parallel: Any, optimizer: Any) -> dict[str, Any]:
    file = "groups" if objective["name"] == "simpo" else "chat"
    return {
        "output_dir": str(work / "runs" / name),
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "parallel": parallel,
        "data": {"path": str(work / f"{file}.jsonl"), "seq_length": 256},
        "objective": objective,
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "adam_eps": 1e-4, **optimizer},
        "training": {
            "train_iters": 4,
            "global_batch_size": 4,
            "export_hf": False,
            **({} if objective["name"] == "simpo" else {"router_aux_loss_coef": COEFFICIENT}),
        },
    }


def test_curves_and_resumed_curves(work: Path) -> None:
    objectives: dict[str, dict[str, Any]] = {
        "sft": {"name": "sft"},
        "online_distill": {"name": "online_distill", "teacher": {"load": str(work / "teacher"), "dtype": "fp32"}},
        "simpo": {"name": "simpo"},
    }
    tried = {"sft": list(LAYOUTS), "online_distill": ["TP2 x EP2 x ETP1"], "simpo": ["EP2, overlapped"]}
    cases = {
        f"{objective}, {layout}": section(work, f"{objective} {layout}", settings, *LAYOUTS[layout])
        for objective, settings in objectives.items()
        for layout in tried[objective]
    }
    teaching = {
        "model": {"load": str(work / "teacher"), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 256},
    }
    taught_here = {**teaching, "parallel": EP2, "store": str(work / "store-EP2")}
    (work / "cases.json").write_text(json.dumps({"cases": cases, "teach": taught_here}))
    (first, second) = run_ranks("expert_training.py", 2, str(work / "cases.json"))
    assert first == second
    for objective, settings in objectives.items():
        run = validate(TrainRun, section(work, f"{objective} alone", settings, {}, {}), objective)
        trainer, _ = open_trainer(run)
        alone = [trainer.step() for _ in range(4)]
        losses = [name for name in alone[0] if name.endswith("loss")]
        assert ("load balancing loss" in losses) == (objective != "simpo")
        for layout in tried[objective]:
            near(first[f"{objective}, {layout}"], alone, losses, f"{objective}, {layout}")
        if objective == "sft":
            data = trainer.data
            check_balance(work / "model", data, alone[0])
            scored = evaluate_model(trainer.gpt, data.dataset, data.shape, trainer.world).model_dump()
            for layout in LAYOUTS:
                assert first[f"sft, {layout}, scored"] == pytest.approx(scored, rel=1e-5)
            for move in (name for name in first if ", then " in name):
                near(first[move], alone[2:], losses, move)
            texts = data.dataset
    assert sum(", then " in name for name in first) == len(LAYOUTS) - 1
    # The fp32 main parameters of a checkpoint, whichever optimizer has them.
    for layout in ("EP2, allgather", "PP2"):
        export_megatron(work / "runs" / f"sft {layout}", work / f"{layout}-hf")
        exported = HFFolder(work / f"{layout}-hf")
        assert set(exported) == set(HFFolder(work / "model"))
        assert exported.content_hash() != HFFolder(work / "model").content_hash()
    teach(validate(TeachRun, {**teaching, "store": str(work / "store")}, "teach"))
    stores = Store.open(work / "store-EP2"), Store.open(work / "store")
    assert len(stores[0]) == len(stores[1]) == len(texts)
    for sample in texts:
        row, wanted = (store.get(sample.key) for store in stores)
        assert row is not None and wanted is not None
        assert (row.ids_PK == wanted.ids_PK).mean() > 0.99
        assert np.median(np.abs(row.logp_PK - wanted.logp_PK)) < 1e-5
        assert row.sum_logp == pytest.approx(wanted.sum_logp, rel=1e-5)


def check_balance(model: Path, data: TrainingData, row: dict[str, float]) -> None:
    """The first step's loss and gradient as transformers computes them, sample by sample and layer by layer."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hf.model.embed_tokens.padding_idx = None  # that token, which also ends turns, would get no gradient
    samples = [sample for part in data.step(0).samples for sample in part]
    nll, balances = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        out = hf(ids[None], output_router_logits=True)
        positions = torch.from_numpy(sample.positions)
        nll.append(cross_entropy(out.logits[0, positions], ids[positions + 1], reduction="none"))
        balances += [load_balancing_loss_func((layer,), 4, 2) for layer in out.router_logits]
    lm, balance = torch.cat(nll).mean(), torch.stack(balances).mean()
    (lm + COEFFICIENT * balance).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in hf.parameters()]).norm()
    assert row["load balancing loss"] == pytest.approx(float(balance), rel=1e-5)
    assert row["loss"] == pytest.approx(float(lm + COEFFICIENT * balance), rel=1e-5)
    assert row["grad-norm"] == pytest.approx(float(norm), rel=1e-4)
    assert balance > 2.002  # 2 where each expert of a layer gets as many tokens, and as much weight


def near(rows: list[dict[str, float]], wanted: list[dict[str, float]], losses: list[str], what: str) -> None:
    """Losses are the same to 1e-5, and gradient norms to 1e-4."""
    for row, other in zip(rows, wanted, strict=True):
        for name in losses:
            assert row[name] == pytest.approx(other[name], rel=1e-5), (what, name)
        assert row["grad-norm"] == pytest.approx(other["grad-norm"], rel=1e-4), what
