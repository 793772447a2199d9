"""The CPU backend: pinned to the source it was written against, and each promise seen."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import megatron.core
import pytest
import torch

from fusemega.errors import UserError
from fusemega.runtime import cpu_backend, fused_adam
from fusemega.runtime.parallel import ParallelConfig, initialize

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is a no-op where CUDA works")

CORE = Path(megatron.core.__file__).parent

# (file, line, what stands there): the places the module's table cites. When the pin moves, read the table again.
CITED = [
    ("models/common/embeddings/rotary_pos_embedding.py", 162, "torch.cuda.current_device()"),
    ("tensor_parallel/layers.py", 552, "torch.cuda.current_device()"),
    ("tensor_parallel/mappings.py", 141, "torch.cuda.current_device()"),
    ("pipeline_parallel/p2p_communication.py", 313, "torch.cuda.current_device()"),
    ("pipeline_parallel/p2p_communication.py", 398, "torch.cuda.synchronize()"),
    ("distributed/param_and_grad_buffer.py", 285, "dist_all_gather_func("),
    ("distributed/param_and_grad_buffer.py", 443, "dist_reduce_scatter_func("),
    ("models/common/embeddings/rope_utils.py", 122, "torch.cos(freqs)"),
    ("tensor_parallel/layers.py", 569, "wgrad_gemm_accum_fp32("),
    ("distributed/param_and_grad_buffer.py", 800, "torch.cuda.current_device()"),
    ("optimizer/distrib_optimizer.py", 361, "torch.cuda."),
    ("optimizer/distrib_optimizer.py", 791, "torch.cuda.current_device()"),
    ("pipeline_parallel/schedules.py", 596, "cuda"),
    ("optimizer/clip_grads.py", 103, "cuda"),
    ("utils.py", 1207, "cuda"),
    ("tensor_parallel/mappings.py", 150, "all_gather("),
    ("tensor_parallel/mappings.py", 193, "reduce_scatter("),
    ("transformer/moe/token_dispatcher.py", 895, "record_event()"),
    ("transformer/moe/moe_utils.py", 1093, "tensor.is_cuda"),
    ("transformer/moe/moe_utils.py", 1192, "te_general_gemm"),
    ("tensor_parallel/random.py", 235, "cuda"),
    ("distributed/distributed_data_parallel.py", 174, "calculate_per_token_loss"),
    ("pipeline_parallel/schedules.py", 259, "calculate_per_token_loss"),
]


def test_the_pin_is_what_the_workarounds_were_written_against() -> None:
    assert megatron.core.__version__ == cpu_backend.MEGATRON_CORE_PIN


@pytest.mark.parametrize(("file", "line", "text"), CITED)
def test_cited_lines_still_say_what_the_table_says(file: str, line: int, text: str) -> None:
    lines = (CORE / file).read_text().splitlines()
    assert text in lines[line - 1], f"{file}:{line} reads {lines[line - 1].strip()!r}"


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    monkeypatch.setattr(cpu_backend, "_mode", None)
    with pytest.raises(UserError, match=r"0\.17\.0.*exactly 0\.16\.1"):
        cpu_backend.enable()


def test_cuda_literals_become_cpu_also_inside_backward() -> None:
    devices = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            devices.append(torch.zeros(1, device="cuda").device.type)
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    Probe.apply(x.cuda()).sum().backward()
    assert devices == ["cpu"]
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert torch.zeros(1, device="cuda:0", pin_memory=True).device.type == "cpu"
    assert torch.ones(1).to("cuda").device.type == "cpu"


def test_named_random_states_are_separate_and_return() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    initialize(ParallelConfig(), seed=7)
    tracker = get_cuda_rng_tracker()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with tracker.fork():
        first = torch.rand(4)
    with tracker.fork():
        second = torch.rand(4)
    assert torch.equal(torch.rand(4), expected), "drawing inside a fork moved the outer generator"
    assert not torch.equal(first, second)
    initialize(ParallelConfig(), seed=7)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(4), first), "the same seed gives the same draw"


def test_fused_adam_is_torch_adamw() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3), torch.randn(4, 5, 3)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    a, b = fused_adam.FusedAdam([ours], **settings), torch.optim.AdamW([theirs], fused=True, **settings)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)
    assert a.param_groups[0]["step"] == 4
    assert set(a.state[ours]) == {"exp_avg", "exp_avg_sq"}


def test_collectives_of_one_rank_on_its_own_buffer_are_left_out() -> None:
    from megatron.core.distributed import param_and_grad_buffer

    group = initialize(ParallelConfig()).dp_group
    calls = []
    run = cpu_backend._without_lone_rank(lambda *args, **kwargs: calls.append(kwargs["group"]))
    buffer = torch.arange(4.0)
    run(buffer, buffer[:], group=group)
    assert not calls
    run(torch.empty(4), buffer, group=group)
    run(buffer, buffer, group=None)
    assert calls == [group, None]
    for function in (param_and_grad_buffer.dist_all_gather_func, param_and_grad_buffer.dist_reduce_scatter_func):
        out = torch.zeros(4)
        function(out, buffer, group=group)
        assert torch.equal(out, buffer)


def test_the_real_file_is_untouched() -> None:
    """Nothing of megatron-core is edited on disk: the wheel's own record says so."""
    record = next(CORE.parent.parent.glob("megatron_core-*.dist-info")) / "RECORD"
    expected = {row.split(",")[0]: row.split(",")[1] for row in record.read_text().splitlines() if "sha256=" in row}
    for file in ("pipeline_parallel/schedules.py", "optimizer/distrib_optimizer.py", "tensor_parallel/random.py"):
        digest = hashlib.sha256((CORE / file).read_bytes()).digest()
        encoded = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        assert expected[f"megatron/core/{file}"] == f"sha256={encoded}"


def test_fused_adam_counts_its_steps_on_the_parameters_device() -> None:
    """As the fused kernel of a GPU asks: a parameter on another device than its count is refused there."""
    meta, here = torch.nn.Parameter(torch.empty(3, device="meta")), torch.nn.Parameter(torch.empty(2))
    steps = fused_adam._steps([here, meta, here], 7)
    assert [step.device.type for step in steps] == ["cpu", "meta", "cpu"]
    assert [step.shape for step in steps] == [torch.Size(())] * 3 and steps[0].item() == 7.0
    meta.grad = torch.empty_like(meta)
    optimizer = fused_adam.FusedAdam([meta])
    optimizer.step()
    assert {name: value.device.type for name, value in optimizer.state[meta].items()} == {
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
