"""The read plan against what loading really reads, box by box."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from fusemega.checkpoint.megatron_folder import MegatronFolder
from fusemega.checkpoint.read_plan import RankReads, plan_reads, size, table
from fusemega.convert.convert import import_hf
from fusemega.errors import UserError
from fusemega.files.boxes import Box, volume
from fusemega.hf.folder import HFFolder
from fusemega.models.build import build_model, fill, placements
from fusemega.runtime.parallel import World
from tests.checkpoint.conftest import save_llama
from tests.models.test_stages import layout


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_reads_what_the_plan_says(world: World, tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    folder = HFFolder(save_llama(tmp_path / "model", dtype, tie_word_embeddings=tied))
    read: Counter[str] = Counter()
    nbytes = 0

    def spy(name: str, box: Box) -> torch.Tensor:
        nonlocal nbytes
        read[name] += 1
        value = folder.read(name, box)
        nbytes += value.nbytes
        return value

    model = build_model(folder.architecture, world, dtype)
    fill(model, world, spy)
    files = len(list(folder.path.glob("*.safetensors")))
    assert plan_reads(folder, layout(1, 1)) == [RankReads(0, 0, len(read), read.total(), nbytes, files)]
    import_hf(folder.path, tmp_path / "megatron")
    held = sum(volume(piece.local_box) for placement in placements(model, world) for piece in placement.pieces)
    count = len(list(model.parameters()))
    wanted = [RankReads(0, 0, count, count, held * dtype.itemsize, 0)]
    assert plan_reads(MegatronFolder(tmp_path / "megatron"), layout(1, 1)) == wanted


def test_ranks_share_the_bytes_except_norms_and_a_tied_head(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder = HFFolder(save_llama(tmp_path / "model", tie_word_embeddings=True, **sizes))
    whole = sum(torch.Size(folder.shape(name)).numel() * 4 for name in folder)
    norms = sum(torch.Size(folder.shape(name)).numel() * 4 for name in folder if "norm" in name)
    embedding = 101 * 32 * 4
    for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2), (4, 4)):
        reads = plan_reads(folder, layout(tp, pp))
        assert [(r.pp_rank, r.rank) for r in reads] == [(p, t) for p in range(pp) for t in range(tp)]
        assert sum(r.nbytes for r in reads) == whole + (tp - 1) * norms + (pp > 1) * embedding
    assert len({folder.file(name) for name in folder}) >= max(r.files for r in plan_reads(folder, layout(1, 4))) > 1
    with pytest.raises(UserError, match="does not divide this model's 4 layers"):
        plan_reads(folder, layout(1, 3))


def test_ranks_that_read_equally_much_share_a_line() -> None:
    reads = [RankReads(0, rank, 9, 12, 2_500_000 - (rank == 3), 2) for rank in range(4)]
    lines = table([*reads, RankReads(1, 0, 5, 5, 7, 0)]).splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        ["0", "0-2", "9", "12", "2.50", "MB", "2"],
        ["0", "3", "9", "12", "2.50", "MB", "2"],
        ["1", "0", "5", "5", "7", "B", "-"],
    ]
    assert lines[-1] == "5 rank(s) read 10.0 MB in all, 2.50 MB at most"
    assert len({len(line) for line in lines[:-1]}) == 1


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345_678, "12.3 MB"), (141_107_412_992, "141.1 GB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
