"""A model's log-probability of a data set: perplexity, and bits per byte, which is comparable across tokenizers.

Also its distance from another model of the same tokenizer, over the whole vocabulary, or from a teacher's stored rows,
with any tokenizer: labels are one author's text and do not say which other tokens would have been as good.

Shape suffixes: N supervised positions of a micro-batch (T in the kernel's names), H hidden size, V this rank's
vocabulary rows, K listed ids of a query (here 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field

from fusemega.config import Section
from fusemega.logits.divergence import compared_sums
from fusemega.logits.vocab import Query, sparse_log_probs
from fusemega.losses.distill import Taught
from fusemega.models.build import GPT
from fusemega.passes.answers import HiddenStates
from fusemega.passes.batches import RowShape
from fusemega.passes.forward import hidden_states, total_over_ranks
from fusemega.passes.frozen import FrozenModel
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.score import score_samples
from fusemega.runtime.parallel import World
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample


class EvaluationSection(Section):
    """Held-out data, scored while a run trains: before the first update, every `interval`, and after the last.

    Of text the loss is the model's. Of groups of responses it is the objective's, with its metrics.
    """

    data: DataConfig
    interval: int = Field(ge=1, description="iterations between evaluations")
    patience: int | None = Field(
        None, ge=1, description="stop after this many consecutive evaluations without a new lowest loss"
    )
    keep_best: bool = Field(
        False, description="save a checkpoint at each new lowest loss, keep the best one, and export it at the end"
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

    @property
    def row(self) -> dict[str, float]:
        """The row of a file of evaluations."""
        return self.model_dump()

    @property
    def shown(self) -> dict[str, float]:
        """What a log shows, by name."""
        return {
            "lm loss validation": self.loss,
            "lm loss validation ppl": self.perplexity,
            "bits-per-byte validation": self.bits_per_byte,
        }

    @property
    def amount(self) -> str:
        """How much was scored, in words."""
        return f"{self.tokens} tokens"


class Comparison(Evaluation):
    """The same, and the distance from a reference model over the same tokens.

    Attributes:
        kl: mean KL(reference || model) a token, nats.
        same_top_1: share of the tokens at which both models find the same id most probable.
    """

    kl: float
    same_top_1: float


class RowsComparison(Evaluation):
    """The same, and the distance from a teacher's stored rows.

    Attributes:
        kl: mean KL(row || model) in nats, over outcomes that the rows tell apart.
        taught: number of positions with a row; the mean is over these.
    """

    kl: float
    taught: int


def evaluation_of(logp: float, tokens: int, num_bytes: int, samples: int) -> Evaluation:
    """The figures from totals.

    Args:
        logp: log-probability of all supervised tokens, nats.
        tokens, num_bytes, samples: how much that is.
    """
    return Evaluation(
        loss=-logp / tokens,
        perplexity=math.exp(min(-logp / tokens, 700.0)),  # math.exp raises OverflowError above 709
        bits_per_byte=-logp / math.log(2) / num_bytes if num_bytes else math.nan,
        tokens=tokens,
        bytes=num_bytes,
        samples=samples,
    )


def evaluate_model(
    gpt: GPT,
    dataset: TokenizedDataset,
    shape: RowShape,
    world: World,
    reference: FrozenModel | None = None,
    rows: Taught | None = None,
) -> Evaluation:
    """Score every sample. Leaves the model in evaluation mode. Collective; every rank gets the result.

    Args:
        reference: a frozen model that wants "hidden"; the result is then a `Comparison` with it.
        rows: an objective that reads a teacher's rows; the result is then a `RowsComparison`. Not both.
    """

    def score(hidden_NH: torch.Tensor, batch: MicroBatch, samples: Sequence[Sample]) -> torch.Tensor:
        # Context-parallel ranks share a sample: each counts its own tokens, and only one counts the bytes.
        num_bytes = sum(sample.num_bytes for sample in samples) if world.cp_rank == 0 else 0
        own = hidden_states(gpt, hidden_NH, world)
        if reference is None:
            labels = sparse_log_probs(own.hidden_NH, own.weight_VH, Query(batch.labels[:, None]), **own.head)
            sums = labels.logp_TK.double().sum()[None]
            if rows is not None:
                sums = torch.cat([sums, rows.distances(own, batch)])
        else:
            other = batch.answers["reference"]
            assert isinstance(other, HiddenStates)
            sums = compared_sums(
                *(own.hidden_NH, own.weight_VH, other.hidden_NH, other.weight_VH, batch.labels),
                teacher_softcap=other.head.get("softcap"),
                **own.head,
            )
        # Filled on the device, rather than copied there, for which the host would wait.
        counted = [sums.new_full((1,), count) for count in (len(batch.labels), num_bytes)]
        return torch.cat([*counted, sums])

    frozen = {} if reference is None else {"reference": reference}
    passes = score_samples(gpt, dataset, range(len(dataset)), shape, score, world, frozen=frozen, fields=rows)
    collected = [values for _, part in passes for values in part]
    size = 3 if reference is None and rows is None else 5
    total = total_over_ranks(collected, size, world, world.dp_cp_group).tolist()
    tokens, num_bytes, logp = total[:3]
    whole = evaluation_of(logp, int(tokens), int(num_bytes), len(dataset))
    found = whole.model_dump()
    if rows is not None:
        return RowsComparison(**found, kl=total[3] / max(total[4], 1.0), taught=int(total[4]))
    if reference is None:
        return whole
    return Comparison(**found, kl=total[3] / tokens, same_top_1=total[4] / tokens)
