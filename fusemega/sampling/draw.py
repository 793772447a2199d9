"""Draws a batch's next tokens, each response with random numbers of its own.

transformers' own sampling draws from one generator for the whole batch, so a response would depend on its neighbours.
Here `generate` runs without sampling, and this last logits processor leaves it one token to choose: the one at which
the cumulated probabilities exceed the response's uniform number for this step.

Shape suffixes: B responses of a batch, L tokens of the longest prompt, T most tokens of a response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusemega.sampling.engine import SamplingSettings


class Draw(LogitsProcessor):
    """Penalises repetitions, shapes the distribution, draws.

    Args:
        settings: see `SamplingSettings`.
        seeds: one for each response.
        prompt_BL: ids of the prompts, padded on the left.
        mask_BL: 1 at the prompts' own tokens.
    """

    def __init__(
        self, settings: SamplingSettings, seeds: Sequence[int], prompt_BL: torch.Tensor, mask_BL: torch.Tensor
    ) -> None:
        # Padding would count as a repeated token, usually the one that ends a response.
        own = prompt_BL.gather(1, mask_BL.to(torch.int64).argmax(1, keepdim=True))
        self._prompt_BL = torch.where(mask_BL.bool(), prompt_BL, own)
        self._penalty = settings.repetition_penalty != 1 and RepetitionPenaltyLogitsProcessor(
            settings.repetition_penalty
        )
        self._warpers = LogitsProcessorList()
        self._uniform_BT: torch.Tensor | None = None
        if settings.temperature > 0:
            if settings.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k is not None:
                self._warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._warpers.append(TopPLogitsWarper(settings.top_p))
            # Drawn on the host, so that they are the same on every device.
            uniform = [_uniform(seed, settings.max_tokens) for seed in seeds]
            self._uniform_BT = torch.stack(uniform).to(prompt_BL.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] in which only the drawn token is possible; with temperature 0 the penalised scores."""
        length = self._prompt_BL.shape[1]
        ids = torch.cat([self._prompt_BL, input_ids[:, length:]], dim=1)
        if self._penalty:
            scores = self._penalty(ids, scores)
        if self._uniform_BT is None:
            return scores
        shaped = self._warpers(ids, scores)
        cumulated = shaped.double().softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        step = min(input_ids.shape[1] - length, self._uniform_BT.shape[1] - 1)
        # Below the total: otherwise rounding could choose a token of probability 0 at the end of the vocabulary.
        wanted = torch.minimum(self._uniform_BT[:, step, None] * total, total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulated, wanted, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _uniform(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
