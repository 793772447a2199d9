"""Options that save memory or time: the same numbers, and what they save is seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.errors import UserError
from fusemega.models.build import build_model, init_random
from fusemega.models.registry import architecture_of
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import initialize
from fusemega.runtime.precision import Kernels
from fusemega.training import optimizer
from fusemega.training.assembly import open_trainer
from fusemega.training.dry_run import describe
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from tests.checkpoint.conftest import save_llama
from tests.models.test_build import CONFIG

MakeRun = Callable[..., TrainRun]
LAYERS = 4


def full(method: str, layers: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def passes(trainer: Trainer) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """A step's metrics; and of each layer, how often its attention's core and its MLP ran for one micro-batch."""
    ran: Counter[torch.nn.Module] = Counter()
    layers = trainer.gpt.chunks[0].decoder.layers
    for layer in layers:
        for module in (layer.self_attention.core_attention, layer.mlp):
            module.register_forward_pre_hook(lambda module, _: ran.update([module]))
    micro_batches = len(trainer.data.step(0).micro_batches)
    row = trainer.step()
    counts = [(ran[layer.self_attention.core_attention], ran[layer.mlp]) for layer in layers]
    return row, [(attention / micro_batches, mlp / micro_batches) for attention, mlp in counts]


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({}, [(1, 1)] * LAYERS),
        ({"recompute_granularity": "selective"}, [(2, 1)] * LAYERS),
        (full("uniform", 1), [(2, 2)] * LAYERS),
        (full("uniform", 2), [(2, 2)] * LAYERS),
        (full("block", 3), [(2, 2)] * 3 + [(1, 1)]),
    ],
)
def test_what_is_computed_again(
    make_run: MakeRun, training: dict[str, Any], wanted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import tensor_parallel

    kept = []
    checkpoint = tensor_parallel.checkpoint
    monkeypatch.setattr(tensor_parallel, "checkpoint", lambda *args: kept.append(1) or checkpoint(*args))
    trainer, _ = open_trainer(make_run(training=training))
    micro_batches = len(trainer.data.step(0).micro_batches)
    row, ran = passes(trainer)
    assert ran == wanted
    # Where whole layers are computed again, a group keeps its input alone.
    groups = {"uniform": LAYERS // training.get("recompute_num_layers", 1), "block": 3}
    if training:
        assert len(kept) == groups.get(training.get("recompute_method", ""), LAYERS) * micro_batches
    plain = open_trainer(make_run())[0].step()
    assert (row["lm loss"], row["grad-norm"]) == (plain["lm loss"], plain["grad-norm"])


def test_groups_that_do_not_suit_the_stages(make_run: MakeRun) -> None:
    def planned(layers: int, method: str = "uniform", **parallel: Any) -> None:
        describe(make_run(training=full(method, layers), parallel={"pipeline_model_parallel_size": 2, **parallel}), 2)

    planned(2)
    with pytest.raises(UserError, match="recompute_num_layers: 2 with recompute_method uniform .* of 1 layers"):
        planned(2, virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True)
    planned(1, num_layers_in_last_pipeline_stage=3)
    with pytest.raises(UserError, match="recompute_num_layers: 3 .* of 1 layers; allowed: 1"):
        planned(3, num_layers_in_last_pipeline_stage=3)
    with pytest.raises(UserError, match="3 with recompute_method block .* of 2 layers; allowed: 1, 2"):
        planned(3, "block")


def test_gradients_and_parameters_travel_in_buckets(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=20_000)
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", small)
    rows = []
    for overlaps in ({}, {"overlap_grad_reduce": True}, {"overlap_grad_reduce": True, "overlap_param_gather": True}):
        trainer, _ = open_trainer(make_run(optimizer=overlaps))
        (ddp,) = trainer.ddp
        row = [trainer.step(), trainer.step()]
        rows.append([(step["lm loss"], step["grad-norm"]) for step in row])
        assert (len(ddp.bucket_groups) > 3) == ("overlap_grad_reduce" in overlaps)
        if "overlap_param_gather" in overlaps:  # the last update's have not been asked for yet
            assert not any(group.param_gather_dispatched for group in ddp.bucket_groups)
            optimizer.complete_parameters(trainer.ddp)
            assert all(group.param_gather_dispatched for group in ddp.bucket_groups)
    assert rows[0] == rows[1] == rows[2]


def test_the_heads_weight_is_waited_for() -> None:
    """It is used without its module being called, whose hook waits for what is still being gathered."""
    world = initialize(ParallelConfig())
    model = build_model(architecture_of(CONFIG), world, torch.float32)
    init_random(model, world, seed=1)
    asked: list[torch.nn.Module] = []
    head = model.chunks[0].output_layer
    head.register_forward_pre_hook(lambda module, _: asked.append(module))
    ids = torch.arange(5)[None]
    model.chunks[0](ids, ids, None)
    assert asked == [head]


def test_windows_under_context_parallelism_need_the_local_layers(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "model")
    for file in work.joinpath("model").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(name, None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    settings, shared = ModelConfig(load=str(tmp_path / "model")), ParallelConfig(context_parallel_size=2)
    ModelSource(settings, shared, 2)  # of local layers
    monkeypatch.setattr(ModelConfig, "kernels", lambda self: Kernels(transformer_engine=True))
    ModelSource(settings, ParallelConfig(), 1)
    with pytest.raises(UserError, match="context_parallel_size: 2 is not supported here.*allowed: 1, or model.transf"):
        ModelSource(settings, shared, 2)
