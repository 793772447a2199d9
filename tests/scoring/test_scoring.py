"""`teach` and `eval` against transformers; stores that refuse what is not theirs; distillation from a real store."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import tiny
from fusemega import cli
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.fusion.teacher_rows import TeacherRows, TeacherRowsConfig
from fusemega.logits.sampled import uniforms
from fusemega.scoring.evaluate import EvalRun, evaluate
from fusemega.scoring.evaluation import Comparison, RowsComparison
from fusemega.scoring.teach import TeachRun, teach
from fusemega.store import Store, StoreWriter
from fusemega.store.merge import merge, open_inputs
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.logits.dense_divergence import dense_divergence


@pytest.fixture
def samples(work: Path, tmp_path: Path) -> TokenizedDataset:
    config = DataConfig(path=str(work / "chat.jsonl"), seq_length=128)
    return prepare(config, Tokenizer.load(work / "model"), tmp_path / "cache")


def teach_run(work: Path, store: Path, **changes: Any) -> TeachRun:
    base: dict[str, Any] = {
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
        "store": str(store),
    }
    if "rows" not in changes:
        base["top_k"] = 7
    return validate(TeachRun, {**base, **changes}, "teach.yaml")


def logits_of(folder: Path, ids: np.ndarray) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids.astype("int64"))[None]).logits[0].double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_are_the_teachers_distribution(
    work: Path, tmp_path: Path, samples: TokenizedDataset, temperature: float
) -> None:
    store = Store.open(teach(teach_run(work, tmp_path / "store", temperature=temperature)))
    assert len(store) == len(samples)
    for sample in (samples[0], samples[len(samples) - 1]):
        row = store.get(sample.key)
        assert row is not None and row.ids_hash == sample.ids_hash
        logits_LV = logits_of(work / "model", sample.ids)
        logp_PV = (logits_LV / temperature).log_softmax(-1)[sample.positions]
        assert np.array_equal(row.end_bytes, sample.end_bytes[sample.positions])
        expected = logp_PV.gather(1, torch.tensor(row.ids_PK.astype("int64")))
        best = logp_PV.topk(7).values
        np.testing.assert_allclose(expected, best, atol=1e-5)
        given = torch.cat([best, torch.log1p(-best.exp().sum(1, keepdim=True))], dim=1)
        read = torch.tensor(np.column_stack([row.logp_PK, row.log_residual_P])).double()
        assert ((given.exp() * (given - read)).sum(1) < 7e-4).all()  # as fusemega.store.coding says
        np.testing.assert_allclose(read, given, atol=0.1)
        labels = torch.tensor(sample.ids[sample.positions + 1].astype("int64"))
        label_logp = logits_LV.log_softmax(-1)[sample.positions].gather(1, labels[:, None])
        assert row.sum_logp == pytest.approx(label_logp.sum().item(), rel=1e-6)
        assert row.label_ids_P is not None and row.label_logp_P is not None
        assert row.label_ids_P.tolist() == labels.tolist()
        np.testing.assert_allclose(row.label_logp_P, label_logp[:, 0], rtol=1e-3, atol=1e-6)


def test_draws_are_from_the_teachers_distribution(work: Path, tmp_path: Path, samples: TokenizedDataset) -> None:
    settings = {"rows": "sampled", "num_samples": 30, "seed": 5, "temperature": 0.5}
    store = Store.open(teach(teach_run(work, tmp_path / "store", **settings)))
    assert len(store) == len(samples) and (store.manifest.entries, store.manifest.seed) == (30, 5)
    for sample in (samples[0], samples[len(samples) - 1]):
        row = store.get(sample.key)
        assert row is not None and row.ids_hash == sample.ids_hash
        p_PV = (logits_of(work / "model", sample.ids)[sample.positions] / 0.5).softmax(-1).numpy()
        same = 0
        for p, us, ids, logp in zip(
            p_PV, uniforms(5, sample.key, len(p_PV), 30), row.ids_PK.tolist(), row.logp_PK, strict=True
        ):
            cumulated = np.cumsum(p)
            counts = Counter(int((cumulated <= u).sum()) for u in us)
            expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            same += [(v, round(30 * math.exp(x))) for v, x in zip(ids, logp, strict=True) if v >= 0] == expected
        assert same > 0.9 * len(p_PV)  # a draw may fall on the border of two ids
        assert np.isneginf(row.log_residual_P).all()
        assert row.label_ids_P is not None and row.label_logp_P is not None
        assert np.array_equal(row.label_ids_P, sample.ids[sample.positions + 1])
        assert float(row.label_logp_P.sum()) == pytest.approx(row.sum_logp, rel=1e-3)
    with pytest.raises(UserError, match="the store's seed is 5, expected 6"):
        teach(teach_run(work, tmp_path / "store", **{**settings, "seed": 6}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"rows": "sampled", "top_k": 7}, {"rows": "top_k", "num_samples": 7}, {"seed": 1}),
        *({"rows": "none", name: 2} for name in ("top_k", "num_samples", "seed", "temperature")),
    ],
)
def test_a_setting_of_the_other_kind_of_rows_is_refused(work: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no effect with rows: "):
        teach_run(work, tmp_path / "store", **changes)


def test_teaching_again_adds_only_what_is_missing(work: Path, tmp_path: Path, samples: TokenizedDataset) -> None:
    store = tmp_path / "store"
    half = {"path": str(work / "chat.jsonl"), "seq_length": 128, "limit": 8}
    teach(teach_run(work, store, data=half))
    before = {path: path.stat().st_mtime_ns for path in store.glob("shard-*")}
    some = len(Store.open(store))
    assert 0 < some < len(samples)
    teach(teach_run(work, store))
    assert len(Store.open(store)) == len(samples)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    teach(teach_run(work, store))
    assert len(Store.open(store)) == len(samples)


def test_parts_join_to_the_store_of_one_run(work: Path, tmp_path: Path, samples: TokenizedDataset) -> None:
    """A part may be empty; what a part has is not asked of the teacher again."""
    whole = Store.open(teach(teach_run(work, tmp_path / "whole")))
    parts = len(samples) + 1
    few = [Store.open(teach(teach_run(work, tmp_path / f"few{i}", part=i, parts=3))) for i in range(3)]
    assert sum(map(len, few)) == len(whole) and all(len(part) >= len(samples) // 3 for part in few)
    empty = Store.open(teach(teach_run(work, tmp_path / "empty", part=parts - 1, parts=parts)))
    assert len(empty) == 0
    merge(open_inputs([store.path for store in [*few, empty]]), tmp_path / "joined")
    joined = Store.open(tmp_path / "joined")
    assert len(joined) == len(whole)
    for sample in samples:
        mine, theirs = joined.coded(sample.key), whole.coded(sample.key)
        assert mine is not None and theirs is not None
        assert (mine[0].tobytes(), mine[1]) == (theirs[0].tobytes(), theirs[1])
    with pytest.raises(UserError, match="part: 3 is none of parts: 3; allowed: 0 to 2"):
        teach_run(work, tmp_path / "none", part=3, parts=3)


def test_only_sums_are_stored_where_asked(work: Path, tmp_path: Path, samples: TokenizedDataset) -> None:
    store = tmp_path / "store"
    for limit in (8, None):  # the second run resumes
        data = {"path": str(work / "chat.jsonl"), "seq_length": 128, "limit": limit}
        teach(teach_run(work, store, data=data, rows="none"))
    opened = Store.open(store)
    assert len(opened) == len(samples) and opened.manifest.rows == "none" and len(opened.shards) == 2
    for sample in list(samples)[::5]:
        row = opened.get(sample.key)
        logp = logits_of(work / "model", sample.ids).log_softmax(1)[sample.positions]
        labels = torch.tensor(sample.ids[sample.positions + 1].astype("int64"))
        assert row is not None and row.num_tokens == len(sample.positions) and row.ids_hash == sample.ids_hash
        assert row.sum_logp == pytest.approx(logp.gather(1, labels[:, None]).sum().item(), rel=1e-5)
    with pytest.raises(UserError, match="the store has rows: none, only a summed log-probability of each sample"):
        TeacherRows(TeacherRowsConfig(store=str(store)), "objective")


def test_equal_samples_are_taught_once(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each data-parallel rank has a writer of its own: what two ranks were given would stand in the store twice."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text((work / "chat.jsonl").read_text() * 2)
    asked: list[bytes] = []

    def score(gpt: Any, dataset: TokenizedDataset, ids: list[int], *rest: Any) -> Any:
        asked.extend(dataset.keys[i] for i in ids)
        return iter(())

    monkeypatch.setattr("fusemega.scoring.teach.score_samples", score)
    run = teach_run(work, tmp_path / "store", data={"path": str(twice), "seq_length": 128})
    teach(run)
    keys = prepare(run.data, Tokenizer.load(work / "model"), tmp_path / "cache").keys
    assert len(keys) == 2 * len(asked) and sorted(asked) == sorted(set(keys))


def test_a_store_of_another_scorer_is_refused(work: Path, tmp_path: Path) -> None:
    store = teach(teach_run(work, tmp_path / "store"))
    other = tiny.write_model(tmp_path / "other", work / "chat.jsonl", seed=1)
    files = sorted(path.name for path in store.iterdir())
    for changes, field in (
        ({"model": {"load": str(other), "dtype": "fp32"}}, "weights"),
        ({"temperature": 2.0}, "temperature"),
        ({"top_k": 5}, "top_k"),
        ({"data": {"path": str(work / "chat.jsonl"), "seq_length": 64}}, "truncation"),
    ):
        with pytest.raises(UserError, match=f"the store's {field} is"):
            teach(teach_run(work, store, **changes))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    for name in ("model.safetensors", "config.json"):
        (other / name).write_bytes((work / "model" / name).read_bytes())
    with pytest.raises(UserError, match="the store's template is"):
        teach(teach_run(work, store, model={"load": str(other), "dtype": "fp32"}))
    assert sorted(path.name for path in store.iterdir()) == files


def test_verify_looks_every_sample_up(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = teach(
        teach_run(work, tmp_path / "store", data={"path": str(work / "chat.jsonl"), "seq_length": 128, "limit": 8})
    )
    lines = (work / "chat.jsonl").read_text().splitlines()
    some, all_of_it = tmp_path / "some.jsonl", work / "chat.jsonl"
    some.write_text("\n".join(lines[:8]))

    def verify(data: Path, model: Path) -> tuple[object, dict[str, Any], str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["store", "verify", str(store), "--data", str(data), "--tokenizer", str(model)])
        out, err = capsys.readouterr()
        return stop.value.code, json.loads(out.splitlines()[-1]) if stop.value.code != 2 else {}, err

    taught = len(Store.open(store))
    status, found, _ = verify(some, work / "model")
    assert status == 0
    counts = {"samples": taught, "missing": 0, "other_tokenization": 0, "first_bad": None}
    assert found == {"path": str(store), "rows": taught, **counts}
    status, found, _ = verify(all_of_it, work / "model")
    assert (status, found["other_tokenization"], found["first_bad"]) == (1, 0, f"{all_of_it}:9")
    assert found["samples"] - found["missing"] == taught < found["samples"]
    other = shutil.copytree(work / "model", tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    status, _, err = verify(some, other)
    assert status == 2 and "the store's template is" in err
    # The same keys, of other token ids: as after another tokenizer's teaching under this one's name.
    rows, manifest = Store.open(store), Store.open(store).manifest
    with StoreWriter(tmp_path / "changed", manifest) as writer:
        for n, sample in enumerate(
            prepare(DataConfig(path=str(some), seq_length=128), Tokenizer.load(work / "model"), tmp_path)
        ):
            row = rows.get(sample.key)
            assert row is not None
            writer.add(sample.key, dataclasses.replace(row, ids_hash=b"otherids") if n == 3 else row)
    store = tmp_path / "changed"
    status, found, _ = verify(some, work / "model")
    assert (status, found["missing"], found["other_tokenization"]) == (1, 0, 1)


def test_top_k_beyond_the_vocabulary(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top_k: 600 is more than the model's vocabulary of 509"):
        teach(teach_run(work, tmp_path / "store", top_k=600))
    assert not (tmp_path / "store").exists()


def test_evaluation_equals_transformers(work: Path, samples: TokenizedDataset) -> None:
    result, _ = evaluate(
        validate(
            EvalRun,
            {
                "model": {"load": str(work / "model"), "dtype": "fp32"},
                "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
                "micro_batch_size": 2,
            },
            "eval.yaml",
        )
    )
    nats, tokens = 0.0, 0
    for sample in samples:
        logp = logits_of(work / "model", sample.ids).log_softmax(-1)
        nats -= sum(float(logp[t, sample.ids[t + 1]]) for t in sample.positions)
        tokens += len(sample.positions)
    assert (result.tokens, result.samples) == (tokens, len(samples))
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    answers = sum(
        len(message["content"].encode())
        for line in (work / "chat.jsonl").read_text().splitlines()
        for message in json.loads(line)["messages"]
        if message["role"] == "assistant"
    )
    assert result.bytes == answers
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / answers, rel=1e-6)


def test_distance_from_a_reference_equals_dense(work: Path, tmp_path: Path, samples: TokenizedDataset) -> None:
    """One of another shape, whose vocabulary has more rows: those name no token, and count in neither."""
    wide = tiny.write_model(tmp_path / "wide", work / "chat.jsonl", seed=2, hidden_size=32, tie_word_embeddings=False)
    tiny.pad_vocabulary(wide, 517)
    run: dict[str, Any] = {
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
    }
    alone, _ = evaluate(validate(EvalRun, run, "eval.yaml"))
    result, _ = evaluate(validate(EvalRun, run | {"reference": {"load": str(wide), "dtype": "fp32"}}, "eval.yaml"))
    assert isinstance(result, Comparison) and not isinstance(alone, Comparison)
    assert {name: getattr(result, name) for name in alone.model_dump()} == pytest.approx(alone.model_dump(), rel=1e-6)
    kl, same = 0.0, 0
    for sample in samples:
        p_PV, q_PV = (
            logits_of(folder, sample.ids)[sample.positions, :509].softmax(-1) for folder in (wide, work / "model")
        )
        kl += float(dense_divergence("forward_kl", p_PV, q_PV).sum())
        same += int((p_PV.argmax(1) == q_PV.argmax(1)).sum())
    assert result.kl == pytest.approx(kl / result.tokens, rel=1e-5) and result.kl > 0.01
    assert 0 < result.same_top_1 < 1 and result.same_top_1 == pytest.approx(same / result.tokens, abs=1e-9)
    itself, _ = evaluate(validate(EvalRun, run | {"reference": run["model"]}, "eval.yaml"))
    assert isinstance(itself, Comparison) and itself.same_top_1 == 1 and itself.kl == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match=r"reference: .*model has a vocabulary of 509, and .*wide one of 517"):
        evaluate(validate(EvalRun, run | {"model": {"load": str(wide)}, "reference": run["model"]}, "eval.yaml"))


@pytest.mark.parametrize(
    "settings",
    [
        {"tail": "residual"},
        {"tail": "renormalise"},
        {"tail": "renormalise", "temperature": 2.0},
        {"rows": "sampled", "temperature": 2.0},
    ],
)
def test_distillation_from_a_store_equals_dense(
    make_run: Callable[..., TrainRun], work: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    teacher = tiny.write_model(tmp_path / "teacher", work / "chat.jsonl", seed=3)
    taught: dict[str, Any] = {"model": {"load": str(teacher), "dtype": "fp32"}}
    if settings.get("rows") == "sampled":
        taught |= {"rows": "sampled", "num_samples": 9, "temperature": 2.0}
    store = teach(teach_run(work, tmp_path / "store", **taught))
    objective = {"name": "distill", "store": str(store), "lambda": 0.3}
    objective |= {name: value for name, value in settings.items() if name != "rows"}
    trainer, _ = open_trainer(make_run(objective=objective))
    rows = Store.open(store)
    t = settings.get("temperature", 1.0)
    ce = kd = 0.0
    count = 0
    for sample in (s for part in trainer.data.step(0).samples for s in part):
        logits = logits_of(work / "model", sample.ids)[sample.positions]
        logq, logq_t = logits.log_softmax(-1), (logits / t).log_softmax(-1)
        row = rows.get(sample.key)
        assert row is not None
        for p, position in enumerate(sample.positions):
            ce -= float(logq[p, sample.ids[position + 1]])
            target = torch.tensor(row.logp_PK[p]).double()
            target = (target / t).softmax(0) if settings.get("tail") == "renormalise" else target.exp()
            ids = torch.tensor(row.ids_PK[p].astype("int64"))
            ids, target = ids[ids >= 0], target[ids >= 0]
            kd -= float((target * logq_t[p, ids]).sum())
            if settings.get("tail") == "residual":
                others = torch.ones(logits.size(1), dtype=torch.bool)
                others[ids] = False
                kd -= math.exp(row.log_residual_P[p]) * float(logq_t[p, others].logsumexp(0))
            count += 1
    values = trainer.step()
    assert values["lm loss"] == pytest.approx(ce / count, rel=1e-5)
    assert values["distill loss"] == pytest.approx(kd / count, rel=1e-5)
    assert values["loss"] == pytest.approx(0.3 * ce / count + 0.7 * t**2 * kd / count, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distance_from_stored_rows_equals_dense(
    work: Path, tmp_path: Path, samples: TokenizedDataset, temperature: float
) -> None:
    """Over the listed ids and all others as one outcome; rows of half of the data are refused."""
    wide = tiny.write_model(tmp_path / "wide", work / "chat.jsonl", seed=2, hidden_size=32, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    model.lm_head.weight.data *= 50  # sure of something else than the other model
    model.save_pretrained(wide)
    lines = (work / "chat.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[: len(lines) // 2]))
    for store, data in (("store", work / "chat.jsonl"), ("half", tmp_path / "half.jsonl")):
        teach(
            teach_run(
                work,
                tmp_path / store,
                model={"load": str(wide), "dtype": "fp32"},
                data={"path": str(data), "seq_length": 128},
                temperature=temperature,
            )
        )
    run: dict[str, Any] = {
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
    }
    result, _ = evaluate(validate(EvalRun, run | {"teacher": {"store": str(tmp_path / "store")}}, "eval.yaml"))
    assert isinstance(result, RowsComparison) and result.taught == result.tokens
    kl = 0.0
    for sample in samples:
        p_PV, q_PV = (
            (logits_of(folder, sample.ids)[sample.positions] / temperature).softmax(-1)
            for folder in (wide, work / "model")
        )
        for p, q in zip(p_PV, q_PV, strict=True):
            top = p.topk(7).indices
            both = [torch.cat([each[top], 1 - each[top].sum()[None]]) for each in (p, q)]
            kl += float((both[0] * (both[0] / both[1]).log()).sum())
    assert result.kl == pytest.approx(kl / result.tokens, abs=3e-4) and result.kl > 0.1
    with pytest.raises(UserError, match=r"no row in the store .*half: "):
        evaluate(validate(EvalRun, run | {"teacher": {"store": str(tmp_path / "half")}}, "eval.yaml"))
    teach(teach_run(work, tmp_path / "draws", rows="sampled", num_samples=4))
    with pytest.raises(UserError, match="draws: the store's rows is 'sampled'"):
        evaluate(validate(EvalRun, run | {"teacher": {"store": str(tmp_path / "draws")}}, "eval.yaml"))
    both = {"teacher": {"store": str(tmp_path / "store")}, "reference": run["model"]}
    with pytest.raises(UserError, match="reference and teacher: give one of them"):
        validate(EvalRun, run | both, "eval.yaml")
