"""BlockPruner's search as its paper says it, on transformers: the whole model again for each candidate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Pair = tuple[str, int]
_NAMES = {"mha": "self_attn", "mlp": "mlp"}


class _Nothing(torch.nn.Module):
    """In place of a block: what it adds to the stream is 0."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *args: Any, hidden_states: Any = None, **_: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else hidden_states)
        return (nothing, None) if self.kind == "mha" else nothing


class Plain:
    """A model, and the windows of the joined texts.

    Args:
        folder: of the model.
        texts: JSONL of `{"text": ...}`.
        limit: rows that are read.
        length: tokens of a window.
    """

    def __init__(self, folder: Path, texts: Path, limit: int, length: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()[:limit]]
        ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(rows)).input_ids
        self.windows = [torch.tensor(ids[at : at + length])[None] for at in range(0, len(ids) - length + 1, length)]
        layers = range(len(self.model.model.layers))
        self.blocks: list[Pair] = [("mha", layer) for layer in layers] + [("mlp", layer) for layer in layers]

    @contextmanager
    def masked(self, blocks: Iterable[Pair]) -> Iterator[Any]:
        """The model, without these blocks."""
        saved = []
        for kind, number in blocks:
            layer = self.model.model.layers[number]
            saved.append((layer, _NAMES[kind], getattr(layer, _NAMES[kind])))
            setattr(layer, _NAMES[kind], _Nothing(kind))
        yield self.model
        for layer, name, module in saved:
            setattr(layer, name, module)

    @torch.no_grad()
    def logits(self, blocks: Iterable[Pair]) -> torch.Tensor:
        """[all predicted tokens, V], in order."""
        with self.masked(blocks) as model:
            return torch.cat([model(window, use_cache=False).logits[0, :-1] for window in self.windows])

    def perplexity(self, blocks: Iterable[Pair]) -> float:
        """exp of the mean over windows of the mean cross-entropy."""
        labels = torch.cat([window[0, 1:] for window in self.windows])
        losses = torch.nn.functional.cross_entropy(self.logits(blocks), labels, reduction="none")
        return math.exp(losses.view(len(self.windows), -1).mean(1).mean())

    def search(self, count: int) -> tuple[list[Pair], list[dict[Pair, float]]]:
        """The removed blocks in order, and each round's perplexity of every candidate."""
        removed: list[Pair] = []
        rounds = []
        for _ in range(count):
            found = {block: self.perplexity([*removed, block]) for block in self.blocks if block not in removed}
            removed.append(min(found, key=found.__getitem__))
            rounds.append(found)
        return removed, rounds
