"""Distillation from a teacher of the same tokenizer that runs in the same job: its whole distribution, stored nowhere.

    L = lambda / N  sum_t  CE(y_t, q_t)  +  (1 - lambda) T^2 / N  sum_t  D(p_t^T, q_t^T)

over the N supervised tokens t of the step, with q^T = softmax(student's logits / T), q = q^1, p^T the same of the
teacher, and D one of `logits.divergence`. As in `distill`, T^2 (Hinton et al., arXiv:1503.02531, section 2.1) keeps the
size of the gradient as T grows, the cross-entropy on labels is at temperature 1, and the metric `distill` is the mean
of D itself, without lambda and without T^2. Forward KL has the gradient of `distill` with every id listed.

A teacher may have more vocabulary rows than the student, because models of one tokenizer pad differently. These rows
stand for no token and are left out of p.

Shape suffixes: N supervised positions of a micro-batch, H a model's hidden size, V this rank's vocabulary rows, M sums
that metrics are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from fusemega.checkpoint.open_model import ModelConfig, weights_hash
from fusemega.logits.divergence import fused_divergence_loss
from fusemega.losses.registry import Objective, ObjectiveSettings, register
from fusemega.passes.answers import HiddenStates
from fusemega.passes.frozen import Request
from fusemega.passes.micro_batch import MicroBatch

if TYPE_CHECKING:
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.tokenizer import Tokenizer


@register("online_distill")
class OnlineDistill(Objective[HiddenStates]):
    """lambda * cross-entropy on labels + (1 - lambda) * T^2 * divergence from a teacher that runs in the same job."""

    class Settings(ObjectiveSettings):
        model_config = ConfigDict(populate_by_name=True)

        name: Literal["online_distill"] = "online_distill"
        teacher: ModelConfig = Field(description="a model with the same tokenizer, run in the same layout; without fp8")
        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
            "forward_kl", description="KL(teacher, student), KL(student, teacher), or Jensen-Shannon"
        )
        lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="weight of the cross-entropy on labels")
        temperature: float = Field(1.0, gt=0, description="temperature of teacher and student in the divergence")

        @field_validator("teacher")
        @classmethod
        def _no_fp8(cls, teacher: ModelConfig) -> ModelConfig:
            if teacher.fp8 is not None:
                raise ValueError("fp8 is for the model in training; a teacher runs in bf16 or fp32")
            return teacher

    terms = ("lm", "distill")
    unit = "token"

    def __init__(self, settings: OnlineDistill.Settings) -> None:
        self.settings = settings
        self.frozen = {"teacher": Request(settings.teacher, "hidden")}

    @classmethod
    def build(cls, settings: OnlineDistill.Settings, tokenizer: Tokenizer, vocab_size: int) -> OnlineDistill:
        return cls(settings)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        teacher = self.settings.teacher
        precision = teacher.model_dump(mode="json", exclude={"load", "trust_remote_code"})
        return {"teacher": {"weights": weights_hash(teacher.load), **precision}}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return dict.fromkeys(self.terms, len(batch.labels))

    def loss(
        self, output: HiddenStates, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, teacher = self.settings, batch.answers["teacher"]
        assert isinstance(teacher, HiddenStates)
        loss, sums_M = fused_divergence_loss(
            output.hidden_NH,
            output.weight_VH,
            teacher.hidden_NH,
            teacher.weight_VH,
            batch.labels,
            settings.divergence,
            temperature=settings.temperature,
            label_weight=settings.lambda_ / denominators["lm"],
            divergence_weight=(1.0 - settings.lambda_) * settings.temperature**2 / denominators["distill"],
            teacher_softcap=teacher.head.get("softcap"),
            **output.head,
        )
        return loss, {"lm": sums_M[0], "distill": sums_M[1]}
