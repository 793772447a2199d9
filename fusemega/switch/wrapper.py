"""A switcher around a transformers model: one prefill decides the mode, and the answer goes on from its KV cache.

Shape suffixes: L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusemega.errors import UserError
from fusemega.switch.modes import Modes
from fusemega.switch.prefill import pooled
from fusemega.switch.switcher import Switcher


@dataclass(frozen=True)
class SwitchedAnswer:
    """An answer.

    Attributes:
        text: of it, without special tokens.
        ids: its token ids.
        mode: that was chosen.
        scores: expected pass rates of the short and the long mode; None where the mode was given.
        prompt_tokens, reused_tokens: of the prompt in that mode; of these, taken from the prefill's cache.
    """

    text: str
    ids: list[int]
    mode: str
    scores: tuple[float, float] | None
    prompt_tokens: int
    reused_tokens: int


class SwitchedModel:
    """A model that chooses its mode for each conversation.

    Args:
        model: a transformers model with `generate`, such as AutoModelForCausalLM gives.
        switcher: folder of the trained switcher, or one that is loaded.
        tokenizer: folder or hub id with the model's tokenizer and chat template.

    Example:
        >>> switched = SwitchedModel(model, "runs/switch/switcher", "./Qwen3-1.7B")        # doctest: +SKIP
        >>> switched.generate([{"role": "user", "content": "2+2?"}], max_new_tokens=200)   # doctest: +SKIP

    Raises:
        UserError: the switcher was trained for another tokenizer, template or size. Weights are not compared.
    """

    def __init__(self, model: Any, switcher: Switcher | str, tokenizer: str) -> None:
        self._model = model
        self._switcher = Switcher.load(switcher) if isinstance(switcher, str) else switcher
        self._modes = Modes(self._switcher.config.modes, tokenizer)
        self._switcher.check_modes(self._modes, tokenizer)
        size = model.config.get_text_config(decoder=True).hidden_size
        if size != self._switcher.config.size:
            raise UserError(
                f"{self._switcher.path}: reads {self._switcher.config.size} numbers, and the model has {size} hidden "
                "ones"
            )

    @torch.inference_mode()
    def generate(
        self,
        messages: Sequence[Mapping[str, Any]],
        threshold: float | None = None,
        mode: str | None = None,
        **settings: Any,
    ) -> SwitchedAnswer:
        """An answer to a conversation.

        Args:
            messages: objects with role and content, which end with the user's turn.
            threshold: in place of the switcher's.
            mode: `short` or `long`: the switcher is not asked.
            settings: of the model's `generate`, such as max_new_tokens.

        Raises:
            UserError: the template refuses the conversation.
        """
        cache, reused, scores = None, 0, None
        if mode is None:
            prefill = self._modes.prefill(messages, "given")
            inner = getattr(self._model, self._model.base_model_prefix)
            outputs = inner(
                input_ids=self._tensor(prefill),
                use_cache=True,
                output_hidden_states=self._switcher.config.layer != "final",
            )
            config = self._switcher.config
            found = self._switcher.scores(pooled(outputs, [len(prefill)], config.layer, config.pooling).cpu())[0]
            scores, mode = (float(found[0]), float(found[1])), self._switcher.mode(found, threshold)
            ids = self._modes.ids(messages, mode, "given")
            if ids[: len(prefill)] == prefill:
                cache, reused = outputs.past_key_values, len(prefill)
                if len(ids) == reused:  # one token must be left to go on from
                    reused -= 1
                    cache.crop(-1)
        ids = self._modes.ids(messages, mode, "given")
        asked = self._tensor(ids)
        given = {} if cache is None else {"past_key_values": cache}
        whole = self._model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **given, **settings)
        new = whole[0, len(ids) :].tolist()
        text = self._modes.tokenizer.hf.decode(new, skip_special_tokens=True)
        return SwitchedAnswer(text, new, mode, scores, len(ids), reused)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._model.device)
