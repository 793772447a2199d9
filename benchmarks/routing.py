"""Which experts a model's tokens go to, written down in one run and looked up in another.

The choice of a token's experts is discrete. Where two of a router's logits are equal to rounding, another layout may
choose another expert; that token's gradient then differs by its whole size, though nothing is wrong. So a comparison of
layouts counts the choices that differ, tells how near the logits were, and can take the choices of the run that it
compares with.

Shape suffixes: S tokens of a row, T tokens that this rank's router sees, E experts, K experts of a token.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from fusemega.models.build import GPT
from fusemega.runtime.experts import Router
from fusemega.runtime.parallel import World

Choices = dict[tuple[int, int, int, int], tuple[int, ...]]
"""(Step, layer, hash of the text, place in the text) -> experts."""


class Routing:
    """The choices of all routers on this rank, of a model that trains.

    Attributes:
        step: to be counted by whoever runs the steps.
        choices: what each token chose by itself.
        differing: of the choices that are not `wanted`, the distance between the logits of the experts that were not
            shared, relative to the largest logit.
        first: the first step with such a choice.
    """

    def __init__(self, model: GPT, world: World, wanted: Choices | None, follow: bool) -> None:
        """Listens to `model`.

        Args:
            wanted: the choices to compare with; None: none.
            follow: route each token to the wanted experts.
        """
        self.step, self.choices, self.differing, self.first = 0, Choices(), list[float](), -1
        self._wanted, self._follow = wanted, follow
        self._tp = (world.tp_rank, world.tp_size)
        self._tokens: list[tuple[int, int]] = []
        for chunk in model.chunks:
            chunk.register_forward_pre_hook(self._row, with_kwargs=True)
            for layer in chunk.decoder.layers:
                if isinstance(router := getattr(layer.mlp, "router", None), Router):
                    router.router_replay = _Replay(self, int(layer.layer_number))

    def _row(self, chunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Names the tokens that the routers are about to see."""
        row: PackedSeqParams = kwargs["packed_seq_params"]
        tokens_S, bounds = args[0][0].tolist(), row.cu_seqlens_q.tolist()
        named: list[tuple[int, int]] = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            text = zlib.crc32(np.asarray(tokens_S[start:stop]).tobytes())
            named += [(text, place) for place in range(stop - start)]
        rank, size = self._tp  # of sequence parallelism
        part = len(named) // size
        self._tokens = named[rank * part : (rank + 1) * part]

    def chosen(self, layer: int, logits_TE: torch.Tensor, own_TK: torch.Tensor) -> torch.Tensor:
        """The experts of each token [T, K]."""
        out = []
        for (text, place), own, logits in zip(self._tokens, own_TK.tolist(), logits_TE.detach(), strict=True):
            key = (self.step, layer, text, place)
            self.choices[key] = tuple(sorted(own))
            wanted = None if self._wanted is None else self._wanted.get(key)
            if wanted is not None and wanted != self.choices[key]:
                apart = logits[sorted(set(own) - set(wanted))] - logits[sorted(set(wanted) - set(own))]
                self.differing.append(float(apart.abs().max() / logits.abs().max()))
                self.first = self.step if self.first < 0 else self.first
            out.append(own if wanted is None or not self._follow or set(wanted) == set(own) else list(wanted))
        return torch.tensor(out, device=logits_TE.device)


class _Replay:
    """What megatron-core's router asks for the experts of each token (`router_replay`)."""

    def __init__(self, routing: Routing, layer: int) -> None:
        self._routing, self._layer = routing, layer

    def get_replay_topk(
        self, scores_TE: torch.Tensor, topk: int, groups: Any, group_topk: Any, default: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Scores of the chosen experts, the experts): both [T, K]."""
        _, own_TK = default(scores_TE, topk, num_groups=groups, group_topk=group_topk)
        chosen_TK = self._routing.chosen(self._layer, scores_TE, own_TK)
        return scores_TE.gather(1, chosen_TK), chosen_TK


def save(choices: Choices, path: Path) -> None:
    """Writes the choices of one process."""
    np.savez(path, keys=np.array(list(choices), dtype=np.int64), chosen=np.array(list(choices.values())))


def load(path: Path) -> Choices:
    """What `save` has written."""
    with np.load(path) as file:
        keys, chosen = file["keys"].tolist(), file["chosen"].tolist()
    return {(a, b, c, d): tuple(one) for (a, b, c, d), one in zip(keys, chosen, strict=True)}
