"""What quickstarts prepare in Python: a model without some layers, and rows of text that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.output import write_durably
from fusemega.pipeline.functions import stage_function


@stage_function
def cut(model: str, out: str, drop: Collection[int]) -> list[int]:
    """Writes `model` without the layers `drop` as folder `out`; returns these layers."""
    from fusemega.hf.cut_layers import cut_layers
    from fusemega.hf.hub import resolve
    from fusemega.runtime.parallel import ParallelConfig, initialize

    cut_layers(resolve(model), Path(out), drop, initialize(ParallelConfig()))
    return list(drop)


@stage_function
def choose_rows(models: Sequence[str], files: Sequence[dict[str, Any]], seq_length: int) -> dict[str, int]:
    """Writes the first rows of each file that fit its budget; returns the number of tokens of each, by file name.

    Args:
        models: tokens are counted with the first one's tokenizer. With several models, rows longer than a window of
            one of them are left out.
        files: `source` and `out` (JSONL) and the budget `tokens` of each.
        seq_length: tokens of a window.

    Raises:
        UserError: no row of a file fits.
    """
    counts = {}
    for file in files:
        out, source, budget = Path(file["out"]), Path(file["source"]), int(file["tokens"])
        out.parent.mkdir(parents=True, exist_ok=True)
        chosen, tokens = [], 0
        for row, length in sorted(_lengths(models, source, seq_length).items()):
            if tokens + length <= budget:
                chosen.append(row)
                tokens += length
        if not chosen:
            raise UserError(f"{source}: none of its rows has at most {budget} tokens")
        # Rows end at newlines alone; a text may contain other characters at which `splitlines` would cut.
        lines = source.read_text(encoding="utf-8").split("\n")
        write_durably(out, "".join(lines[number - 1] + "\n" for number in chosen))
        counts[out.stem] = tokens
    return counts


def _lengths(models: Sequence[str], path: Path, seq_length: int) -> dict[int, int]:
    """Row number -> number of tokens with the first model's tokenizer, for the rows that suit all tokenizers."""
    from fusemega.hf.hub import resolve
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.tokenizer import Tokenizer

    common: dict[int, int] | None = None
    for model in models:
        config = DataConfig(path=str(path), seq_length=seq_length)
        samples = prepare(config, Tokenizer.load(resolve(model)), cache_folder() / "data", progress=True)
        lengths: dict[int, int] = {}
        windows: dict[int, int] = {}
        for sample in samples:
            row = int(sample.source.rsplit(":", 1)[1])
            lengths[row] = lengths.get(row, 0) + len(sample.ids)
            windows[row] = windows.get(row, 0) + 1
        if len(models) > 1:
            lengths = {row: length for row, length in lengths.items() if windows[row] == 1}
        common = lengths if common is None else {row: n for row, n in common.items() if row in lengths}
    return common or {}
