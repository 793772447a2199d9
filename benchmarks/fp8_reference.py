"""FP8 training on the CPU by Transformer Engine's own pure-PyTorch reference: loss curves and gradients beside bf16.

    make test-te                                        (makes .venv-te, then runs this)
    .venv-te/bin/python benchmarks/fp8_reference.py [--steps 60]

A small random Llama learns eight real conversations by heart, through the same code as `fusemega train`. Arms: local
layers in fp32 and bf16; Transformer Engine's layers in bf16, and in hybrid FP8 with one scale a tensor found anew for
each product (what `fp8_recipe: tensorwise` does on a GPU; here megatron-core's `custom` recipe names the reference);
and that last arm with Megatron's call of `set_is_first_microbatch` left out. Gradients are compared at the same weights
on the same batch, before training and after the fp32 arm's. Rounding is emulated, so this says what FP8 does to a
curve, and nothing about speed or about a GPU's own kernels. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.te import stand_in

stand_in.install()

import tiny  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from fusemega.config import validate  # noqa: E402
from fusemega.hf.export import export_hf  # noqa: E402
from fusemega.models.build import placements  # noqa: E402
from fusemega.runtime.precision import LOCAL, Kernels, Precision  # noqa: E402
from fusemega.training.assembly import open_trainer  # noqa: E402
from fusemega.training.run_file import TrainRun  # noqa: E402
from fusemega.training.trainer import Trainer  # noqa: E402

FP8 = Kernels(transformer_engine=True, fp8=stand_in.REFERENCE_FP8)
# name -> (dtype, kernels, whether set_is_first_microbatch is called)
ARMS: dict[str, tuple[str, Kernels, bool]] = {
    "fp32, local": ("fp32", LOCAL, True),
    "bf16, local": ("bf16", LOCAL, True),
    "bf16, Transformer Engine": ("bf16", Kernels(transformer_engine=True), True),
    "fp8 hybrid, Transformer Engine": ("bf16", FP8, True),
    "fp8 hybrid, weights quantized once": ("bf16", FP8, False),
}
REFERENCE = "bf16, local"


@contextmanager
def opened(work: Path, arm: str, model: Path, steps: int) -> Iterator[Trainer]:
    """A trainer of this arm, at its first iteration."""
    dtype, kernels, requantize = ARMS[arm]
    with tempfile.TemporaryDirectory(dir=work) as output:
        run = validate(
            TrainRun,
            {
                "output_dir": output + "/run",
                "model": {"load": str(model), "dtype": dtype},
                "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
                "objective": {"name": "sft"},
                "optimizer": {"lr": 3e-3, "lr_warmup_fraction": 0.1},
                "training": {"train_iters": steps, "global_batch_size": 8, "export_hf": False},
            },
            arm,
        )
        with (
            mock.patch.object(Precision, "kernels", return_value=kernels),
            mock.patch.object(Precision, "row_unit", return_value=16),  # what FP8 asks for, in every arm
        ):
            trainer, _ = open_trainer(run)
        forget = mock.patch.object(MegatronModule, "set_is_first_microbatch", lambda self: None)
        if requantize:
            yield trainer
        else:
            with forget:
                yield trainer


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """HF tensor name (the first of a parameter's) -> gradient of the step just done, [parameter's shape]."""
    found: dict[str, torch.Tensor] = {}
    for placement in placements(trainer.gpt, trainer.world):
        parameter: Any = placement.parameter
        found[next(iter(placement.rule.hf_shapes()))] = parameter.main_grad.flatten().double()
    return found


def cosines(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Cosine of the whole gradient, and of the parameter that is worst."""
    each = {name: torch.cosine_similarity(grad, theirs[name], dim=0).item() for name, grad in ours.items()}
    worst = min(each, key=lambda name: each[name])
    whole = torch.cosine_similarity(torch.cat(list(ours.values())), torch.cat([theirs[n] for n in ours]), dim=0)
    return {"whole": round(whole.item(), 5), "worst": round(each[worst], 5), "worst_parameter": worst}


def compare_gradients(work: Path, model: Path) -> dict[str, Any]:
    """Each arm's first gradient from the weights in `model`, against bf16's and fp32's."""
    first = {}
    for arm in ARMS:
        with opened(work, arm, model, steps=1) as trainer:
            trainer.step()
            first[arm] = gradients(trainer)
    arms = [arm for arm, (_, _, requantize) in ARMS.items() if requantize]
    return {
        arm: {other: cosines(first[arm], first[other]) for other in (REFERENCE, "fp32, local") if other != arm}
        for arm in arms
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusemega-fp8-") as folder:
        work = Path(folder)
        chat = tiny.write_chat(work / "chat.jsonl", rows=8, characters=200)
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_hidden_layers": 2}
        tiny.write_model(work / "model", chat, **sizes)
        found: dict[str, Any] = {}
        for arm in ARMS:
            started = time.monotonic()
            with opened(work, arm, work / "model", args.steps) as trainer:
                losses = [trainer.step()["lm loss"] for _ in range(args.steps)]
                if arm == "fp32, local":
                    export_hf(trainer.gpt, work / "trained", work / "model", trainer.world)
            seconds = round(time.monotonic() - started, 1)
            found[arm] = {"losses": [round(loss, 4) for loss in losses], "seconds": seconds}
            print(f"{arm:<36} {losses[0]:.4f} -> {losses[-1]:.4f}   {seconds} s", flush=True)
        reference = found[REFERENCE]["losses"]
        for result in found.values():
            apart = [abs(a - b) for a, b in zip(result["losses"], reference, strict=True)]
            result["largest_difference_to_bf16"] = round(max(apart), 4)
            result["last_difference_to_bf16"] = round(result["losses"][-1] - reference[-1], 4)
        report = {
            "benchmark": "fp8_reference",
            "steps": args.steps,
            "arms": found,
            "gradient_cosine": {
                "at the start": compare_gradients(work, work / "model"),
                "after training": compare_gradients(work, work / "trained"),
            },
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
