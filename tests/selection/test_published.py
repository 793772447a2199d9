"""FuseAI's sets: their columns, and the counts of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusemega.errors import UserError
from fusemega.selection.published import PARTS, compare_counts, convert_published, part_of
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from tests.selection.make import read
from tests.text.toys import byte_level

SFT: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
    "dataset": "openmathinstruct2",
    "source_model": "Qwen2.5-72B-Instruct",
}
DPO: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
    "dataset": "openmathinstruct2",
    "source_model": "Qwen2.5-72B-Instruct",
}


def test_the_table_adds_up() -> None:
    """The totals of FuseChat-3.0's README."""
    assert sum(part.sft for part in PARTS) == 94_539 and sum(part.dpo for part in PARTS) == 64_128
    assert sum(part.sft + part.dpo for part in PARTS) == 158_667


def test_each_name_of_the_table_is_its_own_part() -> None:
    assert [part_of(part.name) for part in PARTS] == [part.name for part in PARTS]
    assert part_of("magpie_pro_dpo") == "Magpie-Pro-DPO-100K" and part_of("mt-bench") == "mt-bench"


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_rows_become_those_that_train_reads(kind: str, tmp_path: Path) -> None:
    for name, row, wanted in (
        (
            "fusechat3-sft",
            SFT,
            {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
        ),
        ("fusechat3-dpo", DPO, {name: DPO[name] for name in ("prompt", "chosen", "rejected")}),
    ):
        rows = [row, {**row, "dataset": "other"}]
        data, out = tmp_path / f"{name}.{kind}", tmp_path / f"{name}-{kind}.out.jsonl"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), data)
        else:
            text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(each) + "\n" for each in rows)
            data.write_text(text, encoding="utf-8")
        found = convert_published(name, str(data), out, allow_other_counts=True)
        assert found == {"wrote": str(out), "rows": 2, "datasets": {"OpenMathInstruct-2": 1, "other": 1}}
        written = read(out)
        assert written[0] == wanted | {"dataset": "openmathinstruct2", "source": "Qwen2.5-72B-Instruct"}
        dataset = prepare(DataConfig(path=str(out), seq_length=256), byte_level(), tmp_path / "cache")
        assert dataset.num_units == 2


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "2 + 2?"}], **{k: DPO[k][0] for k in ("chosen", "rejected")}},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
    ids=["turns", "strings", "sharegpt"],
)
def test_other_spellings_of_a_pair(row: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({**row, "note": 1}) + "\n", encoding="utf-8")
    convert_published("fusechat3-dpo", str(data), tmp_path / "out.jsonl", allow_other_counts=True)
    (written,) = read(tmp_path / "out.jsonl")
    assert written == {name: DPO[name] for name in ("prompt", "chosen", "rejected")}


def test_counts_are_compared_by_data_set(tmp_path: Path) -> None:
    right = {part.name: part.dpo for part in PARTS if part.dpo}
    assert compare_counts(right, "dpo") == []
    assert compare_counts(right | {"leetcode": 1_235, "mt-bench": 3}, "dpo") == [
        "leetcode has 1,235 rows, the table says 1,236",
        "'mt-bench' has 3 rows, and is not in the table",
    ]
    data = tmp_path / "train.json"
    data.write_text(json.dumps([DPO]), encoding="utf-8")
    wanted = (
        r"train.json: other counts.*OpenMathInstruct-2 has 1 rows, the table says 11,615;.*--allow-other-counts would"
    )
    with pytest.raises(UserError, match=wanted):
        convert_published("fusechat3-dpo", str(data), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "train.jsonl:1: the row has no prompt; found text"),
        ({**DPO, "rejected": None}, "train.jsonl:1: the row has no rejected"),
        ({**DPO, "rejected": DPO["chosen"]}, "train.jsonl:1: chosen and rejected are the same"),
        ({**DPO, "prompt": [{"value": "a"}]}, r"train.jsonl:1: prompt\[0\].role is a string, found null"),
        ({**DPO, "prompt": 3}, "train.jsonl:1: prompt is a list of turns, found a number"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        convert_published("fusechat3-dpo", str(data), tmp_path / "out.jsonl", allow_other_counts=True)
    with pytest.raises(UserError, match="unknown name 'fusechat3-dop' .did you mean 'fusechat3-dpo'"):
        convert_published("fusechat3-dop", str(data), tmp_path / "out.jsonl")
