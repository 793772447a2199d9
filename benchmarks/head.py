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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fusemega.logits import _head
from fusemega.logits.divergence import fused_divergence_loss
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss, sparse_log_probs

TOLERANCE = 1e-10
DIFFERENCE_TOLERANCE = 1e-6
MEMORY_TARGET = 1 / 16
TIME_TARGETS = {"fused": 0.7, "recompute": 0.9}
TEACHER_IDS = 10
ARMS = ("dense-ce", "fused-ce", "recompute-ce", "dense-kd", "fused-kd", "recompute-kd", "dense-kl", "fused-kl")

# ---- exactness ----------------------------------------------------------------------------------------------------

VOCAB, HIDDEN, ROWS = 1003, 24, 320  # ROWS a rank at TP 4; 277 rows are padding
CASES: list[dict[str, Any]] = [
    {"name": f"chunk {chunk}", "chunk_tokens": chunk, "residual": True} for chunk in (1, 3, 8, 13, None)
] + [
    {"name": "plain"},
    {"name": "temperature", "temperature": 2.5, "residual": True},
    {"name": "softcap", "softcap": 5.0, "residual": True},
    {"name": "softcap and temperature", "softcap": 5.0, "temperature": 0.5, "residual": True},
    {"name": "one token", "tokens": 1, "residual": True},
    {"name": "no tokens", "tokens": 0, "residual": True},
    {"name": "logits of 1e4", "scale": 1e4, "chunk_tokens": 5},
    {"name": "logits of 1e4, residual", "scale": 1e4, "residual": True},
    {"name": "residual of 1e-12", "gap": 47.0, "residual": True},
    {"name": "every id listed", "ids": VOCAB, "residual": True},
    {"name": "duplicates", "pool": 5, "residual": True},
    {"name": "mostly padding", "padding": 0.8, "residual": True},
]


def check_case(case: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Largest errors of one case on this rank, relative to max(1, largest reference entry)."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    generator = torch.Generator().manual_seed(7)
    tokens, listed = case.get("tokens", 13), case.get("ids", 9)
    temperature, softcap = case.get("temperature", 1.0), case.get("softcap")
    hidden_TH = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(ROWS * 4, HIDDEN, dtype=torch.float64, generator=generator)
    if "scale" in case and tokens:
        hidden_TH *= case["scale"] / (hidden_TH @ weight_VH[:VOCAB].t()).abs().max()
    ids_TK = torch.rand(tokens, VOCAB, generator=generator).argsort(1)[:, :listed]
    if "gap" in case:  # one hidden channel lifts the listed ids of all tokens far above the others
        ids_TK[:] = torch.arange(listed) * (VOCAB // listed)
        hidden_TH[:, 0], weight_VH[:, 0] = 1.0, 0.0
        weight_VH[ids_TK[0], 0] = case["gap"]
    if "pool" in case:
        ids_TK = ids_TK % case["pool"] * (VOCAB // case["pool"])
    if "padding" in case:
        ids_TK[torch.rand(tokens, listed, generator=generator) < case["padding"]] = -1
    labels_T1 = torch.randint(VOCAB, (tokens, 1), generator=generator)
    shapes = ((tokens, listed), (tokens,), (tokens,))
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    queries = [Query(ids_TK, temperature, case.get("residual", False)), Query(labels_T1)]
    weight_VH[VOCAB:] = 1e3  # padding rows: must not enter the softmax

    def functional(result: SparseLogProbs, rows: slice) -> Tensor:
        loss_T = (result.logp_TK * weights[0][rows]).sum(1) + result.lse_T.tanh() * weights[1][rows]
        if result.log_residual_T is not None:
            finite_T = torch.where(result.log_residual_T.isinf(), 0.0, result.log_residual_T)
            loss_T = loss_T + finite_T.tanh() * weights[2][rows]
        return loss_T

    def both(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        loss_T = functional(results[0], rows) + results[1].logp_TK[:, 0].square()
        return loss_T, torch.stack([results[1].logp_TK[:, 0], results[0].lse_T], dim=1)

    everything = slice(0, tokens)
    full = [x.clone().requires_grad_() for x in (hidden_TH, weight_VH)]
    oracle = [_dense(full[0], full[1][:VOCAB], query, softcap) for query in queries]
    mine = slice(rank * ROWS * 4 // ranks, (rank + 1) * ROWS * 4 // ranks)
    local = [hidden_TH.clone().requires_grad_(), weight_VH[mine].clone().requires_grad_()]
    options: dict[str, Any] = {
        "group": group,
        "vocab_size": VOCAB,
        "softcap": softcap,
        "chunk_tokens": case.get("chunk_tokens"),
    }
    errors: dict[str, float] = {}

    def compare(entry: str, loss: Tensor, reference: Tensor) -> None:
        d_hidden, d_weight = torch.autograd.grad(loss * 3.0, local)
        if group is not None:
            dist.all_reduce(d_hidden, group=group)
        r_hidden, r_weight = torch.autograd.grad(reference * 3.0, full, retain_graph=True)
        errors[f"{entry} loss"] = _error(loss.detach(), reference.detach())
        errors[f"{entry} d_hidden"] = _error(d_hidden, r_hidden)
        errors[f"{entry} d_weight"] = _error(d_weight, r_weight[mine])

    sparse = sparse_log_probs(local[0], local[1], queries[0], **options)
    errors["logp"] = _error(sparse.logp_TK.detach(), oracle[0].logp_TK.detach())
    errors["lse"] = _error(sparse.lse_T.detach(), oracle[0].lse_T.detach())
    if sparse.log_residual_T is not None and oracle[0].log_residual_T is not None:
        got, wanted = sparse.log_residual_T.detach(), oracle[0].log_residual_T.detach()
        same = torch.where(got == wanted, 0.0, got - wanted)  # -inf where every id is listed
        errors["log_residual"] = _error(same, torch.zeros_like(same))
        if "gap" in case:
            assert wanted.max() < -27.0, "the case is meant to reach 1e-12"
    compare("recompute", functional(sparse, everything).sum(), functional(oracle[0], everything).sum())
    loss, aux_M = fused_token_loss(local[0], local[1], queries, both, **options)
    reference_T, reference_aux_TM = both(oracle, everything)
    errors["aux"] = _error(aux_M, reference_aux_TM.detach().sum(0))
    compare("fused", loss, reference_T.sum())
    return errors


def check_differences() -> float:
    """Largest relative error of d_hidden and d_weight of both entry points along random directions."""
    generator = torch.Generator().manual_seed(11)
    hidden_TH = torch.randn(6, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator) * 0.3
    query = Query(torch.randint(VOCAB, (6, 4), generator=generator), 1.5, residual=True)

    def value(result: SparseLogProbs) -> Tensor:
        assert result.log_residual_T is not None
        return result.logp_TK.square().sum(1) + result.lse_T.sin() + result.log_residual_T.exp()

    def recompute(hidden: Tensor, weight: Tensor) -> Tensor:
        return value(sparse_log_probs(hidden, weight, query, vocab_size=VOCAB, softcap=4.0, chunk_tokens=4)).sum()

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_token_loss(
            hidden, weight, [query], lambda results, _: (value(results[0]), results[0].logp_TK[:, :0]),
            vocab_size=VOCAB, softcap=4.0, chunk_tokens=4,
        )[0]  # fmt: skip

    worst = 0.0
    for entry in (recompute, fused):
        inputs = [hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
        grads = torch.autograd.grad(entry(*inputs), inputs)
        for which in (0, 1):
            for _ in range(4):
                step = torch.randn(inputs[which].shape, dtype=torch.float64, generator=generator)
                step *= 1e-5 / step.norm()
                up, down = [x.detach() for x in inputs], [x.detach() for x in inputs]
                up[which], down[which] = up[which] + step, down[which] - step
                slope = (entry(*up) - entry(*down)) / 2
                exact = (grads[which] * step).sum()
                worst = max(worst, float((slope - exact).abs() / max(exact.abs(), step.norm())))
    return worst


def _dense(hidden_TH: Tensor, weight_VH: Tensor, query: Query, softcap: float | None) -> SparseLogProbs:
    logits_TV = hidden_TH @ weight_VH.t()
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logp_TV = (logits_TV / query.temperature).log_softmax(1)
    listed = torch.zeros(len(logits_TV), len(weight_VH) + 1, dtype=torch.bool)
    listed = listed.scatter(1, torch.where(query.ids_TK >= 0, query.ids_TK, len(weight_VH)), True)[:, :-1]
    logp_TK = torch.where(query.ids_TK >= 0, logp_TV.gather(1, query.ids_TK.clamp(min=0)), 0.0)
    residual_T = logp_TV.masked_fill(listed, -torch.inf).logsumexp(1) if query.residual else None
    return SparseLogProbs(logp_TK, (logits_TV / query.temperature).logsumexp(1), residual_T)


def _error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or not (got.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max()))) if got.numel() else 0.0


def run_cases(out: Path) -> None:
    """Worker under torchrun: all cases on this rank."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    _head.BLOCK_BYTES["cpu"] = 128 * HIDDEN * 8  # several blocks a rank, at this small vocabulary too
    errors = {case["name"]: check_case(case, group) for case in CASES}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


def exactness(ranks: int) -> dict[str, float]:
    """Worst error of each case over ranks and quantities."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, __file__, "--cases-to", folder], check=True, env=environment)
        reports = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {name: max(max(report[name].values()) for report in reports) for name in reports[0]}


# ---- memory and time ----------------------------------------------------------------------------------------------


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
    step = _STEPS[arm]
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


_STEPS: dict[str, Callable[..., Tensor]] = {
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
    parser.add_argument("--cases-to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases_to:
        run_cases(args.cases_to)
        return 0
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
