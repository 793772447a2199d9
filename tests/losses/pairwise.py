"""A loss that compares a prompt's responses with each other, to test the contract of group objectives.

    L = - 1/B_global sum_b sum_s p_s log softmax_s(beta (log q(y_s) - log q_ref(y_s)))

over the responses s of group b, with p the softmax of their rewards, or 1 for a pair's chosen response. Of pairs this
is DPO (Rafailov et al., arXiv:2305.18290), as log softmax of two numbers is log sigmoid of their difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fusemega.checkpoint.open_model import ModelConfig, weights_hash
from fusemega.losses.registry import Objective, ObjectiveSettings
from fusemega.passes.frozen import Request
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class Pairwise(Objective[Tensor]):
    """To be given to `register` by the tests that run it."""

    class Settings(ObjectiveSettings):
        name: Literal["pairwise"] = "pairwise"
        beta: float = 0.1
        reference: ModelConfig | None = None

    terms = ("pairwise",)
    unit = "group"

    def __init__(self, settings: Pairwise.Settings) -> None:
        self.settings = settings
        if settings.reference is not None:
            self.frozen = {"reference": Request(settings.reference, "logp")}

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> Pairwise:
        return cls(settings)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        reference = self.settings.reference
        return {} if reference is None else {"reference": weights_hash(reference.load)}

    def group_fields(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {"has_rewards": np.array("reward" in samples[0].scalars)}

    def sequence_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {"number": np.array(sample.scalars.get("reward", sample.scalars.get("chosen", np.nan)))}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"pairwise": len(batch.group_sizes)}

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reference = batch.answers.get("reference", torch.zeros_like(output))
        assert isinstance(reference, Tensor)
        total = output.sum() * 0.0  # of a micro-batch without a group
        numbers_S, scored_B = batch.sequence_fields["number"], batch.group_fields["has_rewards"]
        for group in range(len(batch.group_sizes)):
            inside = batch.groups == group
            ratio = self.settings.beta * (output - reference)[inside]
            numbers = numbers_S[inside].to(ratio.dtype)
            total = total + pairwise_loss(ratio, numbers.softmax(0) if scored_B[group] else numbers)
        return total / denominators["pairwise"], {"pairwise": total.detach()}


class PairwiseScores(Pairwise):
    """The same of a scalar head's scores (Bradley-Terry, of pairs)."""

    class Settings(Pairwise.Settings):
        name: Literal["pairwise_scores"] = "pairwise_scores"  # type: ignore[assignment]

    wants = "score"


def pairwise_loss(ratio: Tensor, target: Tensor) -> Tensor:
    """Of one group: the cross-entropy of softmax(ratio) with the target distribution."""
    return -(target * ratio.log_softmax(0)).sum()


def write_groups(path: Path, chat: Path) -> Path:
    """Pairs, and groups of three with rewards, of the first turns of a file of conversations."""
    turns = [json.loads(line)["messages"][:2] for line in chat.read_text().splitlines()]
    turns = [[{**turn, "content": turn["content"][:60]} for turn in pair] for pair in turns]
    with path.open("w") as file:
        for i in range(0, len(turns) - 2, 2):
            (question, good), other = turns[i], [turns[i + 1][1]]
            row: dict[str, Any] = {"prompt": [question], "chosen": [good], "rejected": other}
            if i % 4:
                row = {"prompt": [question], "responses": [[good], other, [turns[i + 2][1]]], "rewards": [1, 0.5, -2]}
            file.write(json.dumps(row) + "\n")
    return path


def write_scalar(path: Path, source: Path) -> Any:
    """The model of a folder with a random scalar head, in transformers and in a folder with its tokenizer."""
    torch.manual_seed(0)
    settings = {"num_labels": 1, "pad_token_id": 0, "dtype": torch.float32}
    model = AutoModelForSequenceClassification.from_pretrained(source, **settings)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return model
