"""Groups of samples stay whole, whatever the layout: in a global batch, in a row, over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusemega.errors import UserError
from fusemega.losses.registry import check_data
from fusemega.losses.sft import SFT
from fusemega.passes.batches import RowShape, TrainingData, check_groups
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.layout import ParallelConfig
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from tests.losses.pairwise import Pairwise
from tests.text.toys import byte_level

GROUPS, BATCH = 12, 4
OBJECTIVE = Pairwise(Pairwise.Settings())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    folder = tmp_path_factory.mktemp("groups")
    rows: list[dict[str, Any]] = [
        {"prompt": f"{n} ", "responses": ["word " * (1 + (n + i) % 5) for i in range(2 + n % 3)], "rewards": [n] * k}
        for n, k in ((n, 2 + n % 3) for n in range(GROUPS - 1))
    ] + [{"prompt": "x", "chosen": "good", "rejected": "bad"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(DataConfig(path=str(folder / "rows.jsonl"), seq_length=64), byte_level(None), folder / "cache")


def batches_of(dataset: TokenizedDataset, step: int, dp: int, cp: int, **shape: Any) -> list[list[list[MicroBatch]]]:
    """[data-parallel rank][context-parallel rank] -> its micro-batches."""
    layout = ParallelConfig(context_parallel_size=cp)
    shapes = {"seq_length": 64, "micro_batch_size": 1, "packing": True, "pad_id": 0, "unit": layout.row_unit}
    row_shape = RowShape(**(shapes | shape))
    found = []
    for dp_rank in range(dp):
        ranks = []
        for cp_rank in range(cp):
            world: Any = SimpleNamespace(
                layout=layout, dp_size=dp, dp_rank=dp_rank, cp_size=cp, cp_rank=cp_rank, pp_size=1,
                device=torch.device("cpu"),
            )  # fmt: skip
            ranks.append(TrainingData(dataset, OBJECTIVE, row_shape, BATCH, 7, world).step(step).micro_batches)
        found.append(ranks)
    return found


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("shape", [{}, {"packing": False}, {"micro_batch_size": 2}], ids=str)
def test_a_global_batch_is_whole_groups(dataset: TokenizedDataset, dp: int, cp: int, shape: dict[str, Any]) -> None:
    members = {dataset[i].source: u for u in range(GROUPS) for i in dataset.unit(u)}
    assert dataset.num_units == GROUPS == len(members)
    seen: list[int] = []
    for step in range(GROUPS // BATCH):
        for ranks in batches_of(dataset, step, dp, cp, **shape):
            for parts in zip(*ranks, strict=True):
                whole = parts[0]
                owners = [members[source] for source in whole.sources]
                assert owners == [u for u in dict.fromkeys(owners) for _ in dataset.unit(u)], "whole, and in order"
                seen += dict.fromkeys(owners)
                numbers = list(dict.fromkeys(owners))
                assert whole.groups.tolist() == [numbers.index(u) for u in owners]
                assert whole.group_sizes.tolist() == [len(dataset.unit(u)) for u in numbers]
                assert whole.group_fields["has_rewards"].tolist() == [u < GROUPS - 1 for u in numbers]
                assert OBJECTIVE.counts(whole) == {"pairwise": len(numbers)}
                # Context-parallel ranks share the tokens; one of them has each sequence's last, where its text ends.
                held = torch.stack([part.last_tokens for part in parts]) if owners else torch.empty(cp, 0)
                assert ((held >= 0).sum(0) == 1).all()
                last = [part.tokens[0, i].item() for s in range(len(owners)) for part in parts
                        if (i := int(part.last_tokens[s])) >= 0]  # fmt: skip
                assert last == [byte_level(None).eos_id] * len(owners)
    assert sorted(seen) == list(range(GROUPS)), "an epoch has every group once"


def test_a_group_must_fit_with_its_padding(dataset: TokenizedDataset) -> None:
    longest = max(int(dataset.lengths[list(dataset.unit(u))].sum()) for u in range(GROUPS))
    check_groups(dataset, longest, ParallelConfig())
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: its \d responses take \d+ tokens, .* a multiple of 8 for"):
        check_groups(dataset, longest, ParallelConfig(context_parallel_size=4))


def test_objectives_and_data_of_other_units_refuse_each_other(dataset: TokenizedDataset, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"]}\n{"text": "plain"}\n')
    mixed = prepare(DataConfig(path=str(tmp_path / "one.jsonl")), byte_level(None), tmp_path / "cache")
    check_data(OBJECTIVE, dataset)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the row has several responses .*objective.name sft trains"):
        check_data(SFT(), dataset)
    with pytest.raises(UserError, match=r"one.jsonl:2: the row is one text, and objective.name pairwise compares"):
        check_data(OBJECTIVE, mixed)
