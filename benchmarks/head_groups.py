"""What groups of ids cost in the vocabulary head: a distillation step with them against the same step without.

    python benchmarks/head_groups.py [--vocab 49152 --hidden 576 --tokens 1024 --rounds 7]

Both steps have the label's term and a teacher's row of 10 entries with its residual. With groups, each id that is in
a group is replaced by the group (its second occurrence in a row by padding), and a third term has the label's group.
3,904 groups of 14,662 ids, the largest of 141, are the cells of Qwen2.5's tokenizer on SmolLM2's; 5,835 of 34,486, the
largest of 262, Mistral v3's; 4,839 of 35,738, the largest of 428, those that both, Gemma 3 and Llama 3 have together.
The sizes fall by a stretched exponential that gives these sums, and larger sums of squares than the real ones. Ids are
drawn uniformly, so that large groups are listed more often than small ones.

Time: forward and backward in turn in one process, `--rounds` rounds; the ratio is the median of the rounds' ratios, of
the time that passed and of processor time, which other load disturbs less.
Memory: each step once in a process of its own; the peak resident set less the level once inputs exist, less the two
returned gradients. Targets: time <= 1.1 of the step without groups; memory at most 10 % more.

Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from head import TEACHER_IDS, _head_inputs, _resident_bytes
from torch import Tensor

from fusemega.logits.vocab import Groups, Query, SparseLogProbs, fused_token_loss

TIME_TARGET = MEMORY_TARGET = 1.1
# name -> number of groups, ids in them, members of the largest
KINDS: dict[str, tuple[int, int, int]] = {
    "qwen2.5": (3904, 14662, 141),
    "mistral_v3": (5835, 34486, 262),
    "four teachers": (4839, 35738, 428),
}
ARMS = ("none", *KINDS)


def group_sizes(num_groups: int, num_ids: int, largest: int) -> list[int]:
    """`num_groups` falling sizes of 2 to `largest`, whose sum is `num_ids`."""
    low, high = 0.1, float(num_groups)
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (low, scale) if sum(_falling(num_groups, largest, scale)) > num_ids else (scale, high)
    sizes = _falling(num_groups, largest, low)
    for j in range(num_ids - sum(sizes)):  # what rounding left
        sizes[1 + j % (num_groups - 1)] += 1
    return sizes


def _falling(num_groups: int, largest: int, scale: float) -> list[int]:
    return [max(2, round(largest * math.exp(-math.sqrt(j / scale)))) for j in range(num_groups)]


def make_step(arm: str, vocab: int, hidden: int, tokens: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Hidden states and weight, and the step's loss."""
    torch.manual_seed(0)
    hidden_TH, weight_VH = (tensor.requires_grad_() for tensor in _head_inputs(tokens, vocab, hidden, torch.float32))
    labels_T = torch.randint(vocab, (tokens,))
    ids_TK = torch.randint(vocab, (tokens, TEACHER_IDS))
    p_TK = 0.9 * torch.rand(tokens, TEACHER_IDS).softmax(1)
    queries = [Query(labels_T[:, None]), Query(ids_TK, residual=True)]
    if arm in KINDS:
        num_groups, num_ids, _ = KINDS[arm]
        members_E = torch.randperm(vocab)[:num_ids]
        group_E = torch.arange(num_groups).repeat_interleave(torch.tensor(group_sizes(*KINDS[arm])))
        groups = Groups(members_E, group_E, num_groups)
        entry_V = torch.arange(vocab).scatter(0, members_E, vocab + group_E)
        sorted_TK, order = entry_V[ids_TK].sort(dim=1)
        again_TK = torch.zeros_like(sorted_TK, dtype=torch.bool)
        again_TK[:, 1:] = sorted_TK[:, 1:] == sorted_TK[:, :-1]
        entries_TK = torch.empty_like(ids_TK).scatter(1, order, torch.where(again_TK, -1, sorted_TK))
        label_T = entry_V[labels_T]
        cell_T1 = torch.where(label_T >= vocab, label_T, -1)[:, None]
        queries = [queries[0], Query(entries_TK, residual=True, groups=groups), Query(cell_T1, groups=groups)]

    def f(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
        label, taught, *cell = results
        assert taught.log_residual_T is not None
        loss_C = -0.5 * label.logp_TK[:, 0] - 0.5 * (p_TK[rows] * taught.logp_TK).sum(1) - 0.05 * taught.log_residual_T
        for result in cell:
            loss_C = loss_C - 0.5 * (label.logp_TK - result.logp_TK).sum(1)
        return loss_C, label.logp_TK

    return [hidden_TH, weight_VH], lambda: fused_token_loss(hidden_TH, weight_VH, queries, f, vocab_size=vocab)[0]


def timed(step: tuple[list[Tensor], Callable[[], Tensor]]) -> tuple[float, float]:
    """Seconds that passed, and of processor time."""
    leaves, loss = step
    begun = time.perf_counter(), time.process_time()
    torch.autograd.grad(loss(), leaves)
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def memory(arm: str, args: argparse.Namespace) -> float:
    """MiB in addition to inputs and gradients, of one step in this process."""
    timed(make_step(arm, 40_000, 8, 2))  # warm up
    leaves, loss = make_step(arm, args.vocab, args.hidden, args.tokens)
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes()
    gradients = torch.autograd.grad(loss(), leaves)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before - sum(gradient.nbytes for gradient in gradients)) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.arm:
        print(json.dumps({"extra_mib": memory(args.arm, args)}))
        return 0
    extra = {}
    for arm in ARMS:
        options = [f"--{key}={getattr(args, key)}" for key in ("vocab", "hidden", "tokens", "threads")]
        child = subprocess.run([sys.executable, __file__, "--arm", arm, *options], check=True, capture_output=True)
        extra[arm] = json.loads(child.stdout)["extra_mib"]
    steps = {arm: make_step(arm, args.vocab, args.hidden, args.tokens) for arm in ARMS}
    for step in steps.values():
        timed(step)
    rounds = [{arm: timed(step) for arm, step in steps.items()} for _ in range(args.rounds)]
    report: dict[str, Any] = {"shape": {key: getattr(args, key) for key in ("vocab", "hidden", "tokens", "threads")}}
    ok = {}
    for arm in ARMS:
        passed, cpu = ([times[arm][clock] / times["none"][clock] for times in rounds] for clock in (0, 1))
        report[arm] = {
            "seconds": round(median(times[arm][0] for times in rounds), 4),
            "time_ratio": round(median(passed), 3),
            "time_ratio_range": [round(min(passed), 3), round(max(passed), 3)],
            "cpu_ratio": round(median(cpu), 3),
            "cpu_ratio_range": [round(min(cpu), 3), round(max(cpu), 3)],
            "extra_mib": round(extra[arm], 1),
            "memory_ratio": round(extra[arm] / extra["none"], 3),
        }
        ok[f"{arm} time"] = report[arm]["time_ratio"] <= TIME_TARGET
        ok[f"{arm} memory"] = report[arm]["memory_ratio"] <= MEMORY_TARGET
    print(json.dumps({**report, "ok": ok}))
    return 0 if all(ok.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
