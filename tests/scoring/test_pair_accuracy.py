"""`eval` on pairs, against log-probabilities by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusemega.config import validate
from fusemega.scoring.evaluate import EvalRun, evaluate
from fusemega.scoring.pair_accuracy import PairsEvaluation
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.tokenizer import Tokenizer


@pytest.fixture
def pairs(work: Path, tmp_path: Path) -> Path:
    """Answers to questions beside the answers to others."""
    rows = [json.loads(line)["messages"] for line in (work / "chat.jsonl").read_text().splitlines()][:9]
    others = [*rows[1:], rows[0]]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": row[:1], "chosen": row[1:2], "rejected": other[1:2]}) + "\n"
            for row, other in zip(rows, others, strict=True)
        )
    )
    return file


def test_pair_accuracy_equals_transformers(work: Path, pairs: Path, tmp_path: Path) -> None:
    data = {"path": str(pairs), "seq_length": 256}
    model = {"load": str(work / "model"), "dtype": "fp32"}
    result, _ = evaluate(validate(EvalRun, {"model": model, "data": data, "micro_batch_size": 2}, "eval.yaml"))
    dataset = prepare(DataConfig(**data), Tokenizer.load(work / "model"), tmp_path / "cache")
    dense = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    sums, means = [], []
    for sample in dataset:
        with torch.no_grad():
            logp = dense(torch.tensor(sample.ids.astype("int64"))[None]).logits[0].double().log_softmax(-1)
        sums.append(sum(float(logp[t, sample.ids[t + 1]]) for t in sample.positions))
        means.append(sums[-1] / len(sample.positions))
    assert isinstance(result, PairsEvaluation) and result.pairs == 9 and result.samples == 18
    for name, values in (("sum", sums), ("mean", means)):
        margin = np.array(values).reshape(-1, 2) @ [1.0, -1.0]
        assert (np.abs(margin) > 1e-4).all()  # none is decided by rounding
        assert 0 < (margin > 0).mean() < 1
        assert getattr(result, f"accuracy_{name}") == pytest.approx((margin > 0).mean())
        assert getattr(result, f"margin_{name}") == pytest.approx(margin.mean(), rel=1e-5, abs=1e-5)
    assert result.loss == pytest.approx(-sum(sums) / result.tokens, rel=1e-6)
    assert result.tokens == sum(len(sample.positions) for sample in dataset)


def test_beside_a_reference_there_is_no_accuracy(work: Path, pairs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = {"load": str(work / "model"), "dtype": "fp32"}
    run = {"model": model, "data": {"path": str(pairs), "seq_length": 256}, "reference": model}
    result, _ = evaluate(validate(EvalRun, run, "eval.yaml"))
    assert not isinstance(result, PairsEvaluation) and result.kl == pytest.approx(0, abs=1e-6)  # type: ignore[attr-defined]
