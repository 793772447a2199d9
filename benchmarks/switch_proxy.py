"""What `fusemega switch serve` adds to a request: time to the first byte, directly and through it, at several loads.

    python benchmarks/switch_proxy.py [--model FOLDER] [--requests 300] [--concurrency 1 16 64]

The upstream answers at once, so the difference is the proxy's. `short` is a request whose model says the mode: no
features. `decided` is one whose mode the switcher chooses, with a prefill of the model in the proxy's process; the
model's chat template needs a switch. Without --model it is a tiny random one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
import uvicorn

from fusemega.hf.folder import HFFolder
from fusemega.switch.modes import Modes, ModesConfig
from fusemega.switch.network import SwitcherNetwork
from fusemega.switch.switcher import Switcher, SwitcherConfig

ROOT = Path(__file__).resolve().parents[1]
SWITCH = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
TEXT = "A train leaves at nine and travels at 60 miles an hour. How far has it come at noon? " * 3


async def upstream(scope: Any, receive: Any, send: Any) -> None:
    """Answers every chat completion at once, and tells no usage."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    content = json.dumps({"choices": [{"message": {"role": "assistant", "content": "180 miles"}}]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """The address that a process prints, and its id."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        try:
            while not (found := re.search(r"(http://127\.0\.0\.1:\d+/v1) in front of", log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            while True:  # the socket is there before the application is
                try:
                    httpx2.get(f"{found[1]}/models", timeout=60)
                    break
                except httpx2.HTTPError:
                    time.sleep(0.1)
            yield found[1], process.pid
        finally:
            process.kill()
            process.wait()


async def times(url: str, model: str, requests: int, concurrency: int) -> np.ndarray:
    """Seconds to each answer."""
    body = {"model": model, "messages": [{"role": "user", "content": TEXT}]}
    waiting, found = iter(range(requests)), []
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

        async def work() -> None:
            for _ in waiting:
                begun = time.perf_counter()
                answer = await client.post(f"{url}/chat/completions", json=body)
                answer.raise_for_status()
                found.append(time.perf_counter() - begun)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return np.array(found)


def prepared(folder: Path, model: str | None) -> Path:
    """A model folder with a switch in its template, and a switcher for it."""
    if model is None:
        import tiny  # beside this file

        made = tiny.write_model(folder / "model", tiny.write_chat(folder / "chat.jsonl", rows=24, characters=200))
    else:
        made = folder / "model"
        made.mkdir()
        for file in Path(model).iterdir():
            (made / file.name).symlink_to(file.resolve())
    template = (made / "chat_template.jinja").read_text(encoding="utf-8")
    (made / "chat_template.jinja").unlink()
    (made / "chat_template.jinja").write_text(template + SWITCH, encoding="utf-8")
    modes, size = Modes(ModesConfig(), made), json.loads((made / "config.json").read_text())["hidden_size"]
    config = SwitcherConfig(
        weights=HFFolder(made).content_hash(),
        tokenizer=modes.tokenizer.content_hash,
        template=str(modes.tokenizer.template_hash),
        modes=ModesConfig(),
        family=modes.name,
        size=size,
        layer="final",
        pooling="last",
        prompt=modes.prefill_words,
        dtype="fp32",
        hidden_sizes=[1024, 256],
    )
    torch.manual_seed(0)
    Switcher(config, SwitcherNetwork(size, [1024, 256]).eval()).write(folder / "switcher")
    print(f"{len(modes.prefill([{'role': 'user', 'content': TEXT}], ''))} tokens in the prefill")
    return made


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upstream is not None:
        print(f"http://127.0.0.1:{args.upstream}/v1 in front of nothing", flush=True)
        uvicorn.run(upstream, port=args.upstream, log_level="critical")
        return
    with tempfile.TemporaryDirectory(prefix="fusemega-switch-") as name:
        folder = Path(name)
        model = prepared(folder, args.model)
        with running([sys.executable, __file__, "--upstream", "18231"], folder / "upstream.log") as (direct, _):
            run = {
                "switcher": str(folder / "switcher"),
                "tokenizer": str(model),
                "upstream": {"base_url": direct, "model": "m"},
                "prefill": {"name": "transformers", "load": str(model), "batch_size": 16},
                "decide_timeout": 600,
                "port": 0,
            }
            (folder / "serve.yaml").write_text(json.dumps(run))
            command = [sys.executable, "-m", "fusemega", "switch", "serve", str(folder / "serve.yaml")]
            with running(command, folder / "proxy.log") as (proxy, proxy_id):
                print((folder / "proxy.log").read_text().strip())
                print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}")
                for concurrency in args.concurrency:
                    measure(direct, proxy, args.requests, concurrency, proxy_id)


def measure(direct: str, proxy: str, requests: int, concurrency: int, proxy_id: int) -> None:
    """Rounds of each kind in turn, so that all see the same load of the machine."""
    kinds = {"direct": (direct, "m"), "short": (proxy, "m:short"), "decided": (proxy, "m")}
    found: dict[str, list[np.ndarray]] = {what: [] for what in kinds}
    spent = dict.fromkeys(kinds, 0.0)
    size, process = max(20, 2 * concurrency), psutil.Process(proxy_id)
    for number in range(1 + max(1, requests // size)):
        for what, (url, model) in kinds.items():
            before = sum(process.cpu_times()[:2])
            took = asyncio.run(times(url, model, size, concurrency))
            if number:  # the first round warms up
                found[what].append(took)
                spent[what] += sum(process.cpu_times()[:2]) - before
    for what, rounds in found.items():
        took = 1e3 * np.concatenate(rounds)
        p50, p99 = np.quantile(took, [0.5, 0.99])
        cpu = 1e3 * spent[what] / len(took)
        print(
            f"{concurrency:3d} at once, {what:8s} p50 {p50:8.1f} ms, p99 {p99:8.1f} ms, {cpu:6.2f} ms of the proxy's "
            f"processor time a request, {len(took)} requests",
            flush=True,
        )


if __name__ == "__main__":
    main()
