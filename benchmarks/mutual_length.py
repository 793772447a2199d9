"""Mutual-Taught where the right behaviour is known: a reward model that likes length, and a policy that exploits it.

    python benchmarks/mutual_length.py [--seeds 5] [--iterations 3]

A response has a worth (0 to 4) and a length (1 to 8). The policy is a softmax over the 40 kinds; at first all are
equally probable. The reward model is linear in both, r = a worth + b length, and begins with a = 0.5 and b = 0.5; it
sees each response with some noise. The worth alone is what is wanted.

Everything is done by the recipe's own rules: pairs (`length_controlled_pair`), win rates and choice (`win_rate`,
`choose`), pseudo-pairs (`pseudo_pairs`), mixing (`mixed_counts`). DPO and Bradley-Terry are gradient steps in float64.
Arms: `best and worst` trains the policy on the highest against the lowest reward; `length-controlled` on the paper's
pairs; `mutual` has the M step besides. Measured under the last policy: mean worth, mean length, and b / a of the reward
model (lowest, mean and highest over the seeds). A policy whose learning rate is 0 cannot improve. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from fusemega.mutual.mixing import mixed_counts, sampled_down
from fusemega.mutual.pseudo_pairs import pseudo_pairs
from fusemega.mutual.win_rate import choose, win_rate
from fusemega.selection.protocol import Candidate, best, worst
from fusemega.selection.protocols.mutual_taught import length_controlled_pair

WORTHS, LENGTHS = 5, 8
KINDS = np.array([(worth, length) for worth in range(WORTHS) for length in range(1, LENGTHS + 1)], dtype=np.float64)
NOISE = 0.5  # of a reward
BETA, RATE, STEPS, EVERY = 0.1, 0.5, 60, 20  # of DPO
BASE = np.array([0.5, 0.5])  # the reward model's weights of worth and length


@dataclass
class World:
    """Policies and reward models of one arm.

    Attributes:
        rng: draws everything.
        controlled: length-controlled pairs; otherwise the best and the worst.
        teaches: whether the M step is done.
        rate: learning rate of the policy.
    """

    rng: np.random.Generator
    controlled: bool = True
    teaches: bool = True
    rate: float = RATE
    prompts: int = 500
    tau: float = 0.5

    def run(self, iterations: int) -> dict[str, Any]:
        """Iterations until the choice stops them. Returns means under the last policy, and the reward model."""
        logits, weights = np.zeros(len(KINDS)), BASE
        ranked: dict[str, np.ndarray] = {}
        stopped = None
        for t in range(1, iterations + 1):
            pairs = self._pairs(logits, weights)
            ranked |= {f"{t} {i}": KINDS[pair[0]] - KINDS[pair[1]] for i, pair in enumerate(pairs)}
            found = self._checkpoints(logits, pairs)
            choice = choose({step: self._win_rate(each, logits, weights) for step, each in found.items()}, self.tau)
            if not choice.is_kept:
                stopped = choice.why_stopped(t)
                break
            before, logits = logits, found[choice.checkpoint]
            if self.teaches:
                weights = self._taught(logits, before, weights, ranked)
        shares = _softmax(logits)
        worth, length = shares @ KINDS
        return {"worth": worth, "length": length, "bias": weights[1] / weights[0], "stopped": stopped}

    def _drawn(self, logits: np.ndarray, count: int) -> np.ndarray:
        return self.rng.choice(len(KINDS), size=count, p=_softmax(logits))

    def _rewards(self, kinds: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return KINDS[kinds] @ weights + self.rng.normal(0, NOISE, len(kinds))

    def _pairs(self, logits: np.ndarray, weights: np.ndarray) -> list[tuple[int, int]]:
        found = []
        for _ in range(self.prompts):
            kinds = self._drawn(logits, 5)
            rewards = self._rewards(kinds, weights)
            said = [
                Candidate(int(kind), "policy", float(reward), None, int(KINDS[kind][1]))
                for kind, reward in zip(kinds, rewards, strict=True)
            ]
            pair = length_controlled_pair(said) if self.controlled else (best(said), worst(said))
            if pair is not None:
                found.append((pair[0].text, pair[1].text))
        return found

    def _checkpoints(self, start: np.ndarray, pairs: list[tuple[int, int]]) -> dict[int, np.ndarray]:
        """DPO from `start`, which is the reference: the normalisation cancels in a pair's difference."""
        chosen, rejected = np.array(pairs).T
        logits, found = start.copy(), {}
        for step in range(1, STEPS + 1):
            margin = BETA * ((logits - start)[chosen] - (logits - start)[rejected])
            pull = BETA / (1 + np.exp(margin)) / len(pairs)
            gradient = np.zeros_like(logits)
            np.add.at(gradient, chosen, pull)
            np.add.at(gradient, rejected, -pull)
            logits = logits + self.rate / BETA * gradient
            if step % EVERY == 0:
                found[step] = logits
        return found

    def _win_rate(self, new: np.ndarray, old: np.ndarray, weights: np.ndarray) -> float:
        won, lost = (self._rewards(self._drawn(each, self.prompts), weights).tolist() for each in (new, old))
        return win_rate(won, lost).rate

    def _taught(
        self, new: np.ndarray, old: np.ndarray, weights: np.ndarray, ranked: dict[str, np.ndarray]
    ) -> np.ndarray:
        """The M step: from the base, on believed pseudo-pairs mixed 1:1 with ranked ones."""
        kinds = [self._drawn(each, self.prompts) for each in (new, old)]
        rewards = [
            dict(zip(map(str, range(self.prompts)), self._rewards(k, weights).tolist(), strict=True)) for k in kinds
        ]
        kept = pseudo_pairs(*rewards).kept
        counts = mixed_counts(len(kept), len(ranked), 1.0)
        rows = [KINDS[kinds[0][int(key)]] - KINDS[kinds[1][int(key)]] for key in sampled_down(kept, counts[0], 0)]
        rows += [ranked[key] for key in sampled_down(ranked, counts[1], 0)]
        differences, trained = np.array(rows), BASE.copy()
        for _ in range(100):
            pull = 1 / (1 + np.exp(differences @ trained))
            trained = trained + 0.05 * (pull @ differences) / len(differences)
        return trained


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


ARMS: dict[str, dict[str, Any]] = {
    "best and worst": {"controlled": False, "teaches": False},
    "length-controlled": {"teaches": False},
    "mutual": {},
}


def measured(seed: int, iterations: int, **settings: Any) -> dict[str, Any]:
    """One arm with one seed."""
    return World(np.random.default_rng(seed), **settings).run(iterations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    args = parser.parse_args()
    found = {}
    for arm, settings in ARMS.items():
        runs = [measured(seed, args.iterations, **settings) for seed in range(args.seeds)]
        found[arm] = {name: [min(r[name] for r in runs), fmean(r[name] for r in runs), max(r[name] for r in runs)]
                      for name in ("worth", "length", "bias")}  # fmt: skip
        print(arm, json.dumps(found[arm]), flush=True)
    stuck = [measured(seed, args.iterations, rate=0.0, tau=0.6)["stopped"] for seed in range(args.seeds)]
    print("cannot improve:", stuck[0])
    print(json.dumps({"benchmark": "mutual_length", **vars(args), "measures": found, "stopped": stuck}))


if __name__ == "__main__":
    main()
