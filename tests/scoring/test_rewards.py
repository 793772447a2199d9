"""`score`: ArmoRM against its form written out; rows of every shape, in order; what is refused; a killed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fusemega.config import validate
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import transformers_logits, verify
from fusemega.errors import UserError
from fusemega.files.results_journal import ResultsJournal
from fusemega.fixtures import tokenizers
from fusemega.fixtures.packages import AssetMissing
from fusemega.hf.folder import HFFolder
from fusemega.passes import score as passes
from fusemega.passes.rewards import GateTokens
from fusemega.scoring.rewards import ScoreRun, score
from fusemega.text.document import BadRow
from fusemega.text.tokenizer import Tokenizer
from tests.scoring.armorm import plain_scores, write_armorm

QUESTION = [{"role": "user", "content": "What is a hedgehog?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


SEVERAL_TURNS = [*QUESTION, *answer("An animal."), {"role": "user", "content": "Which one?"}, *answer("A small one.")]
ROWS: list[dict[str, Any]] = [
    {"messages": SEVERAL_TURNS, "id": "a"},
    {"prompt": QUESTION, "completion": answer("It is a small animal with many spines.")},
    {"prompt": QUESTION, "chosen": answer("A spiny animal."), "rejected": answer("I do not know, ask someone else.")},
    {"prompt": QUESTION, "responses": [answer("A bird."), answer("A spiny animal."), answer("Ein Igel – é animal.")]},
]


@pytest.fixture(scope="module")
def armorm(work: Path) -> Path:
    return write_armorm(work / "armorm", work / "chat.jsonl")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def run_of(
    model: Path, data: Path, output: Path, seq_length: int = 128, rows: dict[str, Any] | None = None, **changes: Any
) -> ScoreRun:
    section: dict[str, Any] = {
        "model": {"load": str(model), "dtype": "fp32"},
        "data": {"path": str(data), "seq_length": seq_length, **(rows or {})},
        "output": str(output),
    }
    return validate(ScoreRun, {**section, **changes}, "score.yaml")


def written(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def conversations(row: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The conversations that a row stands for, one a response."""
    if "messages" in row:
        return [row["messages"]]
    given = (
        row["responses"]
        if "responses" in row
        else [row[key] for key in ("completion", "chosen", "rejected") if key in row]
    )
    return [row["prompt"] + response for response in given]


def test_armorm_equals_its_own_form(armorm: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(armorm)
    header = tokenizer("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)[
        "input_ids"
    ]
    found, _ = score(run_of(armorm, data, tmp_path / "out.jsonl", objectives=True, micro_batch_size=2))
    rows = written(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k not in ("rewards", "objectives")} for row in rows] == ROWS
    seen = []
    for row in rows:
        texts = conversations(row)
        assert len(texts) == len(row["rewards"]) == len(row["objectives"])
        for messages, reward, objectives in zip(texts, row["rewards"], row["objectives"], strict=True):
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
            wanted, wanted_objectives = plain_scores(armorm, ids, header)
            assert reward == pytest.approx(wanted, abs=1e-5) and abs(wanted) > 1e-2
            assert objectives == pytest.approx(wanted_objectives, abs=1e-5) and len(objectives) == 19
            seen.append(reward)
    chosen, rejected = rows[2]["rewards"]
    assert rows[3]["rewards"][1] == chosen  # the same text
    assert found.model_dump() == {
        **{"rows": 4, "responses": 7, "skipped": 0, "pairs": 1, "accuracy": float(chosen > rejected)},
        **{"mean_reward": pytest.approx(sum(seen) / 7), "margin": pytest.approx(chosen - rejected)},
    }


def test_armorm_converts_and_is_no_model_of_transformers(armorm: Path, data: Path, tmp_path: Path) -> None:
    import_hf(armorm, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "again")
    assert verify(armorm, tmp_path / "again").identical
    score(run_of(tmp_path / "megatron", data, tmp_path / "a.jsonl"))
    score(run_of(armorm, data, tmp_path / "b.jsonl"))
    assert written(tmp_path / "a.jsonl") == written(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no such class without the code in the model's folder"):
        transformers_logits(armorm, [1, 2], HFFolder(armorm).architecture)


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (ROWS[:1] + [{"text": "No header here."}], {}, ["rows.jsonl:2: its text has none of the headers"]),
        (ROWS[:1] + [{**ROWS[3], "rewards": [1, 2, 3]}], {}, ["rows.jsonl:2: the row has rewards already"]),
        (
            [{"prompt": QUESTION, "responses": [{"text": "A", "reward": 1}, {"text": "B", "reward": 0}]}],
            {},
            ["rows.jsonl:1: the row has responses[0].reward already"],
        ),
        (ROWS, {"seq_length": 30}, ["rows.jsonl:1: a response has", "more than data.seq_length (30)"]),
        ([{"prompt": "a"}], {}, ["rows.jsonl:1: found the keys prompt"]),
    ],
    ids=["header", "rewards", "objects", "long", "shape"],
)
def test_refused_before_anything_is_written(
    armorm: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], words: list[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as error:
        score(run_of(armorm, data, tmp_path / "out.jsonl", **changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    with pytest.raises(UserError, match="rows.jsonl: exists; nothing is overwritten"):
        score(run_of(armorm, data, data))


def test_unusable_rows_are_left_out_and_counted(
    armorm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": "No header here."}, ROWS[1], {"prompt": 3}, ROWS[2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = score(run_of(armorm, data, tmp_path / "out.jsonl", rows={"on_bad_row": "skip"}))
    assert [row["prompt"] for row in written(tmp_path / "out.jsonl")] == [QUESTION, QUESTION]
    assert (found.rows, found.responses, found.skipped) == (2, 3, 2)
    assert "1 (no assistant header)" in capsys.readouterr().err


def test_other_models_are_refused(work: Path, armorm: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM; allowed here: LlamaForSequenceClassification, LlamaForRew"):
        score(run_of(work / "model", data, tmp_path / "out.jsonl"))
    config = json.loads((armorm / "config.json").read_text())
    other = tmp_path / "other"
    write_armorm(other, work / "chat.jsonl")
    for change, words in (
        ({"gating_temperature": 0}, "gating_temperature = 0, expected a positive number"),
        ({"gating_n_hidden": "2"}, "gating_n_hidden = '2', expected a positive integer"),
        ({"gating_hidden_dim": 13}, r"gating.layers.0.weight has shape \[12, 32\], and config.json says \[13, 32\]"),
        ({"gating_width": 13}, "unknown key 'gating_width'"),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=words):
            score(run_of(other, data, tmp_path / "out.jsonl"))


def test_a_killed_run_goes_on_where_it_stopped(
    armorm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score(run_of(armorm, data, tmp_path / "whole.jsonl"))
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(passes, "ROWS_PER_PASS", 2)
    record, passed = ResultsJournal.record, []

    def dies(journal: ResultsJournal, found: Any) -> None:
        if len(passed) == 2:
            raise KeyboardInterrupt
        passed.append(found)
        record(journal, found)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResultsJournal, "record", dies)
        score(run_of(armorm, data, output))
    scratch = tmp_path / ".out.jsonl.incomplete"
    assert not output.exists() and scratch.is_dir()
    with open(scratch / "journal.jsonl", "a") as file:
        file.write('{"half a line')
    with pytest.raises(UserError, match="begun with another model or settings .objectives differ."):
        score(run_of(armorm, data, output, objectives=True))
    capsys.readouterr()
    found, _ = score(run_of(armorm, data, output))
    assert "scoring 2 texts; 4 are scored already" in capsys.readouterr().err
    for row, wanted in zip(written(output), written(tmp_path / "whole.jsonl"), strict=True):
        assert row.pop("rewards") == pytest.approx(wanted.pop("rewards"), abs=1e-6) and row == wanted
    assert not scratch.exists() and found.responses == 7


def test_the_gate_is_read_at_the_last_header(work: Path) -> None:
    """With Llama-3's own tokenizer the header has the ids for which the model's own code looks."""
    with pytest.raises(UserError, match=r"has no token '<\|eot_id\|>'"):
        GateTokens(Tokenizer.load(work / "model"))
    try:
        gates = GateTokens(Tokenizer.load(tokenizers.tokenizer("llama3")))
    except AssetMissing as error:
        pytest.skip(str(error))
    header = [128009, 128006, 78191, 128007, 271]
    assert gates.gate(np.array([128000, *header, 9906, *header, 13347, 128009], dtype=np.int32)) == 7
    with pytest.raises(BadRow, match=r"has none of the headers .* \(the ids \[128009, 128006, 78191, 128007, 271\]\)"):
        gates.gate(np.array(header[1:]))
