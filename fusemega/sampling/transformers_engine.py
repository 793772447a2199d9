"""Engine `transformers`: batched `generate` in this process, on one device.

A response depends on the weights, its prompt, the settings and its seed. Rounding is the one thing that the batch
decides: matrix products of other shapes round differently, and a draw that falls on the border between two tokens then
turns out differently. With the same batch size, prompts and n the batches are the same, and so are the bits on the same
machine, also after an interruption.

Shape suffixes: B responses of a batch, L tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.hf.loadable import stop_ids
from fusemega.hf.proof import check_written
from fusemega.runtime.console import phase, say
from fusemega.runtime.device import hide_gpus_if_unwanted, own_device
from fusemega.sampling.batches import plan_batches
from fusemega.sampling.draw import Draw
from fusemega.sampling.engine import LENGTH, REFUSED, STOP, Response, SampleRequest, SamplingSettings, request_seed
from fusemega.sampling.engines import TransformersSettings
from fusemega.sampling.rendered import PromptIds

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TransformersEngine:
    """See the module, and `Engine`.

    Raises:
        UserError: no such folder, or a damaged one; no chat template.
    """

    def __init__(self, settings: TransformersSettings) -> None:
        self._settings = settings
        path = resolve(settings.load)
        if not (path / "config.json").is_file() and (path / "hf" / "config.json").is_file():
            raise UserError(f"engine.load: {settings.load} is a run of fusemega; give {path / 'hf'}")
        self._folder = HFFolder(path)
        self._prompts = PromptIds(
            path,
            settings.chat_template,
            settings.trust_remote_code,
            settings.template_variables,
            settings.opens_with or "",
        )
        self._batch_size = settings.batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `Engine`. Reads all weights once."""
        return {
            "name": "transformers",
            "weights": self._folder.content_hash(),
            "dtype": self._settings.dtype,
            **self._prompts.identity,
        }

    def prepare(self) -> None:
        """See `Engine`."""
        _ = self._model

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        skip: Collection[tuple[str, int]] = frozenset(),
    ) -> Iterator[Response]:
        """See `Engine`."""
        ids = {}
        for request in requests:
            if request.key not in ids:
                ids[request.key] = self._prompts.ids(request.messages, request.key)
        limit = self._longest
        fits = {key: limit is None or len(found) + settings.max_tokens <= limit for key, found in ids.items()}
        refused = [request for request in requests if not fits[request.key]]
        if refused and len(refused) == len(requests):
            raise UserError(
                f"{self._settings.load}: no prompt can be answered: {_too_long(ids, refused[0], settings, limit)}"
            )
        for request in refused:
            if (request.key, request.sample) not in skip:
                reason = _too_long(ids, request, settings, limit)
                yield Response(request.key, request.sample, "", REFUSED, len(ids[request.key]), 0, reason)
        possible = [request for request in requests if fits[request.key]]
        lengths = {key: len(found) for key, found in ids.items()}
        for batch in plan_batches(possible, lengths, self._settings.batch_size):
            missing = [r for r in batch if (r.key, r.sample) not in skip]
            if missing:
                made = {(r.key, r.sample): r for r in self._parts(batch, ids, settings)}
                yield from (made[r.key, r.sample] for r in missing)

    def _parts(
        self, batch: list[SampleRequest], ids: dict[str, list[int]], settings: SamplingSettings
    ) -> Iterator[Response]:
        """The responses of a batch, which is cut into parts where the device's memory demands it."""
        start = 0
        while start < len(batch):
            part = batch[start : start + self._batch_size]
            try:
                yield from self._together(part, [ids[request.key] for request in part], settings)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(part, ids, settings)
            else:
                start += len(part)

    def _halve(self, part: list[SampleRequest], ids: dict[str, list[int]], settings: SamplingSettings) -> None:
        if len(part) == 1:
            tokens = len(ids[part[0].key])
            raise UserError(
                f"{self._settings.load}: the memory of {self._device} does not suffice for one prompt of {tokens} "
                f"tokens and a response of {settings.max_tokens}; lower sampling.max_tokens, or use a server"
            )
        self._batch_size = len(part) // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"out of memory with {len(part)} responses at once; going on with {self._batch_size}")

    def _together(
        self, part: Sequence[SampleRequest], prompts: Sequence[list[int]], settings: SamplingSettings
    ) -> list[Response]:
        from transformers import GenerationConfig, LogitsProcessorList

        longest = max(map(len, prompts))
        ids_BL = torch.full((len(part), longest), self._pad_id, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        ids_BL, mask_BL = ids_BL.to(self._device), mask_BL.to(self._device)
        seeds = [request_seed(settings.seed, request.key, request.sample) for request in part]
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                logits_processor=LogitsProcessorList([Draw(settings, seeds, ids_BL, mask_BL)]),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=settings.max_tokens,
                    eos_token_id=sorted(self._stops),
                    pad_token_id=self._pad_id,
                ),
            )
        return [
            self._response(request, len(prompt), row[longest:])
            for request, prompt, row in zip(part, prompts, found.tolist(), strict=True)
        ]

    def _response(self, request: SampleRequest, prompt_tokens: int, ids: list[int]) -> Response:
        end = next((place for place, token in enumerate(ids) if token in self._stops), None)
        text = self._prompts.tokenizer.hf.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        reason = LENGTH if end is None else STOP
        return Response(request.key, request.sample, text, reason, prompt_tokens, len(ids) if end is None else end + 1)

    @cached_property
    def _device(self) -> torch.device:
        hide_gpus_if_unwanted()
        return own_device(0)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        check_written(self._folder)
        with phase(f"{self._settings.load} is loaded"):
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    str(self._folder.path),
                    dtype=_DTYPES[self._settings.dtype],
                    trust_remote_code=self._settings.trust_remote_code,
                    use_safetensors=True,
                    local_files_only=True,
                )
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"{self._settings.load}: transformers cannot load it: {reason}") from None
            model = model.to(self._device).eval()
        # The folder's own sampling settings would fill in what is not given to `generate`.
        model.generation_config = GenerationConfig(eos_token_id=sorted(self._stops), pad_token_id=self._pad_id)
        return model

    @cached_property
    def _stops(self) -> set[int]:
        """Ids that end a response: of the folder's generation settings, its configuration and its tokenizer."""
        ends = [*stop_ids(self._folder.path), self._prompts.tokenizer.eos_id, self._prompts.closing_id]
        found = {end for end in ends if end is not None}
        if not found:
            raise UserError(f"{self._settings.load}: names no token that ends a response (eos_token_id)")
        return found

    @property
    def _pad_id(self) -> int:
        return self._prompts.tokenizer.pad_id

    @cached_property
    def _longest(self) -> int | None:
        """Positions of a prompt with its response, where the configuration says how many there are."""
        text = self._model.config.get_text_config(decoder=True)
        return getattr(text, "max_position_embeddings", None)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _too_long(ids: dict[str, list[int]], request: SampleRequest, settings: SamplingSettings, limit: int | None) -> str:
    return (
        f"a prompt of {len(ids[request.key])} tokens and sampling.max_tokens {settings.max_tokens} are more than the "
        f"{limit} positions of the model"
    )
