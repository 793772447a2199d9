"""`fusemega switch serve` in front of a real `transformers serve`, and the wrapper around a transformers model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.switch.families import LONG, SHORT
from fusemega.switch.modes import Modes, ModesConfig
from fusemega.switch.network import SwitcherNetwork
from fusemega.switch.serve import SwitchServeRun, UpstreamSettings, check_upstream
from fusemega.switch.switcher import Switcher, SwitcherConfig
from fusemega.switch.wrapper import SwitchedModel
from tests.sampling.serving import serving

ROOT = Path(__file__).parents[2]
ASKED = [{"role": "user", "content": "Name a colour."}]
SECONDS = 300


@pytest.fixture(scope="module")
def switcher_folder(switch_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random switcher for the tiny model."""
    modes = Modes(ModesConfig(), switch_model)
    torch.manual_seed(3)
    config = SwitcherConfig(
        weights=HFFolder(switch_model).content_hash(), tokenizer=modes.tokenizer.content_hash,
        template=str(modes.tokenizer.template_hash), modes=ModesConfig(), family=modes.name, size=64, layer="final",
        pooling="last", prompt=modes.prefill_words, dtype="fp32", hidden_sizes=[8],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("switcher") / "switcher"
    Switcher(config, SwitcherNetwork(64, [8]).eval()).write(folder)
    return folder


def run_file(folder: Path, switcher: Path, model: Path, url: str, **changes: Any) -> Path:
    run = {
        "switcher": str(switcher),
        "tokenizer": str(model),
        "upstream": {"base_url": url, "model": str(model)},
        "prefill": {"name": "transformers", "load": str(model)},
        "port": 0,
        "decide_timeout": 120,
    }
    (folder / "serve.yaml").write_text(json.dumps(run | changes))
    return folder / "serve.yaml"


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "fusemega", "switch", "serve", str(path)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "FUSEMEGA_DEVICE": "cpu"}


@contextmanager
def switching(path: Path, log: Path) -> Iterator[str]:
    """The proxy's address."""
    with log.open("wb") as printed:
        process = subprocess.Popen(command(path), stdout=printed, stderr=subprocess.STDOUT, env=environment())
        try:
            until = time.monotonic() + SECONDS
            while not (found := re.search(r"(http://127\.0\.0\.1:\d+/v1) in front of", log.read_text())):
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.1)
            while True:  # the socket is there before the application is
                try:
                    httpx2.get(found[1].replace("/v1", "/metrics"), timeout=60)
                    break
                except httpx2.HTTPError:
                    assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            yield found[1]
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def stream(url: str, model: str, **body: Any) -> httpx2.Response:
    given = {"model": model, "messages": ASKED, "stream": True, "max_tokens": 12, **body}
    return httpx2.post(f"{url}/chat/completions", json=given, headers={"x-request-id": "one"}, timeout=SECONDS)


def without_time(content: bytes) -> bytes:
    return re.sub(rb'"created": ?\d+', b'"created":0', content)


def test_in_front_of_a_real_server(switch_model: Path, switcher_folder: Path, tmp_path: Path) -> None:
    name = str(switch_model)
    with serving(switch_model, tmp_path / "server.log") as upstream:
        with switching(run_file(tmp_path, switcher_folder, switch_model, upstream), tmp_path / "proxy.log") as url:
            for mode, suffix in ((True, ":long"), (False, ":short")):
                through = stream(url, name + suffix)
                direct = stream(upstream, name, chat_template_kwargs={"enable_thinking": mode})
                assert through.status_code == direct.status_code == 200 and b"[DONE]" not in through.content[:20]
                assert without_time(through.content) == without_time(direct.content)
                assert len(through.content) > 200 and through.headers["content-type"] == direct.headers["content-type"]
            decided = stream(url, name)
            assert decided.headers["x-fusemega-mode"] in ("short", "long")
            scores = Switcher.load(switcher_folder).scores(own_features(switch_model))[0]
            assert float(decided.headers["x-fusemega-score"]) == pytest.approx(scores[1] - scores[0], abs=1e-4)
            models = [httpx2.get(f"{each}/models", timeout=SECONDS) for each in (url, upstream)]
            assert models[0].status_code == models[1].status_code and models[0].content == models[1].content
            assert httpx2.get(url.replace("/v1", "/health"), timeout=SECONDS).json()["status"] == "ok"
            assert stream(url, "no/model").status_code >= 400
        said = (tmp_path / "proxy.log").read_text()
        assert (
            "the switcher's own prefill" in said and "the threshold is the default" in said and "Traceback" not in said
        )
        modes = Modes(ModesConfig(), switch_model)
        with pytest.raises(UserError, match="refuses a request in the short mode|does not have 'another'"):
            check_upstream(UpstreamSettings(base_url=upstream, model="another"), modes, None)
        other = tmp_path / "other.jinja"
        other.write_text((switch_model / "chat_template.jinja").read_text().replace("</think>", "</think> and more"))
        longer = Modes(ModesConfig(chat_template=str(other)), switch_model)
        with pytest.raises(UserError, match="tokens of a prompt in the short mode, .* it ignores the switch, or has"):
            check_upstream(UpstreamSettings(base_url=upstream, model=name), longer, None)
        check_upstream(UpstreamSettings(base_url=upstream, model=name), modes, None)
    with pytest.raises(UserError, match=r"upstream.base_url: .*: no server answers \(ConnectError\)"):
        check_upstream(UpstreamSettings(base_url=upstream, model=name), modes, None)


def own_features(model: Path) -> np.ndarray:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = Modes(ModesConfig(), model).prefill(ASKED, "here")
    with torch.no_grad():
        return loaded.model(torch.tensor([ids])).last_hidden_state[0, -1:].numpy()


def test_what_is_refused_before_the_start(switch_model: Path, switcher_folder: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, switcher_folder, switch_model, "http://127.0.0.1:9/v1")
    ended = subprocess.run(command(path), capture_output=True, text=True, env=environment(), timeout=SECONDS)
    assert ended.returncode == 2 and "no server answers" in ended.stderr and "Traceback" not in ended.stderr
    from fusemega.config import load

    for key, value, said in (
        ("port", 99999, "port: Input should be less than or equal to 65535"),
        ("prefill", {"name": "transfomers"}, "did you mean 'transformers'"),
        ("upstream", {"base_url": "localhost", "model": "m"}, "begins with http:// or https://"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            load(SwitchServeRun, run_file(tmp_path, switcher_folder, switch_model, "http://x", **{key: value}))


def test_one_prefill_serves_the_switcher_and_the_answer(switch_model: Path, switcher_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(switch_model, dtype=torch.float32).eval()
    modes, switched = Modes(ModesConfig(), switch_model), SwitchedModel(model, str(switcher_folder), str(switch_model))
    scores = Switcher.load(switcher_folder).scores(own_features(switch_model))[0]
    for threshold, mode in ((-1.0, LONG), (1.0, SHORT)):
        ids = torch.tensor([modes.ids(ASKED, mode, "here")])
        with torch.no_grad():
            plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        found = switched.generate(ASKED, threshold, max_new_tokens=12, do_sample=False)
        assert found.mode == mode and found.ids == plain[0, ids.size(1) :].tolist()
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)
        shared = len(modes.prefill(ASKED, "here"))
        assert found.prompt_tokens == ids.size(1)
        assert found.reused_tokens == (shared - 1 if mode == LONG else shared), "one token must be left to go on from"
    given = switched.generate(ASKED, mode=LONG, max_new_tokens=3, do_sample=False)
    assert given.scores is None and given.reused_tokens == 0
