"""What removed blocks save: tokens a second, bytes of weights and of the cache, dense against pruned.

    python benchmarks/prune_speed.py [--order order.json --blocks 8] [--export plain] [--rounds 5] [--tiny]

SmolLM2-135M-Instruct (or `--model`) and the same without the first `--blocks` blocks of `--order`; without an order,
without the layers 5, 14, 17 and 18. transformers runs both in fp32: a prompt of `--prompt` tokens at once, then
`--tokens` more tokens, one by one with the cache. They take turns, so that what else the machine does falls on both;
each figure is the median over `--rounds`, of the processor's time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoModelForCausalLM

from fusemega.fixtures.data import smollm2
from fusemega.prune.apply import apply_order
from fusemega.prune.order import Order, ResidualBlock, Step
from fusemega.runtime.parallel import ParallelConfig, initialize

LAYERS = (5, 14, 17, 18)


def main() -> None:
    """Prunes, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--order", type=Path)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--export", default="plain")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a random model of four layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="fusemega-prune-speed-") as folder:
        work = Path(folder)
        layers: tuple[int, ...] = LAYERS
        if args.tiny:
            chat = tiny.write_chat(work / "chat.jsonl", rows=4, characters=60)
            args.model, layers = str(tiny.write_model(work / "model", chat)), (1,)
        model = args.model or str(smollm2())
        steps = [Step(ResidualBlock(kind, layer)) for layer in layers for kind in ("mha", "mlp")]
        order: Any = args.order or Order(tuple(steps), "mix")
        world = initialize(ParallelConfig())
        record = apply_order(model, order, work / "pruned", world, blocks=args.blocks, export=args.export)
        sides = {"dense": _Side(model), "pruned": _Side(work / "pruned")}
        for number in range(args.rounds):
            for side in list(sides.values())[:: 1 if number % 2 else -1]:
                side.time(args.prompt, args.tokens)
        found = {name: side.figures(args.prompt, args.tokens) for name, side in sides.items()}
    for name, figures in found.items():
        print(name, json.dumps(figures))
    names = ("export", "prompt", "tokens", "threads", "rounds", "tiny")
    result = {
        "benchmark": "prune_speed",
        **{name: getattr(args, name) for name in names},
        "removed": record["removed"],
        **found,
        "ratios": {key: round(found["pruned"][key] / found["dense"][key], 3) for key in found["dense"]},
    }
    print(json.dumps(result))


class _Side:
    """One of the two models, and the seconds that it took."""

    def __init__(self, folder: str | Path) -> None:
        code = (Path(folder) / "modeling_pruned.py").is_file()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=code).eval()
        self.weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.cache = 0

    @torch.no_grad()
    def time(self, prompt: int, tokens: int) -> None:
        """One prompt, and tokens after it."""
        ids = torch.arange(prompt)[None] % self.model.config.vocab_size
        begun = time.process_time()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        self.prefill.append(time.process_time() - begun)
        begun = time.process_time()
        for _ in range(tokens):
            ids = out.logits[:, -1:].argmax(-1)
            out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)
        self.decode.append(time.process_time() - begun)
        self.cache = sum(2 * layer.keys.nbytes for layer in out.past_key_values.layers)

    def figures(self, prompt: int, tokens: int) -> dict[str, float]:
        """Tokens for each second of processor time, and bytes."""
        return {
            "prompt_tokens_per_second": round(prompt / statistics.median(self.prefill), 1),
            "new_tokens_per_second": round(tokens / statistics.median(self.decode), 2),
            "weight_bytes": self.weights,
            "cache_bytes": self.cache,
        }


if __name__ == "__main__":
    main()
