"""Where the proxy's features come from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.switch.modes import Modes, ModesConfig
from fusemega.switch.prefill import OwnPrefill, RemotePrefill, ServerPrefill, TransformersPrefill, parse_prefill
from fusemega.switch.switcher import SwitcherConfig
from tests.switch.test_proxy import _json, serving

PROMPTS = [list(range(5, 12)), list(range(40, 90)), [7, 9], list(range(100, 130))]


def config(model: Path, **changes: Any) -> SwitcherConfig:
    modes = Modes(ModesConfig(), model)
    given = {
        "weights": HFFolder(model).content_hash(), "tokenizer": modes.tokenizer.content_hash,
        "template": modes.tokenizer.template_hash, "modes": ModesConfig(), "family": modes.name, "size": 64,
        "layer": "final", "pooling": "last", "prompt": modes.prefill_words, "dtype": "fp32", "hidden_sizes": [8],
    }  # fmt: skip
    return SwitcherConfig.model_validate(given | changes)


@pytest.mark.parametrize(("layer", "pooling"), [("final", "last"), ("final", "mean"), ("1", "last")])
def test_prompts_that_are_read_together(switch_model: Path, layer: str, pooling: str) -> None:
    prefill = TransformersPrefill(
        OwnPrefill(load=str(switch_model), batch_size=3), config(switch_model, layer=layer, pooling=pooling)
    )

    async def all_of_them() -> list[np.ndarray]:
        found = list(await asyncio.gather(*map(prefill.features, PROMPTS)))
        await prefill.close()
        return found

    found = asyncio.run(all_of_them())
    model = AutoModel.from_pretrained(switch_model, dtype=torch.float32)
    for ids, vector in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        hidden = out.last_hidden_state[0] if layer == "final" else out.hidden_states[2][0]
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_a_failure_is_that_prompts_alone(switch_model: Path) -> None:
    prefill = TransformersPrefill(OwnPrefill(load=str(switch_model)), config(switch_model))

    async def two() -> list[Any]:
        bad = await asyncio.gather(prefill.features([10**6]), return_exceptions=True)
        good = await prefill.features([1, 2])
        await prefill.close()
        return [*bad, good]

    bad, good = asyncio.run(two())
    assert isinstance(bad, Exception) and good.shape == (64,)


def test_another_model_is_refused(switch_model: Path) -> None:
    with pytest.raises(UserError, match="prefill.load: .* is another model than the switcher was trained for"):
        TransformersPrefill(OwnPrefill(load=str(switch_model)), config(switch_model, weights="0"))
    with pytest.raises(UserError, match="prefill.name: unknown name 'transfomers' .did you mean 'transformers'"):
        parse_prefill({"name": "transfomers"})


def test_a_server_that_returns_hidden_states(switch_model: Path) -> None:
    answers: list[Any] = []

    async def pooling(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body", False):
            pass
        await _json(send, {"data": [answers.pop(0)]})

    url, stop = serving(pooling)
    vector = np.arange(64, dtype=np.float32)
    settings = ServerPrefill(base_url=url.removesuffix("/v1"), model="m")
    answers += [{"data": vector.tolist()}, {"embedding": vector.tolist()}, {"data": [[0.0] * 64, vector.tolist()]}]
    answers += [{"data": [1.0]}, {"data": [float("inf")] * 64}, {"data": vector.tolist()}, {"data": [1.0]}]

    async def ask() -> None:
        prefill = RemotePrefill(settings, config(switch_model))
        for _ in range(3):
            np.testing.assert_array_equal(await prefill.features([1, 2, 3]), vector)
        with pytest.raises(ValueError, match="expected 64 finite numbers"):
            await prefill.features([1])
        with pytest.raises(ValueError):
            await prefill.features([1])
        await prefill.close()

    asyncio.run(ask())
    RemotePrefill(settings, config(switch_model)).check()
    with pytest.raises(UserError, match=r"/pooling gives no features of 8 tokens: a vector of shape \(1,\)"):
        RemotePrefill(settings, config(switch_model)).check()
    stop()
    with pytest.raises(UserError, match="gives no features of 8 tokens"):
        RemotePrefill(settings, config(switch_model)).check()
    with pytest.raises(UserError, match="allowed: prefill.name: transformers"):
        RemotePrefill(settings, config(switch_model, pooling="mean"))
