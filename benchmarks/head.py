"""The vocabulary head against a dense one: exactness in float64 at TP 1, 2, 4; memory and time at a large vocabulary.

    python benchmarks/head.py [--quick] [--dtype bfloat16|float32] [--vocab 151936 --hidden 896 --tokens 4096]
                              [--losses ce kd kl]

Exactness: both entry points against full logits and autograd, over chunk sizes, residuals down to 1e-12, duplicate and
padding ids, ids on other ranks, one-token batches, logits of +-1e4, soft-capping, temperatures; values, d_hidden and
d_weight within 1e-10 of max(1, largest reference entry); central finite differences within 1e-6.

Memory and time: dense cross-entropy (ce), dense distillation (kd: cross-entropy + a 10-id teacher row) and the whole
distribution of a teacher computed beside (kl: cross-entropy + forward KL from a teacher's hidden states and weight of
the same sizes), each arm and repetition in its own process, in turn. Memory is the peak resident set less the level
once inputs exist, less the two returned gradients. Targets: memory <= 1/16 of dense; time <= 0.7 (fused) and <= 0.9
(recompute) of dense; none for kl, whose dense form holds the teacher's logits as well. A dense arm
that runs past `--limit` is ended, and gives bounds: PyTorch's bf16 products on a CPU without AVX-512 run on one thread
at about 1 to 10 GFLOP/s, a hundredth of fp32's. There `--dtype float32` is the comparison that says something of time.

Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from head_exactness import DIFFERENCE_TOLERANCE, TOLERANCE, check_differences, exactness
from torch import Tensor

from fusemega.logits.divergence import fused_divergence_loss
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss, sparse_log_probs

MEMORY_TARGET = 1 / 16
TIME_TARGETS = {"fused": 0.7, "recompute": 0.9}
TEACHER_IDS = 10
ARMS = ("dense-ce", "fused-ce", "recompute-ce", "dense-kd", "fused-kd", "recompute-kd", "dense-kl", "fused-kl")


def run_arm(arm: str, dtype: torch.dtype, tokens: int, vocab: int, hidden: int, chunk: int | None) -> dict[str, float]:
    """One forward and backward of one arm in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    hidden_TH, weight_VH = (tensor.requires_grad_() for tensor in _head_inputs(tokens, vocab, hidden, dtype))
    labels_T = torch.randint(vocab, (tokens,))
    teacher = (torch.randint(vocab, (tokens, TEACHER_IDS)), torch.rand(tokens, TEACHER_IDS).softmax(1))
    small = (teacher[0][:2] % 64, teacher[1][:2])
    if arm.endswith("kl"):
        teacher = _head_inputs(tokens, vocab, hidden, dtype)
        small = (teacher[0][:2], teacher[1][:64])
    step = STEPS[arm]
    step(hidden_TH[:2], weight_VH[:64], labels_T[:2] % 64, *small, chunk).backward()  # warm up
    hidden_TH.grad = weight_VH.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide as much of the arm's own
    before = _resident_bytes()
    returned = hidden_TH.nbytes + weight_VH.nbytes  # the gradients have the inputs' sizes
    print(json.dumps({"before": before, "returned": returned}), flush=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = step(hidden_TH, weight_VH, labels_T, *teacher, chunk)
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    extra = (peak - before - returned) / 2**20
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mib": extra, "loss": loss.item()}


def _head_inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden_TH = torch.empty(tokens, hidden, dtype=dtype)
    weight_VH = torch.empty(vocab, hidden, dtype=dtype)
    for tensor, scale in ((hidden_TH, 1.0), (weight_VH, 0.02)):
        for rows in tensor.split(4096):  # no large temporary: it would raise the peak before the start
            rows.copy_(torch.randn(rows.shape) * scale)
    return hidden_TH, weight_VH


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _dense_ce(h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, p: Tensor, chunk: int | None) -> Tensor:
    return F.cross_entropy((h @ w.t()).float(), labels)


def _dense_kd(h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, p: Tensor, chunk: int | None) -> Tensor:
    logp = (h @ w.t()).float().log_softmax(1)
    return 0.5 * F.nll_loss(logp, labels) - 0.5 * (p * logp.gather(1, ids)).sum(1).mean()


def _fused_ce(h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, p: Tensor, chunk: int | None) -> Tensor:
    def loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        return -results[0].logp_TK[:, 0], results[0].logp_TK[:, :0]

    return fused_token_loss(h, w, [Query(labels[:, None])], loss, vocab_size=len(w), chunk_tokens=chunk)[0] / len(h)


def _fused_kd(h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, p: Tensor, chunk: int | None) -> Tensor:
    def loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        kd = -(p[rows] * results[1].logp_TK).sum(1)
        return 0.5 * kd - 0.5 * results[0].logp_TK[:, 0], results[0].logp_TK[:, :0]

    queries = [Query(labels[:, None]), Query(ids)]
    return fused_token_loss(h, w, queries, loss, vocab_size=len(w), chunk_tokens=chunk)[0] / len(h)


def _recompute_ce(h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, p: Tensor, chunk: int | None) -> Tensor:
    return -sparse_log_probs(h, w, Query(labels[:, None]), vocab_size=len(w), chunk_tokens=chunk).logp_TK.mean()


def _recompute_kd(h: Tensor, w: Tensor, labels: Tensor, ids: Tensor, p: Tensor, chunk: int | None) -> Tensor:
    query = Query(torch.cat([labels[:, None], ids], dim=1))
    logp = sparse_log_probs(h, w, query, vocab_size=len(w), chunk_tokens=chunk).logp_TK
    return -0.5 * logp[:, 0].mean() - 0.5 * (p * logp[:, 1:]).sum(1).mean()


def _dense_kl(h: Tensor, w: Tensor, labels: Tensor, th: Tensor, tw: Tensor, chunk: int | None) -> Tensor:
    logp = (th @ tw.t()).float().log_softmax(1)
    logq = (h @ w.t()).float().log_softmax(1)
    return 0.5 * F.nll_loss(logq, labels) + 0.5 * F.kl_div(logq, logp, reduction="batchmean", log_target=True)


def _fused_kl(h: Tensor, w: Tensor, labels: Tensor, th: Tensor, tw: Tensor, chunk: int | None) -> Tensor:
    half = 0.5 / len(h)
    return fused_divergence_loss(
        h, w, th, tw, labels, "forward_kl",
        label_weight=half, divergence_weight=half, vocab_size=len(w), chunk_tokens=chunk,
    )[0]  # fmt: skip


STEPS: dict[str, Callable[..., Tensor]] = {
    "dense-ce": _dense_ce,
    "dense-kd": _dense_kd,
    "dense-kl": _dense_kl,
    "fused-ce": _fused_ce,
    "fused-kd": _fused_kd,
    "fused-kl": _fused_kl,
    "recompute-ce": _recompute_ce,
    "recompute-kd": _recompute_kd,
}


def _run_child(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """One arm in a process of its own.

    A dense arm is ended past `--limit` seconds: then `finished` is 0, `seconds` a lower bound, `extra_mib` the peak so
    far.
    """
    options = [f"--{key}={getattr(args, key)}" for key in ("dtype", "vocab", "hidden", "tokens", "chunk")]
    command = [sys.executable, __file__, "--arm", arm, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        start = json.loads(child.stdout.readline())
        try:
            text, _ = child.communicate(timeout=args.limit if arm.startswith("dense") else None)
        except subprocess.TimeoutExpired:
            status = Path(f"/proc/{child.pid}/status").read_text()
            child.kill()
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
            extra = (peak - start["before"] - start["returned"]) / 2**20
            return {"seconds": args.limit, "extra_mib": extra, "finished": 0.0}
    if child.returncode:
        raise RuntimeError(f"{arm}: exit status {child.returncode}")
    return {**json.loads(text), "finished": 1.0}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All arms of `--losses`, in turn, `--repeats` times (dense `--dense-repeats` times)."""
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS if arm[-2:] in args.losses}
    for number in range(max(args.repeats, args.dense_repeats)):
        for arm in runs:
            if number < (args.dense_repeats if arm.startswith("dense") else args.repeats):
                runs[arm].append(_run_child(arm, args))
                print(arm, runs[arm][-1], file=sys.stderr, flush=True)
    figures: dict[str, Any] = {}
    for arm, results in runs.items():
        figures[arm] = {
            key: round(median(result[key] for result in results), 4) for key in set.intersection(*map(set, results))
        }
        dense = figures["dense-" + arm[-2:]]
        figures[arm]["seconds_all"] = [round(result["seconds"], 2) for result in results]
        figures[arm]["time_ratio"] = round(figures[arm]["seconds"] / dense["seconds"], 4)
        figures[arm]["memory_ratio"] = round(figures[arm]["extra_mib"] / dense["extra_mib"], 4)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="exactness only")
    parser.add_argument("--losses", nargs="+", choices=("ce", "kd", "kl"), default=("ce", "kd", "kl"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=128, help="tokens a chunk, both entry points")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense-repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a dense arm may take")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        dtype = getattr(torch, args.dtype)
        print(json.dumps(run_arm(args.arm, dtype, args.tokens, args.vocab, args.hidden, args.chunk)))
        return 0

    errors = {f"tp{ranks}": exactness(ranks) for ranks in (1, 2, 4)}
    differences = check_differences()
    ok = {f"exact {name}": max(table.values()) <= TOLERANCE for name, table in errors.items()}
    ok["finite differences"] = differences <= DIFFERENCE_TOLERANCE
    report: dict[str, Any] = {"errors": errors, "finite_difference_error": differences}
    if not args.quick:
        figures = measure(args)
        for arm, figure in figures.items():
            entry = arm[:-3]
            if entry != "dense" and not arm.endswith("kl"):
                ok[f"{arm} memory"] = figure["memory_ratio"] <= MEMORY_TARGET
                ok[f"{arm} time"] = figure["time_ratio"] <= TIME_TARGETS[entry]
        shape = {key: getattr(args, key) for key in ("dtype", "vocab", "hidden", "tokens", "chunk")}
        report |= {"shape": shape, "arms": figures}
    print(json.dumps({**report, "ok": ok}))
    return 0 if all(ok.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
