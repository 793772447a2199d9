"""Each measure is its formula, computed plainly on transformers' hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fusemega.prune.measures.random_order import random_order
from fusemega.prune.order import ResidualBlock
from fusemega.prune.run_file import PruneRun
from fusemega.prune.search import search
from tests.prune.plain import Plain

Make = Callable[..., PruneRun]


@pytest.fixture(scope="module")
def plain(work: Path) -> Plain:
    return Plain(work / "model", work / "texts.jsonl", limit=8, length=40)


@pytest.fixture(scope="module")
def streams(plain: Plain) -> dict[tuple[str, int], torch.Tensor]:
    """(kind, layer) -> [windows, tokens, H], what the block reads; ("end", L): what the last one gives."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    body = plain.model.model
    hooks = []
    for number, layer in enumerate(body.layers):
        for key, module in (
            (("mha", number), layer.input_layernorm),
            (("mlp", number), layer.post_attention_layernorm),
        ):
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, key=key: seen.setdefault(key, []).append(args[0][0]))
            )
    end = ("end", len(body.layers))
    hooks.append(body.norm.register_forward_pre_hook(lambda _, args: seen.setdefault(end, []).append(args[0][0])))
    plain.logits([])
    for hook in hooks:
        hook.remove()
    return {key: torch.stack(parts) for key, parts in seen.items()}


def _scores(streams: Any, by_layer: bool, measure: Callable[[torch.Tensor, torch.Tensor], float]) -> dict[Any, float]:
    keys = [key for layer in range(4) for key in (("mha", layer), ("mlp", layer))] + [("end", 4)]
    step = 2 if by_layer else 1
    pairs = zip(keys[:-1:step], keys[step::step], strict=True)
    # The last token of a window predicts nothing.
    return {begin: measure(streams[begin][:, :-1], streams[end][:, :-1]) for begin, end in pairs}


def influence(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((1 - cosine_similarity(before.double(), after.double(), dim=-1)).mean())


def magnitude(before: torch.Tensor, after: torch.Tensor) -> float:
    return float(((after - before).double().norm(dim=-1) / after.double().norm(dim=-1)).mean())


@pytest.mark.parametrize(("name", "formula"), [("block_influence", influence), ("relative_magnitude", magnitude)])
def test_measures_of_the_stream(make_run: Make, plain: Plain, streams: Any, name: str, formula: Any) -> None:
    blocks = _scores(streams, False, formula)
    wanted = sorted(blocks, key=blocks.__getitem__)[:3]
    result, _ = search(make_run(measure=name, granularity="block"))
    assert result.order == [f"{kind} {layer}" for kind, layer in wanted]
    removed = [plain.perplexity(wanted[:n]) for n in (1, 2, 3)]
    assert result.perplexities == pytest.approx(removed, rel=1e-4)
    layers = _scores(streams, True, formula)
    order = [layer for _, layer in sorted(layers, key=layers.__getitem__)[:2]]
    whole, _ = search(make_run(measure=name, blocks=4))
    assert whole.order == [f"{kind} {layer}" for layer in order for kind in ("mha", "mlp")]


def test_contiguous_layers_by_angle(make_run: Make, streams: Any) -> None:
    ends = [streams[("mha", layer)] for layer in range(4)] + [streams[("end", 4)]]

    def angle(start: int) -> float:
        cosine = cosine_similarity(ends[start][:, -1].double(), ends[start + 2][:, -1].double(), dim=-1)
        return float(cosine.arccos().mean()) / math.pi

    first = min(range(3), key=angle)
    result, _ = search(make_run(measure="angular_distance", blocks=4))
    assert result.order == [f"{kind} {layer}" for layer in (first + 1, first) for kind in ("mha", "mlp")]


def test_js_divergence(make_run: Make, plain: Plain) -> None:
    dense = plain.logits([]).double().log_softmax(-1)

    def divergence(blocks: Any) -> float:
        other = plain.logits(blocks).double().log_softmax(-1)
        mixed = torch.logaddexp(dense, other) - math.log(2)
        return float(sum((each.exp() * (each - mixed)).sum() for each in (dense, other)) / 2)

    removed: list[Any] = []
    for _ in range(2):
        left = [block for block in plain.blocks if block not in removed]
        removed.append(min(left, key=lambda block: divergence([*removed, block])))
    result, _ = search(make_run(measure="js_divergence", blocks=2))
    assert result.order == [f"{kind} {layer}" for kind, layer in removed]
    assert result.perplexities[1] == pytest.approx(plain.perplexity(removed), rel=1e-4)


def test_random_blocks(make_run: Make) -> None:
    blocks = [ResidualBlock(kind, layer) for kind in ("mha", "mlp") for layer in range(4)]  # type: ignore[arg-type]
    assert random_order(blocks, 3) == random_order(blocks[::-1], 3) != random_order(blocks, 4)
    result, _ = search(make_run(measure="random", seed=3))
    assert result.order == [str(block) for block in random_order(blocks, 3)[:3]]
