"""Models that cap their logits, taught and teaching: the caps reach divergence, gradient and a teacher's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.logits.topk import top_k_log_probs
from fusemega.losses.apply import objective_loss
from fusemega.losses.online_distill import OnlineDistill
from fusemega.models.build import GPT, build_model
from fusemega.passes.forward import head_settings, run_schedule
from fusemega.passes.frozen import FrozenModel, ask_all
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.parallel import ParallelConfig, World, initialize
from tests.distributed.workers.families import row_of

VOCAB, K = 67, 4


def both(folder: Path, seed: int, cap: float, world: World) -> tuple[Any, GPT]:
    """A random model in transformers and here, in float64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8}
    hf = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=cap, **sizes, **heads)).double()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0.0, 0.4)
    hf.save_pretrained(folder)
    ours = build_model(HFFolder(folder).architecture, world, torch.float64)
    load_hf(ours, folder, world)
    return hf, ours


def test_caps_of_teacher_and_student(tmp_path: Path) -> None:
    world = initialize(ParallelConfig())
    hf, student = both(tmp_path / "student", 0, 2.0, world)
    hf_teacher, teacher = both(tmp_path / "teacher", 1, 1.5, world)
    texts = [torch.randint(1, VOCAB, (n,)).tolist() for n in (7, 5)]  # no 0: transformers' pad token has no gradient
    batch = row_of(texts, 1)
    frozen = FrozenModel(teacher.requires_grad_(False), world, "hidden", teacher.head.weight, VOCAB)
    (asked,) = ask_all({"teacher": frozen}, [batch])
    settings = OnlineDistill.Settings(teacher={"load": str(tmp_path / "teacher")}, **{"lambda": 0.25})

    def loss_function(hidden_NH: torch.Tensor, row: MicroBatch) -> tuple[torch.Tensor, float]:
        counts = {"lm": len(row.labels), "distill": len(row.labels)}
        loss, _ = objective_loss(OnlineDistill(settings), student, hidden_NH, row, counts, world)
        return loss, float(loss.detach())

    (loss,) = run_schedule(list(student.chunks), [asked], loss_function, world, forward_only=False)

    logits, taught = (
        torch.cat([model(torch.tensor([text])).logits[0] for text in texts])[batch.positions]
        for model in (hf, hf_teacher)
    )
    assert logits.abs().max() > 1.9 and taught.abs().max() > 1.4  # near the caps
    logp, target = logits.log_softmax(1), taught.detach().log_softmax(1)
    kl = (target.exp() * (target - logp)).sum(1).mean()
    wanted = 0.25 * torch.nn.functional.cross_entropy(logits, batch.labels) + 0.75 * kl
    wanted.backward()
    assert loss == pytest.approx(float(wanted), rel=1e-6)
    last = student.chunks[-1].decoder.layers[1]
    for gradient, name in (
        (student.head.weight.grad, "model.embed_tokens.weight"),
        (last.mlp.linear_fc2.post_layernorm.weight.grad, "model.layers.1.post_feedforward_layernorm.weight"),
        (last.self_attention.linear_proj.weight.grad, "model.layers.1.self_attn.o_proj.weight"),
    ):
        # transformers' norms are in fp32
        torch.testing.assert_close(gradient, hf.get_parameter(name).grad, rtol=1e-4, atol=1e-6)

    def rows(hidden_NH: torch.Tensor, row: MicroBatch) -> tuple[torch.Tensor, Any]:
        given = head_settings(teacher, world)
        return hidden_NH.sum(), top_k_log_probs(hidden_NH, teacher.head.weight, K, row.labels, temperature=2.0, **given)

    ((ids, logp_NK, *_),) = run_schedule(list(teacher.chunks), [batch], rows, world, forward_only=True)
    expected = (taught / 2.0).log_softmax(1).topk(K)
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(logp_NK.double(), expected.values.detach(), rtol=1e-5, atol=1e-6)
