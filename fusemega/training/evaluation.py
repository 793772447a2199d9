"""A model's log-probability of a data set: perplexity, and bits per byte, which compares across tokenizers.

Shapes: N supervised positions of a micro-batch, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field

from fusemega.config import Section
from fusemega.losses.vocab import Query, sparse_log_probs
from fusemega.models.build import GPT
from fusemega.runtime.parallel import World
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample
from fusemega.training.batches import RowShape
from fusemega.training.forward import Batch, head_settings, total_over_ranks
from fusemega.training.passes import score_samples


class EvaluationSection(Section):
    """Held-out text, scored while a run trains: before the first update, every `interval`, and after the last."""

    data: DataConfig
    interval: int = Field(ge=1, description="iterations between evaluations")
    patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations in a row without a new lowest loss"
    )
    keep_best: bool = Field(
        False, description="save a checkpoint at each new lowest loss, keep the best one, and export that at the end"
    )


class Evaluation(BaseModel):
    """What an evaluation found, over all supervised tokens.

    Attributes:
        loss: mean negative log-probability a token, nats.
        perplexity: exp(loss).
        bits_per_byte: negative log-probability in bits over the UTF-8 bytes of supervised text.
        tokens, bytes, samples: how much was scored.
    """

    model_config = ConfigDict(frozen=True)

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    samples: int


def evaluate_model(gpt: GPT, dataset: TokenizedDataset, shape: RowShape, world: World) -> Evaluation:
    """Score every sample. Leaves the model in evaluation mode. Collective; every rank gets the result."""

    def score(hidden_NH: torch.Tensor, batch: Batch, samples: Sequence[Sample]) -> torch.Tensor:
        rows = sparse_log_probs(
            hidden_NH, gpt.head_weight(), Query(batch["labels"][:, None]), **head_settings(gpt, world)
        )
        # Of a sample that context-parallel ranks share, each has its own tokens, and one counts the bytes.
        num_bytes = sum(sample.num_bytes for sample in samples) if world.cp_rank == 0 else 0
        logp = rows.logp_TK.double().sum()
        return torch.stack([logp, *(torch.full_like(logp, value) for value in (len(batch["labels"]), num_bytes))])

    passes = score_samples(gpt, dataset, range(len(dataset)), shape, score, world)
    collected = [values for _, part in passes for values in part]
    logp, tokens, num_bytes = total_over_ranks(collected, 3, world, world.dp_cp_group).tolist()
    return Evaluation(
        loss=-logp / tokens,
        perplexity=math.exp(min(-logp / tokens, 700.0)),
        bits_per_byte=-logp / math.log(2) / num_bytes if num_bytes else math.nan,
        tokens=int(tokens),
        bytes=int(num_bytes),
        samples=len(dataset),
    )
