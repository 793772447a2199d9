"""Distillation from a teacher of the same tokenizer that runs in the same job: its whole distribution, stored nowhere.

    L = lambda / N  sum_t  CE(y_t, q_t)  +  (1 - lambda) T^2 / N  sum_t  D(p_t^T, q_t^T)

over the N supervised tokens t of the step, with q^T = softmax(student's logits / T), q = q^1, p^T the same of the
teacher, and D one of `losses.divergence`. As in `distill`, T^2 (Hinton et al., arXiv:1503.02531, section 2.1) keeps the
size of the gradient as T grows, the cross-entropy on labels is at temperature 1, and the metric `distill` is the mean
of D itself, without lambda and without T^2. Forward KL has the gradient of `distill` with every id listed.

A teacher may have more vocabulary rows than the student, as models of one tokenizer pad differently: those rows name no
token, and count nothing in p.

Shape suffixes: N supervised positions of a micro-batch, H hidden size, V this rank's vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from fusemega.checkpoint.open_model import ModelConfig, weights_hash
from fusemega.logits.divergence import fused_divergence_loss
from fusemega.losses.registry import ObjectiveSettings, OnlineObjective, TeacherOutput, register

if TYPE_CHECKING:
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer


@register("online_distill")
class OnlineDistill(OnlineObjective):
    """lambda * cross-entropy on labels + (1 - lambda) * T^2 * divergence from a teacher that runs in the same job."""

    class Settings(ObjectiveSettings):
        model_config = ConfigDict(populate_by_name=True)

        name: Literal["online_distill"] = "online_distill"
        teacher: ModelConfig = Field(description="a model of the same tokenizer, run in the same layout; without fp8")
        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
            "forward_kl", description="KL(teacher, student), KL(student, teacher), or Jensen-Shannon"
        )
        lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="weight of the cross-entropy on labels")
        temperature: float = Field(1.0, gt=0, description="of teacher and student in the divergence")

        @field_validator("teacher")
        @classmethod
        def _no_fp8(cls, teacher: ModelConfig) -> ModelConfig:
            if teacher.fp8 is not None:
                raise ValueError("fp8 is for the model in training; a teacher runs in bf16 or fp32")
            return teacher

    terms = ("lm", "distill")

    def __init__(self, settings: OnlineDistill.Settings) -> None:
        self.settings, self.teacher = settings, settings.teacher

    @classmethod
    def build(cls, settings: OnlineDistill.Settings, tokenizer: Tokenizer, vocab_size: int) -> OnlineDistill:
        return cls(settings)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        precision = self.teacher.model_dump(mode="json", exclude={"load", "trust_remote_code"})
        return {"teacher": {"weights": weights_hash(self.teacher.load), **precision}}

    def sample_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {}

    def counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return dict.fromkeys(self.terms, len(batch["labels"]))

    def loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        teacher: TeacherOutput,
        batch: Mapping[str, Any],
        denominators: Mapping[str, Tensor | float],
        head_kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        loss, sums_M = fused_divergence_loss(
            hidden_NH,
            weight_VH,
            teacher.hidden_NG,
            teacher.weight_VG,
            batch["labels"],
            settings.divergence,
            temperature=settings.temperature,
            label_weight=settings.lambda_ / denominators["lm"],
            divergence_weight=(1.0 - settings.lambda_) * settings.temperature**2 / denominators["distill"],
            teacher_softcap=teacher.softcap,
            **head_kwargs,
        )
        return loss, {"lm": sums_M[0], "distill": sums_M[1]}
