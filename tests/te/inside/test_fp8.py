"""FP8 settings reach Transformer Engine, its own answers refuse a recipe, and a trainer quantizes weights each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.module import MegatronModule
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch import quantization

from benchmarks import tiny
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.models.build import build_model, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import architecture_of
from fusemega.runtime import kernel_packages, precision
from fusemega.runtime.kernel_packages import FP8_RECIPES, recipe_problem
from fusemega.runtime.parallel import World
from fusemega.runtime.precision import LOCAL, Kernels, Precision
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from tests.checkpoint.conftest import SETTINGS
from tests.te import stand_in

FP8 = Kernels(transformer_engine=True, fp8=stand_in.REFERENCE_FP8)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16, "attn_logit_softcapping": 2.0},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
}
CONFIG: dict[str, Any] = {"model_type": "llama", **SETTINGS, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`on_gpu((9, 0), cuda="13.0")`: Transformer Engine asks a GPU of that compute capability."""

    def answer(capability: tuple[int, int], cuda: str = "13.0") -> None:
        monkeypatch.setattr(precision, "transformer_engine_problem", lambda: None)
        monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: capability)
        monkeypatch.setattr(quantization.tex, "get_cublasLt_version", lambda: 130000, raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name in ("check_fp8_support", "check_mxfp8_support", "check_fp8_block_scaling_support"):
            getattr(quantization, name).cache_clear()

    yield answer
    for name in ("check_fp8_support", "check_mxfp8_support", "check_fp8_block_scaling_support"):
        getattr(quantization, name).cache_clear()


@pytest.mark.parametrize(
    ("settings", "kind", "wanted"),
    [
        ({"fp8": "hybrid"}, recipes.DelayedScaling, {"margin": 0, "amax_history_len": 1}),
        (
            {
                "fp8": "e4m3",
                "fp8_recipe": "delayed",
                "fp8_margin": 2,
                "fp8_amax_history_len": 7,
                "fp8_amax_compute_algo": "max",
            },
            recipes.DelayedScaling,
            {"margin": 2, "amax_history_len": 7, "amax_compute_algo": "max"},
        ),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, recipes.Float8CurrentScaling, {}),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, recipes.Float8BlockScaling, {}),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, recipes.MXFP8BlockScaling, {}),
    ],
)
def test_settings_reach_transformer_engine(
    settings: dict[str, Any], kind: type, wanted: dict[str, Any], world: World, on_gpu: Any
) -> None:
    on_gpu((10, 0))
    kernels = validate(Precision, settings, "test").kernels()
    config = build_model(architecture_of(CONFIG), world, torch.bfloat16, kernels).config
    assert {name: getattr(config, name) for name in settings} == settings
    made = get_fp8_recipe(config)
    assert isinstance(made, kind)
    assert made.fp8_format is getattr(recipes.Format, settings["fp8"].upper())
    assert {name: getattr(made, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("capability", "cuda", "usable"),
    [
        ((8, 0), "13.0", ()),
        ((8, 9), "13.0", ("delayed", "tensorwise")),
        ((9, 0), "12.8", ("delayed", "tensorwise")),
        ((9, 0), "13.0", ("delayed", "tensorwise", "blockwise")),
        ((10, 0), "13.0", ("delayed", "tensorwise", "blockwise", "mxfp8")),
        ((12, 0), "13.0", ("delayed", "tensorwise", "blockwise")),
    ],
)
def test_what_a_gpu_can_run(capability: tuple[int, int], cuda: str, usable: tuple[str, ...], on_gpu: Any) -> None:
    on_gpu(capability, cuda)
    assert tuple(recipe for recipe in FP8_RECIPES if recipe_problem(recipe) is None) == usable
    for recipe in set(FP8_RECIPES) - set(usable):
        with pytest.raises(UserError, match=f"fp8_recipe: {recipe} cannot run on this GPU: .*allowed here: ") as error:
            validate(Precision, {"fp8": "hybrid", "fp8_recipe": recipe}, "test").kernels()
        assert "\n" not in str(error.value) and (", ".join(usable) or "no FP8 recipe") in str(error.value)


def test_auto_is_transformer_engine_for_bf16_and_local_for_fp32(on_gpu: Any) -> None:
    on_gpu((9, 0))
    assert validate(Precision, {}, "test").kernels() == Kernels(transformer_engine=True)
    assert validate(Precision, {"dtype": "fp32"}, "test").kernels() == LOCAL
    assert validate(Precision, {"transformer_impl": "local"}, "test").kernels() == LOCAL


def test_importable_but_without_a_gpu_it_is_not_used() -> None:
    assert kernel_packages.transformer_engine_fault() is None
    assert kernel_packages.transformer_engine_problem() == "Transformer Engine needs a GPU, and torch finds none here"
    assert validate(Precision, {}, "test").kernels() == LOCAL
    with pytest.raises(UserError, match="needs a GPU"):
        validate(Precision, {"fp8": "hybrid"}, "test").kernels()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    chat = tiny.write_chat(folder / "chat.jsonl", rows=6, characters=100)
    for name, settings in MODELS.items():
        tiny.write_model(folder / name, chat, num_hidden_layers=2, **settings)
    return folder


def opened(
    work: Path, output: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, model: str = "llama", **training: Any
) -> Trainer:
    run = validate(
        TrainRun,
        {
            "output_dir": str(output),
            "model": {"load": str(work / model)},
            "data": {"path": str(work / "chat.jsonl"), "seq_length": 64},
            "objective": {"name": "sft"},
            "optimizer": {"lr": 1e-2, "lr_decay_style": "constant"},
            "training": {"train_iters": 3, "global_batch_size": 6, **training},
        },
        "test",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Precision, "kernels", lambda self: kernels)
        patch.setattr(Precision, "row_unit", lambda self, parallel: 16)  # what `model.fp8` would ask for
        return open_trainer(run)[0]


def losses(trainer: Trainer) -> list[float]:
    return [trainer.step()["lm loss"] for _ in range(3)]


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_fp8_follows_bf16_and_is_not_it(
    model: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capped attention is not among the products that run in FP8, and lies between them."""
    bf16 = losses(opened(work, tmp_path / "bf16", Kernels(transformer_engine=True), monkeypatch, model))
    fp8 = losses(opened(work, tmp_path / "fp8", FP8, monkeypatch, model))
    assert fp8 != bf16 and fp8 == pytest.approx(bf16, rel=2e-2)


def test_weights_are_quantized_anew_each_step(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's schedules call set_is_first_microbatch; without that call the first step's FP8 weights stay."""
    right, again = (losses(opened(work, tmp_path / name, FP8, monkeypatch)) for name in ("right", "again"))
    with monkeypatch.context() as patch:
        patch.setattr(MegatronModule, "set_is_first_microbatch", lambda self: None)
        stale = losses(opened(work, tmp_path / "stale", FP8, monkeypatch))
    assert again == right  # so that what differs now is the weights' age
    assert stale[0] == right[0] and abs(stale[2] - right[2]) > 1e-3


def test_a_pass_after_a_step_sees_the_new_weights(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = opened(work, tmp_path / "run", FP8, monkeypatch)
    before = dense_logits(trainer.gpt, trainer.world, [list(range(16))])
    trainer.step()
    after = dense_logits(trainer.gpt, trainer.world, [list(range(16))])
    fresh = build_model(trainer.gpt.architecture, trainer.world, torch.bfloat16, FP8)
    fresh.load_state_dict(trainer.gpt.state_dict())
    wanted = dense_logits(fresh, trainer.world, [list(range(16))])
    assert after is not None and wanted is not None and torch.equal(after, wanted)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("model", ["llama", "mixtral"])
@pytest.mark.parametrize("resumed", [LOCAL, Kernels(transformer_engine=True)])
def test_a_run_resumes_with_other_layers(
    resumed: Kernels, model: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and optimizer state come back bit for bit, whichever layers wrote them."""
    first = Kernels(transformer_engine=True) if resumed is LOCAL else LOCAL
    trainer = opened(work, tmp_path / "run", first, monkeypatch, model)
    trainer.step()
    trainer.save()
    saved = state_of(trainer)
    wanted = trainer.step()["lm loss"]  # before the next world replaces this one's groups
    again = opened(work, tmp_path / "run", resumed, monkeypatch, model)
    assert again.iteration == 1
    found = state_of(again)
    assert found.keys() == saved.keys() and len(found) > 10
    for name, value in found.items():
        assert all(torch.equal(a, b) for a, b in zip(value, saved[name], strict=True)), name
    assert again.step()["lm loss"] == pytest.approx(wanted, rel=1e-3)


def state_of(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """HF name -> weight, fp32 main weight and both moments (flat, whole: there is one rank)."""
    usual, *of_experts = trainer.optimizer.chained_optimizers
    found = {}
    for placement in placements(trainer.gpt, trainer.world):
        optimizer = usual if placement.rule.expert is None else of_experts[0]
        state = optimizer._get_main_param_and_optimizer_states(placement.parameter)
        tensors = [placement.parameter, *(state[name] for name in ("param", "exp_avg", "exp_avg_sq"))]
        found[next(iter(placement.rule.hf_shapes()))] = [tensor.detach().clone() for tensor in tensors]
    return found


def test_resume_refuses_other_fp8_settings(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = opened(work, tmp_path / "run", Kernels(transformer_engine=True), monkeypatch)
    trainer.step()
    trainer.save()
    words = r"cannot resume: the checkpoint has fp8 = None, this run \{'fp8': 'hybrid'"
    with monkeypatch.context() as patch:
        patch.setattr(Precision, "fp8_settings", lambda self: {"fp8": "hybrid", "fp8_recipe": "tensorwise"})
        with pytest.raises(UserError, match=words):
            opened(work, tmp_path / "run", FP8, monkeypatch)
