"""A labels file: how often each mode is right on each prompt, and what it costs.

OUT/labels/SET.jsonl    {"key", "prompt", "domain"..., "short": {"correct", "tokens", "cut"}, "long": the same}
OUT/labels/SET.json     what it was made with, its hash and counts

`correct` has true, false or null (undecided) for each response that the engine did not refuse, `tokens` its length.

Shape suffixes: N prompts, M modes (short, long).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.errors import UserError
from fusemega.files.integrity import file_hash
from fusemega.files.json_files import read_json, read_lines
from fusemega.switch.families import MODES


@dataclass(frozen=True)
class Labels:
    """The labels of a set of prompts.

    Attributes:
        path: the file.
        keys: `prompt_key` of each prompt.
        messages: each prompt.
        rates_NM: float64, the share of right responses.
        tokens_NM: float64, the mean number of tokens of a response.
        counts_NM: int64, the responses that the rate is over.
        first_short: of each prompt the first response of the short mode, (right, tokens); None where it was refused or
            is undecided.
        digest: hash of the file.
        modes: `Modes.identity` of those that answered.
    """

    path: Path
    keys: tuple[str, ...]
    messages: tuple[Sequence[Mapping[str, Any]], ...]
    rates_NM: np.ndarray
    tokens_NM: np.ndarray
    counts_NM: np.ndarray
    first_short: tuple[tuple[bool, int] | None, ...]
    digest: str
    modes: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def gain_N(self) -> np.ndarray:
        """float64 [N], by how much more often the long mode is right."""
        gain: np.ndarray = self.rates_NM[:, 1] - self.rates_NM[:, 0]
        return gain

    def take(self, places: Sequence[int] | np.ndarray) -> Labels:
        """The labels of some of the prompts, in this order."""
        chosen = [int(place) for place in places]
        return Labels(
            self.path,
            tuple(self.keys[i] for i in chosen),
            tuple(self.messages[i] for i in chosen),
            self.rates_NM[chosen],
            self.tokens_NM[chosen],
            self.counts_NM[chosen],
            tuple(self.first_short[i] for i in chosen),
            self.digest,
            self.modes,
        )


def side_file(path: Path) -> Path:
    """Beside a labels file: what it was made with."""
    return path.with_suffix(".json")


def read_labels(path: Path) -> Labels:
    """The labels in a file of `fusemega switch label`.

    Raises:
        UserError: no such file, a damaged or a changed one.
    """
    side = side_file(path)
    if not path.is_file() or not side.is_file():
        raise UserError(f"{path}: no labels; run `fusemega switch label` first")
    said, digest = read_json(side), file_hash(path)
    if said.get("hash") != digest:
        raise UserError(f"{path}: not the labels that {side.name} describes; run `fusemega switch label` again")
    lines, torn = read_lines(path)
    if torn or not lines:
        raise UserError(f"{path}: damaged: its last line is not whole, or it has none")
    rates, tokens, counts, firsts = [], [], [], []
    for number, row in lines:
        try:
            modes = [row[mode] for mode in MODES]
            decided = [[c for c in mode["correct"] if c is not None] for mode in modes]
            rates.append([sum(each) / len(each) for each in decided])
            tokens.append([sum(mode["tokens"]) / len(mode["tokens"]) for mode in modes])
            counts.append([len(each) for each in decided])
            first = modes[0]["correct"][0]
            firsts.append(None if first is None else (bool(first), int(modes[0]["tokens"][0])))
        except (KeyError, TypeError, ZeroDivisionError, IndexError):
            raise UserError(f"{path}:{number}: not a label") from None
    return Labels(
        path,
        tuple(row["key"] for _, row in lines),
        tuple(row["prompt"] for _, row in lines),
        np.array(rates),
        np.array(tokens),
        np.array(counts),
        tuple(firsts),
        digest,
        said.get("modes", {}),
    )
