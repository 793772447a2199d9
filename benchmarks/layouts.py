"""The same loss curve in every layout: 20 steps of each, relative to one process.

    python benchmarks/layouts.py [--all] [--quick] [--experts] [--objective fuse | wrpo | fuse_po] [--worlds 1 2 4 8]
        [--steps 20]

Trains a tiny random Llama (8 layers, tied embeddings, an odd vocabulary that needs padding) on real chat text in fp32,
through the same code as `fusemega train`. A star around the run of one process, in which one thing changes at a time,
and with `--all` named combinations on four and eight processes. Gradient buckets are made small, so that overlapped
communication has something to overlap. `--experts`: a Mixtral, each case twice: with its own choices of experts, and
with the reference's (`routing.py`); `differ` counts the choices that are not the reference's. `--objective fuse`: two
teachers beside the labels, one of them with a tokenizer of its own, mixed; their stores are written by four processes,
PP2 x DP2. `--objective wrpo` and `fuse_po`: groups of four responses of unequal length from two sources, with the
reference's log-probabilities in a store, and cases in which the responses of a group share their prompt (`PREFERENCE`).
Several layouts share a launch; `--worlds` picks launches (the reference is always run). The last line is one JSON
object; `ok` says whether every case is within 1e-5 (loss, all steps), 1e-5 (gradient norm, step 1) and 1e-4 (gradient
norm, all steps) of the reference; with experts, see `within`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Of fuse: holds every conversation whole, under either tokenizer. Of the last two: holds every group.
SEQ_LENGTH = {"sft": 128, "fuse": 512, "wrpo": 1024, "fuse_po": 1024}
BUCKET = 20_000  # elements; a layer has 36,992
LOSS_TOLERANCE, FIRST_NORM_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-5, 1e-4
CHOICE_TOLERANCE = 1e-4  # of logits that may change places, as a part of the largest one

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
P2P = {"overlap_p2p_comm": True}
FIRST2 = {"num_layers_in_first_pipeline_stage": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SELECTIVE = {"recompute_granularity": "selective"}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    """A layout: how many processes, and what its sections of the run file say."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


STAR = {
    "reference": Case(1),
    "micro-batch 2": Case(1, {}, {"micro_batch_size": 2}),
    "micro-batch 4": Case(1, {}, {"micro_batch_size": 4}),
    "unpacked": Case(1, {}, {"packing": False}),
    "recompute selective": Case(1, {}, SELECTIVE),
    "recompute full, uniform": Case(1, {}, UNIFORM),
    "recompute full, block": Case(1, {}, BLOCK),
    "TP2": Case(2, TP2),
    "TP2+SP": Case(2, TP2 | SP),
    "PP2": Case(2, PP2),
    "PP2, 2 + 6 layers": Case(2, PP2 | FIRST2),
    "PP2xVPP2, overlapped": Case(2, PP2 | VPP2 | P2P),
    "CP2": Case(2, CP2),
    "DP2, distributed optimizer": Case(2),
    "DP2, plain optimizer": Case(2, optimizer={"use_distributed_optimizer": False}),
    "DP2, overlapped": Case(2, optimizer=OVERLAP),
    "PP4xVPP2": Case(4, PP4 | VPP2),
    "CP4": Case(4, {"context_parallel_size": 4}),
}
PAIRS = {
    "TP2+SP unpacked, micro-batch 4": Case(2, TP2 | SP, {"packing": False, "micro_batch_size": 4}),
    "PP2 unpacked, micro-batch 2": Case(2, PP2, {"packing": False, "micro_batch_size": 2}),
    "PP2xVPP2, 2 + 6 layers, recompute full": Case(2, PP2 | VPP2 | P2P | FIRST2, BLOCK),
    "CP2 unpacked, micro-batch 2": Case(2, CP2, {"packing": False, "micro_batch_size": 2}),
    "CP2, recompute selective": Case(2, CP2, SELECTIVE),
    "DP2, micro-batch 2": Case(2, {}, {"micro_batch_size": 2}),
    "TP2+SPxCP2": Case(4, TP2 | SP | CP2),
    "CP2xPP2": Case(4, CP2 | PP2),
    "CP2xPP2xVPP2, recompute full": Case(4, CP2 | PP2 | VPP2 | P2P, UNIFORM),
    "CP2xDP2, overlapped": Case(4, CP2, optimizer=OVERLAP),
    "PP2xDP2, overlapped": Case(4, PP2, optimizer=OVERLAP),
    "PP2xVPP2xDP2, overlapped": Case(4, PP2 | VPP2 | P2P, optimizer=OVERLAP),
    "TP2xPP2xDP2": Case(8, TP2 | PP2),
    "TP2xPP2xDP2+SP, micro-batch 2": Case(8, TP2 | SP | PP2, {"micro_batch_size": 2}),
    "TP2xPP2xDP2+SP unpacked, micro-batch 4": Case(8, TP2 | SP | PP2, {"packing": False, "micro_batch_size": 4}),
    "TP2xCP2xDP2": Case(8, TP2 | CP2),
    "TP2xCP2xPP2+SP": Case(8, TP2 | SP | CP2 | PP2),
    "TP2xPP2xVPP2xDP2+SP, overlapped": Case(8, TP2 | SP | PP2 | VPP2 | P2P, optimizer=OVERLAP),
    "CP2xPP2xVPP2xDP2, overlapped, recompute": Case(8, CP2 | PP2 | VPP2 | P2P, SELECTIVE, OVERLAP),
}
SHARED = {"share_prefix": True}
BALANCED = {"router_aux_loss_coef": 0.02}
# The layouts that preference losses are asked for, and shared prompts in those that allow them.
PREFERENCE = {
    name: (STAR | PAIRS)[name]
    for name in ("reference", "micro-batch 2", "micro-batch 4", "unpacked", "TP2", "TP2+SP", "PP2")
    + ("PP2xVPP2, overlapped", "DP2, distributed optimizer", "CP2", "CP2xDP2, overlapped")
} | {
    "TP2xPP2": Case(4, TP2 | PP2),
    "shared prompts": Case(1, {}, SHARED),
    "shared prompts, unpacked": Case(1, {}, SHARED | {"packing": False}),
    "shared prompts, TP2+SP": Case(2, TP2 | SP, SHARED),
    "shared prompts, PP2xVPP2": Case(2, PP2 | VPP2 | P2P, SHARED),
    "shared prompts, DP2, micro-batch 2": Case(2, {}, SHARED | {"micro_batch_size": 2}),
}
EP2, ETP1 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}
EXPERTS = {
    "reference": STAR["reference"],
    "micro-batch 2": STAR["micro-batch 2"],
    "EP2": Case(2, EP2),
    "EP2, allgather": Case(2, EP2 | {"moe_token_dispatcher_type": "allgather"}),
    "TP2+SPxEP2, expert TP 1": Case(2, TP2 | SP | EP2 | ETP1),
    "EP2xTP2+SP": Case(4, TP2 | SP | EP2),
    "EP2xDP2, overlapped": Case(4, EP2, optimizer=OVERLAP),
    "EP2xPP2": Case(4, PP2 | EP2),
}
CASES = STAR | PAIRS | PREFERENCE | EXPERTS
QUICK = ("reference", "unpacked", "TP2+SP", "PP2xVPP2, overlapped", "CP2", "DP2, micro-batch 2", "TP2xPP2xDP2")


def curves(work: Path, steps: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """In a rank: (loss, gradient norm) of each step for each case, and what `routed` says of the experts' choices."""
    from fusemega.config import validate
    from fusemega.training import optimizer
    from fusemega.training.assembly import open_trainer
    from fusemega.training.run_file import TrainRun

    optimizer.DistributedDataParallelConfig = partial(optimizer.DistributedDataParallelConfig, bucket_size=BUCKET)
    objective = json.loads((work / "objective.json").read_text())
    experts = json.loads((work / "model" / "config.json").read_text())["model_type"] == "mixtral"
    found: dict[str, dict[str, Any]] = {}
    twice = [name for name in names for _ in range(2 if experts and name != "reference" else 1)]
    for name in twice:  # the second time with the reference's choices of experts
        case = CASES[name]
        run = validate(
            TrainRun,
            {
                "output_dir": str(work / "runs" / name),
                "model": {"load": str(work / "model"), "dtype": "fp32"},
                "parallel": case.parallel,
                "data": {"path": str(work / "rows.jsonl"), "seq_length": SEQ_LENGTH[objective["name"]]},
                "objective": objective,
                "optimizer": {
                    "lr": 2e-3,
                    "weight_decay": 0.1,
                    "clip_grad": 1.0,
                    "lr_warmup_fraction": 0.1,
                    **case.optimizer,
                },
                "training": {
                    "train_iters": steps,
                    "global_batch_size": 16,
                    "export_hf": False,
                    **(BALANCED if experts else {}),
                    **case.training,
                },
            },
            name,
        )
        trainer, _ = open_trainer(run)
        follow = name in found
        routing = listen(work, trainer, follow) if experts else None
        rows = []
        for step in range(steps):
            if routing is not None:
                routing.step = step
            rows.append(trainer.step())
        total = "loss" if "loss" in rows[0] else f"{trainer.objective.terms[0]} loss"
        curve = [(row[total], row["grad-norm"]) for row in rows]
        found[name] = found.get(name, {}) | ({"followed": curve} if follow else {"curve": curve})
        if routing is not None:
            found[name]["routed, followed" if follow else "routed"] = routed(work, name, routing, trainer.world)
    return found


def listen(work: Path, trainer: Any, follow: bool) -> Any:
    """Writes down the reference's choices of experts, and compares the others' with them."""
    import routing

    path = work / "choices.npz"
    return routing.Routing(trainer.gpt, trainer.world, routing.load(path) if path.exists() else None, follow)


def routed(work: Path, name: str, listened: Any, world: Any) -> dict[str, Any]:
    """Choices of all ranks that differ from the reference's. Collective."""
    import routing

    if name == "reference":
        routing.save(listened.choices, work / "choices.npz")
    told = world.from_all((len(listened.choices), listened.differing, listened.first))
    differing = [distance for _, some, _ in told for distance in some]
    return {
        "choices": sum(count for count, _, _ in told),
        "differ": len(differing),
        "first_step": min((first for _, _, first in told if first >= 0), default=-1) + 1,
        "largest_distance": max(differing, default=0.0),
    }


def write_teachers(work: Path, chat: Path) -> dict[str, Any]:
    """Two teachers' stores and a map. Returns the objective that fuses them."""
    import tiny

    from fusemega.align.make_map import exact_map
    from fusemega.align.vocabulary import Vocabulary
    from fusemega.text.tokenizer import Tokenizer

    tiny.write_model(work / "alike", chat, seed=1, num_hidden_layers=8)
    tiny.write_model(work / "coarse", chat, seed=2, vocab_size=331)
    coarse, own = (Vocabulary.of(Tokenizer.load(work / name)) for name in ("coarse", "model"))
    exact_map(coarse, own).save(work / "coarse.map")
    for name in ("alike", "coarse"):
        run = {"model": {"load": str(work / name), "dtype": "fp32"}, "parallel": PP2}
        run |= {"data": {"path": str(chat), "seq_length": SEQ_LENGTH["fuse"]}, "store": str(work / f"store-{name}")}
        (work / "teach.yaml").write_text(json.dumps(run))
        command = [sys.executable, "-m", "fusemega", "teach", str(work / "teach.yaml"), "--nproc", "4"]
        subprocess.run(command, check=True)
    stores = [{"store": str(work / "store-alike")}]
    stores += [{"store": str(work / "store-coarse"), "map": str(work / "coarse.map")}]
    return {"name": "fuse", "teachers": stores, "fusion": {"function": "avg_ce"}, "lambda": 0.3}


def write_groups(work: Path, chat: Path) -> None:
    """`rows.jsonl`: each prompt with four responses of unequal length, two of each source, with rewards."""
    chats = [json.loads(line)["messages"] for line in chat.read_text(encoding="utf-8").splitlines()]
    rows = []
    for number, (asked, answer) in enumerate(chats):
        responses = []
        for place in range(4):
            other = chats[(number + place) % len(chats)][1]["content"]
            content = answer["content"][: 20 + 10 * place] + other[: 5 + (number * 7 + place * 13) % 40]
            message = {"role": "assistant", "content": content}
            source, reward = ("own", "strong")[place % 2], ((number * 5 + place * 3) % 7) / 7
            responses.append({"messages": [message], "source": source, "reward": reward})
        rows.append({"prompt": [{**asked, "content": asked["content"][:60]}], "responses": responses})
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def preference(work: Path, name: str) -> dict[str, Any]:
    """The objective, with a store of the starting model's log-probabilities."""
    run = {"model": {"load": str(work / "model"), "dtype": "fp32"}, "parallel": PP2, "rows": "none"}
    run |= {
        "data": {"path": str(work / "rows.jsonl"), "seq_length": SEQ_LENGTH[name]},
        "store": str(work / "reference"),
    }
    (work / "teach.yaml").write_text(json.dumps(run))
    command = [sys.executable, "-m", "fusemega", "teach", str(work / "teach.yaml"), "--nproc", "4"]
    subprocess.run(command, check=True)
    objective: dict[str, Any] = {"name": name, "beta": 0.1, "reference": {"store": str(work / "reference")}}
    return objective | ({"target": "own"} if name == "wrpo" else {"alpha": 0.2})


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--all", action="store_true", help="also the combinations")
    parser.add_argument("--quick", action="store_true", help="seven cases only")
    parser.add_argument("--experts", action="store_true", help="a model with experts, under expert parallelism")
    parser.add_argument("--objective", choices=SEQ_LENGTH, default="sft")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8], help="launches of so many processes")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        mine = curves(args.rank_of, args.steps, args.cases)
        if os.environ.get("RANK", "0") == "0":
            (args.rank_of / f"curves-{os.environ.get('WORLD_SIZE', '1')}.json").write_text(json.dumps(mine))
        return

    import tiny

    compares = args.objective in ("wrpo", "fuse_po")
    chosen = (
        EXPERTS
        if args.experts
        else PREFERENCE
        if compares
        else QUICK
        if args.quick
        else STAR | PAIRS
        if args.all
        else STAR
    )
    names = [name for name in chosen if name == "reference" or CASES[name].world in args.worlds]
    with tempfile.TemporaryDirectory(prefix="fusemega-layouts-") as folder:
        work = Path(folder)
        chat = tiny.write_chat(work / "chat.jsonl", rows=96, characters=300)
        shape = {"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 4, "intermediate_size": 64}
        tiny.write_model(work / "model", chat, **(shape if args.experts else {"num_hidden_layers": 8}))
        if compares:
            write_groups(work, chat)
            objective = preference(work, args.objective)
        else:
            (work / "rows.jsonl").symlink_to(chat)
            objective = write_teachers(work, chat) if args.objective == "fuse" else {"name": "sft"}
        (work / "objective.json").write_text(json.dumps(objective))
        found: dict[str, dict[str, Any]] = {}
        for world in sorted({CASES[name].world for name in names}):
            cases = [name for name in names if CASES[name].world == world]
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command = [sys.executable, *launch, __file__, "--rank-of", folder, "--steps", str(args.steps), "--cases"]
            environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
            subprocess.run([*command, *cases], check=True, env=environment)
            found |= json.loads((work / f"curves-{world}.json").read_text())

    reference = found["reference"]["curve"]
    report = {name: compared(found[name], reference) for name in names}
    for name, case in report.items():
        print(f"{name:<40} " + "  ".join(f"{key} {shown(value)}" for key, value in case.items()))
    ok = all(within(case) for case in report.values())
    curve = {
        "objective": args.objective,
        "experts": args.experts,
        "first_loss": reference[0][0],
        "last_loss": reference[-1][0],
    }
    print(json.dumps({"benchmark": "layouts", "ok": ok, "steps": args.steps, **curve, "relative_difference": report}))
    sys.exit(not ok)


def differences(curve: list[list[float]], reference: list[list[float]]) -> dict[str, float]:
    """The largest ones, relative to the reference."""
    return {
        "loss": max(relative(a[0], b[0]) for a, b in zip(curve, reference, strict=True)),
        "grad_norm_step_1": relative(curve[0][1], reference[0][1]),
        "grad_norm": max(relative(a[1], b[1]) for a, b in zip(curve, reference, strict=True)),
    }


def compared(case: dict[str, Any], reference: list[list[float]]) -> dict[str, Any]:
    """Of one case: see `differences`; with experts, also of the steps before the first other choice of experts, and of
    its run with the reference's choices."""
    out: dict[str, Any] = differences(case["curve"], reference)
    if "followed" in case:
        alike = case["routed"]["first_step"] - 1 if case["routed"]["differ"] else len(reference)
        alike = max(alike, 1)
        out["grad_norm, choices alike"] = differences(case["curve"][:alike], reference[:alike])["grad_norm"]
        out |= {f"{key}, followed": value for key, value in differences(case["followed"], reference).items()}
        out |= {key: case[key] for key in ("routed", "routed, followed")}
    return out


def within(case: dict[str, Any]) -> bool:
    """Whether a case is near enough.

    With experts: the loss of all steps; the gradient norm of the steps before the first other choice; and everything in
    the run with the reference's choices, whose own choices may differ only where two logits are equal to rounding.
    """
    limits = {"loss": LOSS_TOLERANCE, "grad_norm_step_1": FIRST_NORM_TOLERANCE, "grad_norm": NORM_TOLERANCE}
    if "routed" in case:
        limits["grad_norm, choices alike"] = limits.pop("grad_norm")
        limits |= {"loss, followed": LOSS_TOLERANCE, "grad_norm, followed": NORM_TOLERANCE}
        if case["routed, followed"]["largest_distance"] > CHOICE_TOLERANCE:
            return False
    return all(case[key] <= limit for key, limit in limits.items())


def shown(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:.1e}"
    where = f" (from step {value['first_step']}, by {value['largest_distance']:.1e})" if value["differ"] else ""
    return f"{value['differ']} of {value['choices']}{where}"


if __name__ == "__main__":
    main()
