"""What a reward model of either kind of head gives for a micro-batch's texts.

Shape suffixes: S sequences of a micro-batch, H hidden size, M objectives of a gated head.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fusemega.errors import UserError
from fusemega.models.build import GPT
from fusemega.models.gated_head import GATE_TEXT
from fusemega.passes.forward import last_rows, sequence_scores
from fusemega.passes.micro_batch import Fields, MicroBatch
from fusemega.runtime.context_parallel import sum_over_context
from fusemega.runtime.parallel import World
from fusemega.text.document import BadRow
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer

_GATE = "gate"


class GateTokens(Fields):
    """For a model with a gated head: where each text's gate token is, whose hidden state weighs the objectives.

    It is the first token of the last header that opens an assistant's turn. With Llama-3's tokenizer the header is
    128009, 128006, 78191, 128007, 271, the ids for which the model's own code looks.

    Args:
        tokenizer: the model's.

    Raises:
        UserError: a special token of the header is not a token of this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        (encoding,) = tokenizer.encode([GATE_TEXT])
        self._ids = np.asarray(encoding.ids, dtype=np.int64)
        for special in ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"):
            if special not in tokenizer.added_tokens:
                raise UserError(
                    f"{tokenizer.source}: the tokenizer has no token {special!r}, and the architecture reads its "
                    f"weights at {GATE_TEXT!r}"
                )

    def gate(self, ids: np.ndarray) -> int:
        """Index of the gate token among the ids of a text.

        Raises:
            BadRow: there is no such header.
        """
        size = len(self._ids)
        windows = np.lib.stride_tricks.sliding_window_view(ids, size) if len(ids) >= size else np.empty((0, size))
        hits = np.flatnonzero((windows == self._ids).all(axis=1))
        if not len(hits):
            raise BadRow(
                "no assistant header",
                f"its text has none of the headers {GATE_TEXT!r} (the ids {self._ids.tolist()}), at which the model "
                "reads the weights of its objectives",
            )
        return int(hits[-1])

    def token_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {_GATE: np.array(self.gate(sample.ids))}


def reward_rows(gpt: GPT) -> Callable[[MicroBatch], torch.Tensor]:
    """Picks the tokens of a row whose hidden states `rewards` reads; for `run_schedule`."""
    if gpt.architecture.head == "scalar":
        return last_rows
    return lambda batch: torch.cat([batch.last_tokens, batch.token_fields[_GATE]]).clamp(min=0)


def rewards(
    gpt: GPT, hidden: torch.Tensor, batch: MicroBatch, world: World
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of each sequence its reward [S], and of a gated head the objectives [S, M]. Only on the last stage.

    Collective over context parallelism: each of its ranks gets all of them.

    Args:
        hidden: hidden states of the tokens that `reward_rows` picks: [S, H], or [2 S, H] for a gated head.
    """
    if gpt.architecture.head == "scalar":
        return sequence_scores(gpt, hidden, batch, world), None
    if world.cp_size > 1:
        # A sequence's two tokens may be on two ranks: each gives the states that it has, and all get both.
        here = torch.cat([batch.last_tokens, batch.token_fields[_GATE]]) >= 0
        hidden = sum_over_context(torch.where(here[:, None], hidden, 0.0), world.cp_group)
    last_SH, gate_SH = hidden.chunk(2)
    return gpt.gated_scores(last_SH, gate_SH)
