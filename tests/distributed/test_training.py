"""Training on several ranks: the curve of one process, whatever the layout and the objective, also after a resume.

So do evaluation, export and `teach`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import tiny
from fusemega.align.kinds import KINDS, MapInputs
from fusemega.align.vocabulary import Vocabulary
from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.hf.export import export_hf
from fusemega.losses import registry
from fusemega.losses.preference import Preference
from fusemega.losses.registry import register
from fusemega.scoring.rewards import ScoreRun, score
from fusemega.scoring.teach import TeachRun, teach
from fusemega.store import Store
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import run_ranks
from tests.distributed.workers.training import compared, groups_scored
from tests.losses.pairwise import Pairwise, PairwiseScores, write_groups, write_scalar
from tests.losses.preferences import write_sources
from tests.losses.sequence_mean import SequenceMean
from tests.scoring.armorm import write_armorm

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
FIRST1 = {"num_layers_in_first_pipeline_stage": 1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# name -> (parallel section, training section, optimizer section)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP2+SP x PP2": (TP2 | SP | PP2, {}, {}),
    "TP2 x DP2, micro-batch 2": (TP2, {"micro_batch_size": 2}, {}),
    "CP2 x PP2 x VPP2, recompute": (CP2 | PP2 | VPP2, FULL, {}),
    "PP2 x DP2, uneven, overlapped": (PP2 | FIRST1, {}, OVERLAP),
    "CP2 x DP2, overlapped": (CP2, {"micro_batch_size": 2}, OVERLAP),
}
# objective -> the layouts it is tried in; of the first two, a run is left in each and goes on in the next
TRIED = {
    "sft": list(LAYOUTS),
    "distill": ["TP2+SP x PP2", "CP2 x PP2 x VPP2, recompute"],
    "online_distill": ["TP2+SP x PP2", "CP2 x PP2 x VPP2, recompute", "CP2 x DP2, overlapped"],
    "fuse": ["TP2+SP x PP2", "CP2 x PP2 x VPP2, recompute", "CP2 x DP2, overlapped"],
    "chunk": ["TP2+SP x PP2", "TP2 x DP2, micro-batch 2"],
    "merge": ["TP2+SP x PP2"],
    "project_student": ["TP2+SP x PP2", "CP2 x DP2, overlapped"],
    "sequence_mean": ["CP2 x DP2, overlapped"],
    "pairwise_scores": ["TP2+SP x PP2", "CP2 x DP2, overlapped"],
    "pairwise": ["TP2+SP x PP2", "CP2 x PP2 x VPP2, recompute", "CP2 x DP2, overlapped"],
    "dpo": ["CP2 x DP2, overlapped"],
    "wrpo": ["CP2 x PP2 x VPP2, recompute"],
    "fuse_po": ["TP2+SP x PP2"],
}
LOSSES = {"sft": 1, "sequence_mean": 1, "pairwise": 1, "pairwise_scores": 1, "dpo": 2, "wrpo": 1, "fuse_po": 1}
# Those in which the responses to a prompt share it; alone they do not.
SHARED = {
    ("pairwise_scores", "CP2 x DP2, overlapped"),
    ("wrpo", "CP2 x PP2 x VPP2, recompute"),
    ("fuse_po", "TP2+SP x PP2"),
}
SCORED = {"TP2 x PP2": TP2 | SP | PP2, "CP2 x DP2": CP2}
WHOLE = 384  # tokens in which every conversation is one window for either tokenizer
# go on in their own layout too
RESUMED = ["sft, TP2+SP x PP2", "sft, CP2 x PP2 x VPP2, recompute", "sft, PP2 x DP2, uneven, overlapped"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, chat_files: assets.ChatData) -> Path:
    """A tiny target, data, the store of a tiny teacher, a teacher of another shape with a larger vocabulary, and one
    with a tokenizer of its own, with its store and map."""
    folder = tmp_path_factory.mktemp("tiny")
    chat = tiny.write_chat(folder / "chat.jsonl", rows=24, characters=200)
    write_groups(folder / "groups.jsonl", chat)
    write_sources(folder / "sources.jsonl", chat)
    tiny.write_model(folder / "model", chat)
    write_scalar(folder / "scalar", folder / "model")
    tiny.write_model(folder / "teacher", chat, seed=1)
    tiny.write_model(folder / "wide", chat, seed=2, hidden_size=32, tie_word_embeddings=False)
    tiny.pad_vocabulary(folder / "wide", 517)
    section = {
        "model": {"load": str(folder / "teacher"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "store": str(folder / "store"),
    }
    tiny.write_model(folder / "coarse", chat, seed=3, vocab_size=331)
    for name in ("teacher", "coarse"):
        model = {"model": {"load": str(folder / name), "dtype": "fp32"}, "store": str(folder / f"whole-{name}")}
        teach(validate(TeachRun, section | model | {"data": {"path": str(chat), "seq_length": WHOLE}}, "teach"))
    tokenizers = Tokenizer.load(folder / "coarse"), Tokenizer.load(folder / "model")
    coarse, fine = map(Vocabulary.of, tokenizers)
    cells, exact = (KINDS[kind].make(MapInputs(tokenizers, (coarse, fine))) for kind in ("cells", "exact"))
    assert len(set(cells.cell_T.tolist())) < fine.size
    cells.save(folder / "coarse.map")
    exact.save(folder / "exact.map")
    sampled = section | {"store": str(folder / "sampled"), "rows": "sampled", "num_samples": 8, "temperature": 2.0}
    again, sums = [], section | {"store": str(folder / "sums"), "rows": "none"}
    for one in (section, sampled, sums):
        teach(validate(TeachRun, one, "teach"))
        again.append(one | {"store": f"{one['store']}-layouts", "parallel": CP2 | PP2 | VPP2})
    scores = {
        "model": {"load": str(write_armorm(folder / "armorm", chat)), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 512},
        "objectives": True,
    }
    score(validate(ScoreRun, scores | {"output": str(folder / "scored.jsonl")}, "score"))
    for name, parallel in SCORED.items():
        again.append(scores | {"output": str(folder / f"scored.{name}.jsonl"), "parallel": parallel})
    (folder / "teach.json").write_text(json.dumps(again))
    return folder


def section(
    work: Path, name: str, objective: dict[str, Any], parallel: Any, training: Any, optimizer: Any, share: bool = False
) -> dict[str, Any]:
    files = {
        "pairwise": "groups",
        "pairwise_scores": "groups",
        "dpo": "groups",
        "wrpo": "sources",
        "fuse_po": "sources",
    }
    file = files.get(objective["name"], "chat")
    whole = file != "chat" or objective["name"] in ("fuse", "chunk", "merge", "project_student")
    path = work / f"{file}.jsonl"
    model = "scalar" if objective["name"] == "pairwise_scores" else "model"
    return {
        "output_dir": str(work / "runs" / name),
        "model": {"load": str(work / model), "dtype": "fp32"},
        "parallel": parallel,
        "data": {"path": str(path), "seq_length": WHOLE if whole else 128},
        "objective": objective,
        # With the usual epsilon the update of a gradient near 0 turns with its last bit.
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "lr_warmup_fraction": 0.2, **optimizer}
        | ({"adam_eps": 1e-4} if file != "chat" else {}),
        "training": {"train_iters": 4, "global_batch_size": 6, "export_hf": False, "share_prefix": share, **training},
    }


def test_curves_and_resumed_curves(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))  # other tests list what there is
    register("sequence_mean")(SequenceMean)
    register("pairwise")(Pairwise)
    register("pairwise_scores")(PairwiseScores)
    reference = {"in_job": {"load": str(work / "wide"), "dtype": "fp32"}, "same_model": False}
    objectives = {
        "sft": {"name": "sft"},
        "distill": {"name": "distill", "store": str(work / "store"), "tail": "residual", "lambda": 0.3},
        "online_distill": {
            "name": "online_distill",
            "teacher": {"load": str(work / "wide"), "dtype": "fp32"},
            "divergence": "jsd",
            "lambda": 0.3,
            "temperature": 2.0,
        },
        "fuse": {
            "name": "fuse",
            "teachers": [
                {"store": str(work / "whole-teacher")},
                {"store": str(work / "whole-coarse"), "map": str(work / "coarse.map")},
            ],
            "fusion": {"function": "avg_ce"},
            "lambda": 0.3,
        },
        "chunk": {"name": "chunk", "store": str(work / "whole-coarse"), "lambda": 0.3},
        "merge": {
            "name": "merge",
            "store": str(work / "whole-coarse"),
            "map": str(work / "exact.map"),
            "lambda": 0.3,
        },
        "project_student": {
            "name": "project_student",
            "store": str(work / "whole-coarse"),
            "tokenizer": str(work / "coarse"),
            "lambda": 0.3,
        },
        "pairwise": {"name": "pairwise", "beta": 0.5, "reference": {"load": str(work / "wide"), "dtype": "fp32"}},
        "pairwise_scores": {"name": "pairwise_scores", "beta": 1.0},
        "sequence_mean": {"name": "sequence_mean"},
        "dpo": {"name": "dpo", "loss_type": "sigmoid_norm", "ld_alpha": 0.4, "rpo_alpha": 0.2, "reference": reference},
        "wrpo": {"name": "wrpo", "beta": 0.5, "alpha": 0.6, "target": "target", "reference": reference},
        "fuse_po": {"name": "fuse_po", "beta": 0.5, "alpha": 0.2, "reference": reference},
    }
    cases = {
        f"{objective}, {layout}": section(
            work, f"{objective} {layout}", settings, *LAYOUTS[layout], share=(objective, layout) in SHARED
        )
        for objective, settings in objectives.items()
        for layout in TRIED[objective]
    }
    (work / "cases.json").write_text(
        json.dumps({"cases": cases, "resumed": RESUMED, "reference": objectives["online_distill"]["teacher"]})
    )
    ranks = run_ranks("training.py", 4, str(work / "cases.json"), str(work / "teach.json"))
    for rank in ranks:
        errors = rank.pop("alone")
        # Some fields are fp32.
        assert len(errors) == 20 and all(error <= 3e-7 for error in errors.values()), errors
    shared = [{name: found for name, found in rank.items() if "last rows" not in name} for rank in ranks]
    assert shared[0] == shared[3]  # every rank has the metrics
    for objective, settings in objectives.items():
        run = validate(TrainRun, section(work, f"{objective} alone", settings, {}, {}, {}), objective)
        trainer, checked = open_trainer(run)
        alone = [trainer.step() for _ in range(4)]
        losses = [name for name in alone[0] if name.endswith("loss")]
        # What compares responses takes differences of sums over whole texts, of 100 nats and more: in fp32 these are
        # right to 1e-5 nats, and the rounding differs from one processor to the next.
        near = 1e-5 if checked.objective.unit == "token" else 3e-5
        assert len(losses) == LOSSES.get(objective, 3)
        groups = groups_scored(trainer) if isinstance(checked.objective, Preference) else None
        if objective == "sft":
            scored = compared(trainer, objectives["online_distill"]["teacher"])
            assert scored["kl"] > 0.01 and 0 < scored["same_top_1"] < 1
        for layout in TRIED[objective]:
            rows = ranks[0][f"{objective}, {layout}"]
            for row, wanted in zip(rows, alone, strict=True):
                measured = [name for name in checked.objective.measures if name in wanted]
                assert measured or not checked.objective.measures
                for name in (*losses, *measured):
                    assert row[name] == pytest.approx(wanted[name], rel=near), (objective, layout, name)
                for name in checked.objective.statistics:  # differences of sums
                    assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), (objective, layout, name)
                assert row["grad-norm"] == pytest.approx(wanted["grad-norm"], rel=1e-4), (objective, layout)
            if groups is not None:
                assert ranks[0][f"{objective}, {layout}, scored"] == pytest.approx(groups, rel=1e-4, abs=1e-4)
            if objective == "sft":
                assert ranks[0][f"sft, {layout}, scored"] == pytest.approx(scored, rel=1e-5), layout
        if objective == "sft":
            texts = trainer.data.dataset  # what the stores are of
            export_hf(trainer.gpt, work / "alone-hf", checked.source.hf, trainer.world)
    for name in RESUMED:
        assert ranks[0][f"{name}, resumed"] == ranks[0][name][2:], "a resumed curve is bitwise the same"
    moves = [name for name in ranks[0] if ", then " in name and "last rows" not in name]
    assert len(moves) == sum(len(TRIED[objective]) - 1 for objective in ("sft", "distill"))
    for move in moves:
        left, taken = move.split(", then ")
        for row, wanted in zip(ranks[0][move], ranks[0][left][2:], strict=True):
            for name in (key for key in row if key.endswith("loss")):
                assert row[name] == pytest.approx(wanted[name], rel=1e-5), (move, name)
            assert row["grad-norm"] == pytest.approx(wanted["grad-norm"], rel=1e-4), move
        padded = "TP2" in taken  # 509 rows make 510
        for rows in filter(None, (rank[f"{move}, last rows"] for rank in ranks)):
            assert rows.keys() == {"param", "exp_avg", "exp_avg_sq"}
            assert all((last == 0) == padded and before > 0 for before, last in rows.values()), (move, rows)
    exported = load_file(work / "alone-hf" / "model.safetensors")
    for layout in TRIED["sft"]:
        weights = load_file(work / "runs" / f"sft {layout}" / "hf" / "model.safetensors")
        assert weights.keys() == exported.keys()
        for name, wanted in exported.items():
            torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=2e-5, msg=f"{layout}: {name}")
    taught, wanted_rows = Store.open(work / "store-layouts"), Store.open(work / "store")
    assert len(taught) == len(wanted_rows) > 20
    for sample in texts:
        row, wanted_row = taught.get(sample.key), wanted_rows.get(sample.key)
        assert row is not None and wanted_row is not None
        for field in ("ids_hash", "num_bytes", "num_tokens"):
            assert getattr(row, field) == getattr(wanted_row, field)
        assert (row.ids_PK == wanted_row.ids_PK).mean() > 0.99  # the order of near ties
        # A near tie of two codes may fall to either.
        assert row.logp_PK == pytest.approx(wanted_row.logp_PK, abs=0.1)
        assert np.median(np.abs(row.logp_PK - wanted_row.logp_PK)) < 1e-5
        assert row.log_residual_P == pytest.approx(wanted_row.log_residual_P, abs=0.1)
        assert row.sum_logp == pytest.approx(wanted_row.sum_logp, rel=1e-5)
    for sample in texts:
        entries = [Store.open(work / name).entry(sample.key) for name in ("sums-layouts", "sums", "store")]
        logp = [entry["sum_logp"] for entry in entries if entry is not None]
        assert logp == pytest.approx([logp[2]] * 3, rel=1e-5)
    drawn, wanted_draws = Store.open(work / "sampled-layouts"), Store.open(work / "sampled")
    assert len(drawn) == len(wanted_draws) > 20 and drawn.manifest == wanted_draws.manifest
    pairs = [(drawn.get(sample.key), wanted_draws.get(sample.key)) for sample in texts]
    same = [row is not None and other is not None and (row.ids_PK == other.ids_PK).all() for row, other in pairs]
    assert np.mean(same) > 0.9  # a draw may fall on the border of two ids
    alone_rows = [json.loads(line) for line in (work / "scored.jsonl").read_text().splitlines()]
    assert len(alone_rows) == 24 and np.std([row["rewards"] for row in alone_rows]) > 1e-2
    for name in SCORED:
        rows = [json.loads(line) for line in (work / f"scored.{name}.jsonl").read_text().splitlines()]
        for row, wanted in zip(rows, alone_rows, strict=True):
            assert row["messages"] == wanted["messages"]
            assert row["rewards"] == pytest.approx(wanted["rewards"], abs=1e-5)
            assert row["objectives"][0] == pytest.approx(wanted["objectives"][0], abs=1e-5)
