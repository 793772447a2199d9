"""Where the proxy gets a prompt's features: a small prefill of its own, or a server that returns hidden states.

Shape suffixes: B prompts of a batch, L tokens of the longest, H hidden size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field

from fusemega.config import Section, choose_section
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.runtime.console import phase, say
from fusemega.runtime.device import hide_gpus_if_unwanted, own_device
from fusemega.sampling.engines import HTTPAddress
from fusemega.switch.switcher import SwitcherConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PROBE = 64  # tokens of the prompt by which the cost is told


class PrefillSettings(Section):
    """What all sources of features have: a name."""

    name: str


class OwnPrefill(PrefillSettings):
    """The model in this process, with transformers, on the GPU if there is one: a forward pass for each prompt."""

    name: Literal["transformers"] = "transformers"
    load: str = Field(description="Hugging Face folder or hub id of the model that the switcher was trained for")
    dtype: Literal["bf16", "fp32"] | None = Field(
        None, description="dtype of weights and activations; default: that of the features"
    )
    batch_size: int = Field(16, ge=1, le=1024, description="prompts that wait are read together, at most so many")
    check_weights: bool = Field(
        True, description="compare the weights' hash with the switcher's, which reads them once"
    )


class ServerPrefill(PrefillSettings):
    """A server that returns the last hidden state of token ids, as vLLM's pooling runner does."""

    name: Literal["server"] = "server"
    base_url: HTTPAddress = Field(description="the server's address, such as http://localhost:8001")
    path: str = Field("/pooling", description="where it takes `model` and `input`, and returns `data`")
    model: str = Field(description="the model's name on it")
    timeout: float = Field(5.0, gt=0, description="seconds that a request may take")


PREFILLS: dict[str, type[PrefillSettings]] = {"transformers": OwnPrefill, "server": ServerPrefill}


def parse_prefill(section: Mapping[str, Any]) -> PrefillSettings:
    """The settings of the source that `section["name"]` picks. Raises UserError as `choose_section`."""
    return choose_section(PREFILLS, section, "prefill.")


class Prefill(Protocol):
    """Gives features of token ids."""

    async def features(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [H]. Raises anything: the caller goes on without."""
        ...

    async def close(self) -> None:
        """Ends what it has begun."""
        ...


def open_prefill(settings: PrefillSettings, config: SwitcherConfig) -> Prefill:
    """The source of features.

    Args:
        settings: which one.
        config: of the switcher, which says what the features are.

    Raises:
        UserError: no such model, or another than the switcher's.
    """
    if isinstance(settings, OwnPrefill):
        return TransformersPrefill(settings, config)
    assert isinstance(settings, ServerPrefill)
    return RemotePrefill(settings, config)


def pooled(outputs: Any, lengths: Sequence[int], layer: str, pooling: str) -> torch.Tensor:
    """float32 [B, H]: the features in the outputs of a transformers model over prompts that are padded on the right.

    Args:
        outputs: of the model without its head; with `hidden_states` unless the layer is final.
        lengths: tokens of each prompt.
        layer, pooling: as in `SwitcherConfig`.
    """
    hidden_BLH = outputs.last_hidden_state if layer == "final" else outputs.hidden_states[int(layer) + 1]
    rows = [each[:length] for each, length in zip(hidden_BLH.float(), lengths, strict=True)]
    return torch.stack([row[-1] if pooling == "last" else row.mean(0) for row in rows])


class TransformersPrefill:
    """The model in this process. Prompts that wait are read together, in a thread; see `Prefill`."""

    def __init__(self, settings: OwnPrefill, config: SwitcherConfig) -> None:
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        hide_gpus_if_unwanted()
        folder = HFFolder(resolve(settings.load))
        if settings.check_weights and (found := folder.content_hash()) != config.weights:
            raise UserError(
                f"prefill.load: {settings.load} is another model than the switcher was trained for (weights {found} "
                f"and {config.weights})"
            )
        dtype = _DTYPES[settings.dtype or config.dtype]
        self._config, self._most = config, settings.batch_size
        self._device = own_device(0)
        with phase(f"{settings.load} is loaded for the switcher's features"):
            try:
                model = AutoModel.from_pretrained(
                    str(folder.path), dtype=dtype, use_safetensors=True, local_files_only=True
                )
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"prefill.load: {settings.load}: transformers cannot load it: {reason}") from None
            self._model: Any = model.to(self._device).eval()
        self._thread = ThreadPoolExecutor(1, "prefill")
        self._waiting: asyncio.Queue[tuple[list[int], asyncio.Future[np.ndarray]]] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._tell_cost()

    async def features(self, ids: Sequence[int]) -> np.ndarray:
        """See `Prefill`."""
        if self._waiting is None:
            self._waiting = asyncio.Queue()
            self._worker = asyncio.create_task(self._work(self._waiting))
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((list(ids), future))
        return await future

    async def close(self) -> None:
        """See `Prefill`."""
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self, waiting: asyncio.Queue[tuple[list[int], asyncio.Future[np.ndarray]]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await waiting.get()]
            while len(batch) < self._most and not waiting.empty():
                batch.append(waiting.get_nowait())
            wanted = [(ids, future) for ids, future in batch if not future.cancelled()]
            if not wanted:
                continue
            try:
                found = await loop.run_in_executor(self._thread, self.read, [ids for ids, _ in wanted])
            except Exception as error:  # whatever it is, these prompts have no features
                for _, future in wanted:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(wanted, found, strict=True):
                if not future.done():
                    future.set_result(vector)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [B, H]: the features of prompts, padded on the right: no token sees what follows it."""
        longest = max(map(len, prompts))
        ids_BL = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, : len(prompt)] = torch.tensor(prompt)
            mask_BL[row, : len(prompt)] = 1
        outputs = self._model(
            input_ids=ids_BL.to(self._device),
            attention_mask=mask_BL.to(self._device),
            use_cache=False,
            output_hidden_states=self._config.layer != "final",
        )
        found: np.ndarray = (
            pooled(outputs, [len(p) for p in prompts], self._config.layer, self._config.pooling).cpu().numpy()
        )
        return found

    def _tell_cost(self) -> None:
        probe = [list(range(1, _PROBE + 1))]
        self.read(probe)
        begun = time.perf_counter()
        self.read(probe)
        seconds = time.perf_counter() - begun
        memory = sum(p.numel() * p.element_size() for p in self._model.parameters()) / 1e9
        say(
            f"the switcher's own prefill: {memory:.2f} GB of weights on {self._device}, {1e3 * seconds:.1f} ms for a "
            f"prompt of {_PROBE} tokens"
        )


class RemotePrefill:
    """A server that returns hidden states; see `Prefill`."""

    def __init__(self, settings: ServerPrefill, config: SwitcherConfig) -> None:
        import httpx2

        self._settings, self._config = settings, config
        if config.layer != "final" or config.pooling != "last":
            raise UserError(
                f"prefill.name: server gives the final hidden state at the last token, and the switcher reads layer "
                f"{config.layer}, pooling {config.pooling}; allowed: prefill.name: transformers"
            )
        self._url = settings.base_url + settings.path
        self._client = httpx2.AsyncClient(timeout=settings.timeout, trust_env=False)

    def check(self) -> None:
        """Asks once, so that a wrong address or model is known before the first user waits for it.

        Raises:
            UserError: no features came.
        """
        import httpx2

        try:
            with httpx2.Client(timeout=self._settings.timeout, trust_env=False) as client:
                self._vector(client.post(self._url, json=self._body(range(1, 9))))
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"prefill.base_url: {self._url} gives no features of 8 tokens: {error}") from None

    async def features(self, ids: Sequence[int]) -> np.ndarray:
        """See `Prefill`."""
        return self._vector(await self._client.post(self._url, json=self._body(ids)))

    def _body(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"model": self._settings.model, "input": [list(ids)], "encoding_format": "float"}

    def _vector(self, answer: Any) -> np.ndarray:
        answer.raise_for_status()
        first = answer.json()["data"][0]
        vector = np.array(first["embedding"] if "embedding" in first else first["data"], dtype=np.float32)
        if vector.ndim == 2:  # one for each token
            vector = vector[-1]
        if vector.shape != (self._config.size,) or not np.isfinite(vector).all():
            raise ValueError(f"a vector of shape {vector.shape}; expected {self._config.size} finite numbers")
        return vector

    async def close(self) -> None:
        """See `Prefill`."""
        await self._client.aclose()
