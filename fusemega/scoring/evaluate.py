"""`fusemega eval`: perplexity, and bits per byte, which compares models across tokenizers.

Shapes: N supervised positions of a micro-batch, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from fusemega.assets import cache_folder
from fusemega.losses.vocab import Query, sparse_log_probs
from fusemega.runtime.parallel import World, initialize
from fusemega.scoring.passes import PassRun, score_samples
from fusemega.text.sample import Sample
from fusemega.training.batches import prepare_together
from fusemega.training.forward import Batch, head_settings, total_over_ranks


class EvalRun(PassRun):
    """Run file of `fusemega eval`."""

    output: str | None = None


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


def evaluate(run: EvalRun) -> tuple[Evaluation, World]:
    """Score `run.data` with `run.model`. Collective; every rank gets the result.

    Raises:
        UserError: bad input, before anything is allocated.
    """
    source = run.open()
    world = initialize(run.parallel)
    dataset = prepare_together(run.data, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
    gpt = source.build(world)

    def score(hidden_NH: torch.Tensor, batch: Batch, samples: Sequence[Sample]) -> torch.Tensor:
        rows = sparse_log_probs(
            hidden_NH, gpt.head_weight(), Query(batch["labels"][:, None]), **head_settings(gpt, world)
        )
        sums = (rows.logp_TK.double().sum(), len(batch["labels"]), sum(sample.num_bytes for sample in samples))
        return torch.tensor([float(value) for value in sums], dtype=torch.float64, device=world.device)

    passes = score_samples(gpt, dataset, range(len(dataset)), run.row_shape(source), score, world)
    collected = [values for _, part in passes for values in part]
    logp, tokens, num_bytes = total_over_ranks(collected, 3, world).tolist()
    result = Evaluation(
        loss=-logp / tokens,
        perplexity=math.exp(-logp / tokens),
        bits_per_byte=-logp / math.log(2) / num_bytes if num_bytes else math.nan,
        tokens=int(tokens),
        bytes=int(num_bytes),
        samples=len(dataset),
    )
    return result, world
