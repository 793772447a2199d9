"""Logits and gradients against transformers, and HF -> Megatron -> HF bit for bit, under several layouts.

    python benchmarks/parity.py [--quick] [--models tiny-gemma2 tiny-mixtral ...]

Compares in fp32 the logits of two texts packed in one row with those transformers computes for each text alone, and the
gradients of every weight: of the mean cross-entropy of the tokens, and of a loss that couples the two texts (DPO
without a reference). The real SmolLM2-135M-Instruct runs at TP 1 and 3, PP 1 and 2, with and without sequence
parallelism, logits only; small random models of every family (`parity_models.py`) cover TP 2 and 4, the interleaved
schedule, expert and expert tensor parallelism, tied and untied heads, Llama 3's rope scaling, sliding windows (in all
layers and in some), QKV biases, q/k norms, odd vocabulary sizes, fewer key/value heads than ranks, and the rotary
positions of yarn, dynamic and longrope. `--quick` leaves the real model out. A gradient's difference is that of the
whole matrix, in the norm, over the gradient's own norm. The last line printed is one JSON object; exit status 1 when a
check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity_models import EXPERT_LAYOUTS, EXPERTS, REAL_LAYOUTS, TINY, TINY_LAYOUTS, TINY_SHAPE

if TYPE_CHECKING:
    import torch

    from fusemega.hf.folder import HFFolder
    from fusemega.models.build import GPT
    from fusemega.runtime.parallel import World

TOLERANCE = 1e-4
ROOT = Path(__file__).resolve().parents[1]
REAL = "smollm2-135m"
BETA = 0.1  # of the loss that couples two texts
LOSSES = ("tokens", "texts")
_TEXTS = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in Paris.",
    "def add(a, b):\n    return a + b\n",
)


def kind_of(name: str) -> str:
    """Models of one kind run in one launch."""
    return "real" if name == REAL else "experts" if name in EXPERTS else "tiny"


# Processes, and layouts.
KINDS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "tiny": (4, TINY_LAYOUTS),
    "experts": (4, EXPERT_LAYOUTS),
    "real": (6, REAL_LAYOUTS),
}


def prepare(work: Path, names: list[str]) -> None:
    """Folders, reference logits and reference gradients of the models."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name in [name for name in names if name != REAL]:
        config = AutoConfig.for_model(**({"model_type": "llama"} | TINY_SHAPE | TINY[name]))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms other than 1, biases other than 0, logits of a trained model's size
            for key, parameter in model.named_parameters():
                # Gemma's norms scale by 1 + weight.
                centre = key.endswith("norm.weight") and "gemma" not in name
                vector = 0.2 * torch.randn_like(parameter) + centre
                parameter.copy_(vector if parameter.dim() == 1 else 6 * parameter)
        model.save_pretrained(work / name, max_shard_size="100KB")
        # From 1: transformers gives the embedding of a padding token, 0, no gradient.
        texts = [torch.randint(1, config.vocab_size, (n,)).tolist() for n in (45, 19)]
        _reference(work, name, model, texts, gradients=True)
    if REAL in names:
        from fusemega.fixtures import data as assets

        folder = assets.smollm2()
        (work / REAL).symlink_to(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer(text)["input_ids"] for text in _TEXTS]
        texts[1] = texts[1][: len(texts[1]) - (len(texts[0]) + len(texts[1])) % 3]  # sequence parallelism over 3
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        _reference(work, REAL, model, texts, gradients=False)


def _reference(work: Path, name: str, model: Any, texts: list[list[int]], gradients: bool) -> None:
    """Logits of transformers in fp32, and how far they are from its own in fp64; gradients as folders of weights."""
    import torch

    torch.set_num_threads(1)  # as the workers: the number of threads changes the order of sums
    model.eval()
    with torch.set_grad_enabled(gradients):
        logits = [model(torch.tensor([text])).logits[0] for text in texts]
    logits_SV = torch.cat(logits).detach()
    found = {}
    if gradients:
        logp = torch.stack(
            [
                -torch.nn.functional.cross_entropy(part[:-1], torch.tensor(text[1:]), reduction="sum")
                for part, text in zip(logits, texts, strict=True)
            ]
        )
        tokens = -logp.sum() / sum(len(text) - 1 for text in texts)
        coupled = -torch.nn.functional.logsigmoid(BETA * (logp[0] - logp[1]))
        for kind, loss in zip(LOSSES, (tokens, coupled), strict=True):
            found[kind] = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    model.double()
    if kind_of(name) == "experts":
        model.set_experts_implementation("eager")  # its other products are not made for float64
    with torch.no_grad():
        error = float((torch.cat([model(torch.tensor([t])).logits[0] for t in texts]) - logits_SV).abs().max())
    largest = float(logits_SV.abs().max())
    reference = {"texts": texts, "logits_SV": logits_SV, "transformers_fp32_error": error, "max_abs_logit": largest}
    torch.save(reference, work / f"{name}.reference.pt")
    model.float()
    for kind, parts in found.items():  # under the names that files have
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), parts, strict=True):
                parameter.copy_(gradient)
        model.save_pretrained(work / f"{name}.{kind}")


def worker(work: Path, names: list[str]) -> None:
    """Every layout of every model, on this rank; the main process writes what came out."""
    import torch
    import torch.distributed as dist

    from fusemega.hf.export import export_hf
    from fusemega.hf.folder import HFFolder
    from fusemega.hf.load import load_hf
    from fusemega.models.build import build_model
    from fusemega.models.dense_logits import dense_logits
    from fusemega.runtime.parallel import ParallelConfig, initialize, shutdown

    results = []
    for number, layout in enumerate(KINDS[kind_of(names[0])][1]):
        world = initialize(ParallelConfig(**layout))
        for name in names:
            reference = torch.load(work / f"{name}.reference.pt")
            model = build_model(HFFolder(work / name).architecture, world, torch.float32)
            load_hf(model, work / name, world)
            logits_SV = dense_logits(model, world, reference["texts"])
            difference = 0.0 if logits_SV is None else float((logits_SV.cpu() - reference["logits_SV"]).abs().max())
            if logits_SV is not None and not torch.isfinite(logits_SV).all():
                difference = float("inf")
            everyone: list[float] = [0.0] * world.world_size
            dist.all_gather_object(everyone, difference)
            label = f"{world.layout} x DP {world.dp_size}"
            if world.layout.moe_token_dispatcher_type != "alltoall":
                label += f", {world.layout.moe_token_dispatcher_type}"
            out = work / f"{name}.out-{number}"
            export_hf(model, out, work / name, world)
            made = {} if name == REAL else gradient_folders(work, name, out, model, reference["texts"], world)
            if world.is_main:
                different = different_tensors(HFFolder(work / name), HFFolder(out))
                row = {"model": name, "layout": label, "max_logit_difference": max(everyone)}
                row |= {key: reference[key] for key in ("max_abs_logit", "transformers_fp32_error")}
                row |= {f"gradient of {kind}": largest_difference(*folders) for kind, folders in made.items()}
                results.append(row | {"tensors": len(list(HFFolder(out))), "different_tensors": different})
                shown = f"max |dlogit| {max(everyone):.1e}  {len(different)} tensors differ"
                shown += "".join(f"  {kind} {row[f'gradient of {kind}']:.1e}" for kind in made)
                print(f"{name:18} {label:36} {shown}", flush=True)
            world.barrier()
    if int(os.environ["RANK"]) == 0:
        (work / f"results.{kind_of(names[0])}.json").write_text(json.dumps(results))
    shutdown()


def gradient_folders(
    work: Path, name: str, out: Path, model: GPT, texts: list[list[int]], world: World
) -> dict[str, tuple[HFFolder, HFFolder]]:
    """For each loss, the folder with transformers' gradients and the one with ours, which this writes. Collective.

    The model's weights are gone afterwards.
    """
    from fusemega.hf.export import export_hf
    from fusemega.hf.folder import HFFolder
    from fusemega.losses.apply import objective_loss
    from fusemega.losses.sft import SFT
    from fusemega.models.build import placements
    from fusemega.passes.forward import run_schedule
    from fusemega.training.optimizer import OptimizerSection, wrap
    from tests.distributed.workers.families import row_of
    from tests.losses.pairwise import Pairwise

    batch = row_of(texts, world.layout.segment_multiple)
    ddp, optimizer = wrap(model, OptimizerSection(lr=1e-3, use_distributed_optimizer=False, clip_grad=0.0))
    # Each data-parallel rank brings the same row, several times where the schedule wants several.
    times = world.dp_size * world.layout.micro_batch_multiple
    counts = {"lm": len(batch.labels) * times, "pairwise": len(texts) // 2 * times}
    objectives: list[Any] = [SFT(), Pairwise(Pairwise.Settings(beta=BETA))]
    kept: dict[str, list[torch.Tensor]] = {}
    for kind, objective in zip(LOSSES, objectives, strict=True):

        def loss_function(hidden_NH: Any, batch: Any, objective: Any = objective) -> Any:
            loss, _ = objective_loss(objective, model, hidden_NH, batch, counts, world)
            return loss, loss.detach()

        for chunk in ddp:
            chunk.zero_grad_buffer()
        run_schedule(ddp, [batch] * world.layout.micro_batch_multiple, loss_function, world, forward_only=False)
        parameters: list[Any] = [placement.parameter for placement in placements(model, world)]
        kept[kind] = [parameter.main_grad.clone() for parameter in parameters]
    folders = {}
    for kind, gradients in kept.items():
        for placement, gradient in zip(placements(model, world), gradients, strict=True):
            placement.parameter.data.copy_(gradient)
        folder = out.with_name(f"{out.name}.{kind}")
        export_hf(model, folder, work / name, world)
        world.barrier()
        folders[kind] = (HFFolder(work / f"{name}.{kind}"), HFFolder(folder))
    return folders


def largest_difference(wanted: HFFolder, found: HFFolder) -> float:
    """Of all gradients: the norm of the difference over the norm; where that is 0, over that of all gradients."""
    from fusemega.files.boxes import whole

    if set(wanted) != set(found):
        return float("inf")
    pairs = [[folder.read(name, whole(folder.shape(name))).double() for folder in (wanted, found)] for name in wanted]
    everything = sum(float(a.norm()) ** 2 for a, _ in pairs) ** 0.5
    differences = [float((b - a).norm()) / (float(a.norm()) or everything) for a, b in pairs]
    return max(difference if difference == difference else float("inf") for difference in differences)


def different_tensors(ours: HFFolder, theirs: HFFolder) -> list[str]:
    """Names that only one folder has, or whose type, shape or any bit differs."""
    import torch

    from fusemega.files.boxes import whole

    different = sorted(set(ours) ^ set(theirs))
    for name in set(ours) & set(theirs):
        a, b = (folder.read(name, whole(folder.shape(name))) for folder in (ours, theirs))
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            different.append(name)
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small random models only")
    parser.add_argument("--models", nargs="+", choices=[*TINY, REAL], help="these models only")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.worker:
        worker(Path(args.worker[0]), args.worker[1].split(","))
        return 0
    chosen = args.models or [*TINY, *([] if args.quick else [REAL])]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, chosen)
        results: list[dict[str, Any]] = []
        for kind, (nproc, _) in KINDS.items():
            names = [name for name in chosen if kind_of(name) == kind]
            if not names:
                continue
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
            command += [str(Path(__file__).resolve()), "--worker", str(work), ",".join(names)]
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
            subprocess.run(command, check=True, env=env)
            results += json.loads((work / f"results.{kind}.json").read_text())
    worst = max(row["max_logit_difference"] for row in results)
    gradients = {f"gradient of {kind}": 0.0 for kind in LOSSES}
    gradients = {key: max(row.get(key, 0.0) for row in results) for key in gradients}
    bitwise = not any(row["different_tensors"] for row in results)
    summary = {
        "benchmark": "parity",
        "quick": args.quick,
        "tolerance": TOLERANCE,
        "max_logit_difference": worst,
        **{f"max_{key.replace(' ', '_')}": value for key, value in gradients.items()},
        "round_trip_bitwise": bitwise,
        "cases": results,
        "ok": bool(max(worst, *gradients.values()) <= TOLERANCE and bitwise),
    }
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
