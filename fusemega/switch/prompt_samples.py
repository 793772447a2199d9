"""Prompts, and prompts with an answer, as samples of a forward pass: known by the prompt's key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fusemega.errors import UserError
from fusemega.text.sample import Sample


class PromptSamples:
    """Samples in memory, by number; see `passes.batches.HeldSamples`.

    Attributes:
        lengths: int64 [len(self)], tokens of each.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)
        self.lengths: np.ndarray = np.array([len(sample.ids) for sample in self._samples], dtype=np.int64)

    @classmethod
    def of(
        cls,
        prompts: Sequence[tuple[str, Sequence[int], str]],
        longest: int,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> PromptSamples:
        """Samples of token ids.

        Args:
            prompts: of each prompt its key (32 hex digits), ids, and place for messages.
            longest: tokens that a sample may have.
            answers: what follows each prompt, and is supervised; None: nothing.

        Raises:
            UserError: a sample is too long (its place).
        """
        samples = []
        for number, (key, ids, place) in enumerate(prompts):
            answer = answers[number] if answers is not None else ()
            whole = np.array([*ids, *answer], dtype=np.int32)
            if len(whole) > longest:
                raise UserError(
                    f"{place}: the prompt has {len(whole)} "
                    f"tokens{' with its answer' if answers is not None else ''}, more "
                    f"than features.seq_length ({longest})"
                )
            supervised = np.arange(len(whole)) >= len(ids)
            ends = np.full(len(whole), -1, dtype=np.int32)
            samples.append(Sample(bytes.fromhex(key), whole, supervised, ends, 0, place))
        return cls(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def __getitem__(self, i: int) -> Sample:
        return self._samples[i]

    def ids(self, i: int) -> np.ndarray:
        """int32, the tokens of one."""
        return self._samples[i].ids
