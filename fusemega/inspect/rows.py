"""Opens the samples that a run file names, without the rest of the run, and finds some by their row or their key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError, printable
from fusemega.files.cache import cache_folder
from fusemega.models.heads import REWARD
from fusemega.runtime.layout import ParallelConfig
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.tokenizer import SPACES, Tokenizer
from fusemega.training.run_file import TrainRun

_NEWLINE = "⏎"


@dataclass(frozen=True)
class Rows:
    """The samples of one data section.

    Attributes:
        dataset: all of them.
        tokenizer: the model's.
        source: the model, of which only configuration and headers were read.
    """

    dataset: TokenizedDataset
    tokenizer: Tokenizer
    source: ModelSource

    @classmethod
    def of(cls, run: TrainRun, data: DataConfig | None = None) -> Rows:
        """The samples that the run trains on, or those of another data section of it; its layout does not matter.

        Raises:
            UserError: the model's folder or the data cannot be read.
        """
        source = ModelSource(run.model, ParallelConfig(), 1, run.data.chat_template, ("vocabulary", *REWARD))
        cache = cache_folder() / "data"
        dataset = prepare(
            data or run.data,
            source.tokenizer,
            cache,
            vocab_size=source.vocab_size,
            progress=True,
            share_prefix=run.training.share_prefix,
        )
        return cls(dataset, source.tokenizer, source)


def samples_of_row(dataset: TokenizedDataset, row: str | None) -> list[int]:
    """The samples of a row: its windows, or its group.

    Args:
        row: its number in its file, counted from 1 (where there is one file); or FILE:NUMBER as errors print it, of
            which the end is enough. None: the first row that has a sample.

    Raises:
        UserError: no sample is of that row.
    """
    if row is None:
        return samples_of_row(dataset, dataset[0].source)
    if not re.fullmatch(r"(.+:)?\d+", row):
        raise UserError(f"--row: found {row!r}; expected a row's number, or FILE:NUMBER")
    wanted = row if ":" in row else f":{row}"
    found = [i for i in dataset.of_number(int(row.rpartition(":")[2])) if dataset[i].source.endswith(wanted)]
    places = sorted({dataset.place(i) for i in found})
    if not found:
        first, last = dataset[0].source, dataset[len(dataset) - 1].source
        raise UserError(f"--row: no sample is of row {row}; the data's rows go from {first} to {last}")
    if len(places) > 1:
        names = [dataset[next(i for i in found if dataset.place(i) == place)].source for place in places]
        raise UserError(f"--row: {row} is a row of {len(names)} files: {', '.join(names[:4])}; give FILE:NUMBER")
    return found


def samples_of_key(dataset: TokenizedDataset, key: str) -> list[int]:
    """The samples whose key begins with these hex digits.

    Raises:
        UserError: not hex digits, or more than a key has.
    """
    if not re.fullmatch(r"[0-9a-f]{4,32}", key):
        raise UserError(f"{key}: not a sample's key; expected 4 to 32 hex digits, as errors print them")
    return [i for i, each in enumerate(dataset.keys) if each.hex().startswith(key)]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token for a person to read: its text, with the space it begins with and its line breaks visible; or its form in
    the vocabulary if it is only a part of a character."""
    if token_id >= tokenizer.num_ids:
        return f"<id {token_id}>"  # of a model with more rows than its tokenizer has ids
    form = tokenizer.token(token_id)
    text = str(tokenizer.hf.decode([int(token_id)], clean_up_tokenization_spaces=False))
    if not text or "\ufffd" in text:
        return printable(form)
    if form.startswith(SPACES) and not text.startswith(" "):
        text = f" {text}"
    return printable(text.replace("\n", _NEWLINE))
