"""Supervised fine-tuning beside transformers: the same samples, non-padding tokens a second, and equal losses.

    python benchmarks/sft_vs_transformers.py [--quick] [--rows equal chat] [--dtypes fp32 bf16]

SmolLM2-135M-Instruct on this machine's CPU, one process a side. `equal` are rows of exactly 512 tokens, all
supervised; `chat` are real conversations, their answers supervised. The peer is a plain training loop on transformers:
sdpa attention, micro-batches of 4 samples padded to their longest, the loss normalised by the step's supervised tokens
(as its Trainer does), gradients clipped to 1, torch's fused AdamW. fusemega runs what `fusemega train` runs, and packs
the same samples. Both take the same steps from the same weights, in turn, so each step gives one ratio of two times
that lie close together; figures are medians over steps, at the number of threads that suits each side best. GEMM rates
are of torch.mm at the model's shapes, in between. `ok` is whether fp32 losses agree to 1e-3 and equal rows are at
least 1.1 times, chat at least 1.5 times as fast in fp32. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from in_turn import Requests, Side

MICRO_BATCH, GLOBAL_BATCH, ROW = 4, 4, 512
SEQ_LENGTH = {"equal": ROW, "chat": 2048}
LEARNING_RATE, SEED, MOST_STEPS = 1e-5, 1234, 40
TARGETS = {"equal": 1.1, "chat": 1.5}
LOSS_TOLERANCE = 1e-3
Step = Callable[[int], float]


def run_file(work: Path, rows: str, dtype: str) -> Any:
    """The run file of fusemega's side."""
    from fusemega.config import validate
    from fusemega.fixtures.data import smollm2
    from fusemega.training.run_file import TrainRun

    settings = {
        "output_dir": str(work / f"run-{rows}-{dtype}"),
        "model": {"load": str(smollm2()), "dtype": dtype},
        "data": {"path": str(work / f"{rows}.jsonl"), "seq_length": SEQ_LENGTH[rows]},
        "objective": {"name": "sft"},
        "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant", "clip_grad": 1.0},
        "training": {
            "train_iters": MOST_STEPS,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": MICRO_BATCH if rows == "equal" else 1,
            "seed": SEED,
            "export_hf": False,
        },
    }
    return validate(TrainRun, settings, rows)


def write_rows(work: Path) -> None:
    """`chat.jsonl`, and `equal.jsonl`: one text whose windows are all exactly `ROW` tokens long."""
    from fusemega.fixtures.data import chat_data, smollm2
    from fusemega.text.tokenizer import Tokenizer

    chat = chat_data().train
    (work / "chat.jsonl").symlink_to(chat)
    tokenizer = Tokenizer.load(smollm2())
    answers = [json.loads(line)["messages"][1]["content"] for line in chat.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(answers[:400])
    windows = 0
    while not windows:  # a window begins with the last token of the one before; the text ends with an eos of its own
        encoding = tokenizer.encode([text])[0]
        extra = (len(encoding.ids) + len(tokenizer.prefix_ids) + 1 - 1) % (ROW - 1)
        windows = 0 if extra else len(encoding.ids) // (ROW - 1)
        text = text[: int(encoding.starts[-extra])] if extra else text
    (work / "equal.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")


def write_steps(work: Path, rows: str) -> list[dict[str, int]]:
    """The samples of every step, for the peer, in fusemega's order. Returns each step's counts."""
    import torch

    from fusemega.files.cache import cache_folder
    from fusemega.fixtures.data import smollm2
    from fusemega.text.dataset import prepare
    from fusemega.text.order import sample_ids
    from fusemega.text.tokenizer import Tokenizer

    run = run_file(work, rows, "fp32")
    dataset = prepare(run.data, Tokenizer.load(smollm2()), cache_folder() / "data", vocab_size=49152)
    steps, counts = [], []
    for step in range(MOST_STEPS):
        samples = [dataset[int(i)] for i in sample_ids(step, GLOBAL_BATCH, len(dataset), SEED)]
        steps.append([(torch.tensor(s.ids).long(), torch.tensor(s.supervised)) for s in samples])
        lengths = [len(s.ids) for s in samples]
        batches = [lengths[i : i + MICRO_BATCH] for i in range(0, len(lengths), MICRO_BATCH)]
        counts.append(
            {
                "tokens": sum(lengths),
                "supervised": sum(len(s.positions) for s in samples),
                "squares": sum(n * n for n in lengths),
                "padded": sum(max(batch) * len(batch) for batch in batches),
            }
        )
    torch.save(steps, work / f"{rows}.steps.pt")
    return counts


def fusemega_step(work: Path, rows: str, dtype: str) -> Step:
    from fusemega.training.assembly import open_trainer

    trainer, _ = open_trainer(run_file(work, rows, dtype))
    return lambda _: trainer.step()["lm loss"]


def transformers_step(work: Path, rows: str, dtype: str) -> Step:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusemega.fixtures.data import smollm2

    folder = smollm2()
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    steps = torch.load(work / f"{rows}.steps.pt")

    def step(number: int) -> float:
        samples = steps[number]
        supervised = sum(int(mask.sum()) for _, mask in samples)
        total = 0.0
        for start in range(0, len(samples), MICRO_BATCH):
            batch = samples[start : start + MICRO_BATCH]
            shape = len(batch), max(len(ids) for ids, _ in batch)
            input_ids, labels = torch.full(shape, pad), torch.full(shape, -100)
            attention_mask = torch.zeros(shape, dtype=torch.long)
            for row, (ids, mask) in enumerate(batch):
                input_ids[row, : len(ids)] = ids
                labels[row, : len(ids)] = torch.where(mask, ids, -100)
                attention_mask[row, : len(ids)] = 1
            loss = model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, num_items_in_batch=supervised
            ).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def gemm_rates(dtype: str, threads: int) -> dict[str, float]:
    """GFLOP/s of torch.mm: the mean over a layer's and the head's products by their work, and the best of them."""
    import torch

    torch.set_num_threads(threads)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tokens = MICRO_BATCH * ROW
    flops = seconds = best = 0.0
    for wide, narrow in ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)):
        x, d, w = (torch.randn(*shape).to(torch_dtype) for shape in ((tokens, narrow), (tokens, wide), (wide, narrow)))
        products = ((x, w.t()), (d, w), (d.t(), x))  # forward, gradient of the input, of the weight
        times = 1 if wide == 49152 else 30
        for a, b in products:
            torch.mm(a, b)
            started = time.perf_counter()
            torch.mm(a, b)
            took = time.perf_counter() - started
            work = 2.0 * tokens * wide * narrow
            best = max(best, work / took)
            flops, seconds = flops + times * work, seconds + times * took
    return {"mean": flops / seconds / 1e9, "best": best / 1e9}


def model_flops(counts: dict[str, int]) -> float:
    """Of one step without padding: layers' matrices, the head where a token is supervised, causal attention."""
    layers, hidden, ffn, heads_and_groups, head_dim, vocab = 30, 576, 1536, 15, 64, 49152
    matrices = layers * (hidden * heads_and_groups * head_dim + hidden * hidden + 3 * hidden * ffn)
    head = hidden * vocab
    return 6.0 * (matrices * counts["tokens"] + head * counts["supervised"] + layers * hidden * counts["squares"])


def worker(side: str, work: Path, rows: str, dtype: str) -> None:
    """One side of the race, in a process of its own."""
    requests = Requests()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    requests.serve({"fusemega": fusemega_step, "transformers": transformers_step}[side](work, rows, dtype))


def side_of(name: str, work: Path, rows: str, dtype: str) -> Side:
    command = [str(Path(__file__).resolve()), "--worker", name, str(work), rows, dtype]
    return Side(command, work / f"{name}-{rows}-{dtype}.log")


def race(
    work: Path, rows: str, dtype: str, counts: Sequence[dict[str, int]], seconds: float, quick: bool
) -> dict[str, Any]:
    """Both sides through the same steps, in turn, for about `seconds`; the first step is not counted.

    Unless `quick`, every other number of threads than all cores gets one step. The rest of the time, and at least three
    steps (quick: two), go to all cores.
    """
    names = ("fusemega", "transformers")
    sides = {name: side_of(name, work, rows, dtype) for name in names}
    try:
        for side in sides.values():
            side.answer()
        cores = len(os.sched_getaffinity(0))
        others = [] if quick else range(1, cores)
        plan = [cores, *others, *[cores] * MOST_STEPS][: len(counts)]
        least = 1 + len(others) + (2 if quick else 3)
        started, taken = time.monotonic(), []
        for number, threads in enumerate(plan):
            order = names if number % 2 else names[::-1]
            found = {name: sides[name].step(number, threads) for name in order}
            taken.append((threads, found))
            shown = "  ".join(f"{name} {counts[number]['tokens'] / found[name]['seconds']:.0f}" for name in names)
            print(f"{rows:5} {dtype} step {number} threads {threads}: tokens/s {shown}", flush=True)
            if number + 1 >= least and (time.monotonic() - started) * (number + 2) / (number + 1) > seconds:
                break
    finally:
        for side in sides.values():
            side.close()
    return summary(taken, counts, dtype)


def summary(
    taken: Sequence[tuple[int, dict[str, dict[str, float]]]], counts: Sequence[dict[str, int]], dtype: str
) -> dict[str, Any]:
    """Rates, ratios and losses of one race."""
    result: dict[str, Any] = {"steps": len(taken)}
    rates: dict[str, dict[int, float]] = {}
    measured = list(enumerate(taken))[1:]
    for name in taken[0][1]:
        rates[name] = {
            threads: statistics.median(
                counts[number]["tokens"] / found[name]["seconds"]
                for number, (used, found) in measured
                if used == threads
            )
            for threads in {used for _, (used, _) in measured}
        }
    best = {name: max(rates[name], key=rates[name].__getitem__) for name in rates}
    gemm = {threads: gemm_rates(dtype, threads) for threads in set(best.values())}
    for name, threads in best.items():
        shares = [
            model_flops(counts[number]) / found[name]["seconds"] / 1e9 / gemm[threads]["mean"]
            for number, (used, found) in measured
            if used == threads
        ]
        result[name] = {
            "tokens_per_s": {str(used): round(rate, 1) for used, rate in sorted(rates[name].items())},
            "best_threads": threads,
            "share_of_gemm_rate": round(statistics.median(shares), 3),
        }
    result["gemm_gflops"] = {str(threads): {k: round(v, 1) for k, v in gemm[threads].items()} for threads in gemm}
    if len(set(best.values())) == 1:
        ratios = [
            found["transformers"]["seconds"] / found["fusemega"]["seconds"]
            for _, (used, found) in measured
            if used == best["fusemega"]
        ]
    else:
        ratios = [rates["fusemega"][best["fusemega"]] / rates["transformers"][best["transformers"]]]
    result["speedup"] = round(statistics.median(ratios), 3)
    result["speedup_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    used = counts[: len(taken)]
    result["padding_of_transformers"] = round(sum(c["padded"] for c in used) / sum(c["tokens"] for c in used) - 1, 3)
    losses = [(found["fusemega"]["loss"], found["transformers"]["loss"]) for _, found in taken]
    result["first_loss"], result["last_loss"] = round(losses[0][0], 5), round(losses[-1][0], 5)
    result["largest_loss_difference"] = max(abs(a - b) for a, b in losses)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fp32 only, a few steps")
    parser.add_argument("--rows", nargs="+", default=["equal", "chat"], choices=["equal", "chat"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, help="of stepping, each pair of data and type; default 100, quick 30")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, folder, rows, dtype = args.worker
        worker(side, Path(folder), rows, dtype)
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    seconds = args.seconds or (30 if args.quick else 100)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fusemega-sft-") as folder:
        work = Path(folder)
        write_rows(work)
        for rows in args.rows:
            counts = write_steps(work, rows)
            for dtype in ["fp32"] if args.quick else args.dtypes:
                results[f"{rows} {dtype}"] = race(work, rows, dtype, counts, seconds, args.quick)
    ok = all(
        result["speedup"] >= TARGETS[name.split()[0]] and result["largest_loss_difference"] <= LOSS_TOLERANCE
        for name, result in results.items()
        if name.endswith("fp32")
    )
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load_at_end": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "sft_vs_transformers", "ok": ok, **machine, "results": results}))
    sys.exit(not ok)


def cpu_name() -> str:
    """The model's name and torch's name for its vector instructions."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
