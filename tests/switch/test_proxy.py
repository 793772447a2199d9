"""The proxy over real sockets, in front of a server that fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn

from fusemega.switch.decision import Decider
from fusemega.switch.families import families
from fusemega.switch.modes import Modes, ModesConfig
from fusemega.switch.network import SwitcherNetwork
from fusemega.switch.proxy import Proxy
from fusemega.switch.switcher import Switcher, SwitcherConfig

MODEL = "org/model"
EVENTS = [f'data: {{"choices": [{{"delta": {{"content": "{n} é"}}}}]}}\n\n'.encode() for n in range(20)]
EVENTS.append(b"data: [DONE]\n\n")


class Upstream:
    """An ASGI application. The user's text says what happens; `bodies` and `headers` have what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()
        self.go = threading.Event()
        self.most = self.now = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/v1/models":
            await _json(send, {"object": "list", "data": [{"id": MODEL}]})
            return
        if scope["path"] == "/health":
            await _json(send, {}, 404)
            return
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message.get("body", b""), message.get("more_body", False)
        body = json.loads(content)
        self.bodies.append(body)
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await self._answer(body["messages"][-1]["content"], body, receive, send)

    async def _answer(self, what: str, body: dict[str, Any], receive: Any, send: Any) -> None:
        if what == "500":
            await _json(send, {"error": {"message": "internal"}}, 500)
        elif what == "slow":
            await asyncio.sleep(3)
        elif what == "early cut":
            await send(_start("application/json", [(b"content-length", b"100")]))
        elif what == "wait":
            await send(_start("text/event-stream"))
            await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
        elif not body.get("stream"):
            told = [(b"x-of-upstream", b"yes"), (b"set-cookie", b"session=of-one-client; Path=/")]
            await _json(send, {"choices": [{"message": {"content": what}}]}, headers=told)
        else:
            self.now += 1
            self.most = max(self.most, self.now)
            await send(_start("text/event-stream", [(b"x-of-upstream", b"yes")]))
            for number, event in enumerate(EVENTS):
                if what == "cut" and number == 5:
                    self.now -= 1
                    return  # the server closes the connection
                if what == "told error" and number == 5:
                    event = b'data: {"error": {"message": "worker died"}}\n\n'
                half = len(event) // 2
                for part in (event[:half], event[half:]):  # events do not end where chunks do
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    await asyncio.sleep(0.002 if what != "together" else 0.05)
            self.now -= 1
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _start(kind: str, headers: Sequence[tuple[bytes, bytes]] = (), status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode()), *headers]}


async def _json(send: Any, value: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    content = json.dumps(value).encode()
    await send(_start("application/json", [(b"content-length", str(len(content)).encode()), *headers], status))
    await send({"type": "http.response.body", "body": content})


class LengthPrefill:
    """The feature is the number of the prompt's tokens; some prompts have none."""

    async def features(self, ids: Sequence[int]) -> np.ndarray:
        if len(ids) > 400:
            raise RuntimeError("too long for this machine")
        return np.array([len(ids)], dtype=np.float32)

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def modes(switch_model: Path) -> Modes:
    return Modes(ModesConfig(), switch_model)


def length_switcher(modes: Modes, border: float) -> Switcher:
    """Its gain is above 0 for prompts of more than `border` tokens."""
    config = SwitcherConfig(
        weights="w", tokenizer=modes.tokenizer.content_hash, template=str(modes.tokenizer.template_hash),
        modes=ModesConfig(), family=modes.name, size=1, layer="final", pooling="last", prompt="p", dtype="fp32",
        hidden_sizes=[], threshold=0.0,
    )  # fmt: skip
    network = SwitcherNetwork(1, []).eval()
    network.load_state_dict(
        network.state_dict()
        | {"layers.0.weight": np_tensor([[-0.1], [0.1]]), "layers.0.bias": np_tensor([0.1 * border, -0.1 * border])}
    )
    return Switcher(config, network)


def np_tensor(values: Any) -> Any:
    import torch

    return torch.tensor(values)


def serving(application: Any) -> tuple[str, Callable[[], None]]:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(application, log_level="critical", server_header=False, date_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop() -> None:
        server.should_exit = server.force_exit = True
        thread.join(10)

    return f"http://127.0.0.1:{bound.getsockname()[1]}/v1", stop


class Pair:
    """An upstream with the proxy before it."""

    def __init__(self, modes: Modes, **settings: Any) -> None:
        self.upstream = Upstream()
        self.direct, self._stop_upstream = serving(self.upstream)
        decider = Decider(length_switcher(modes, 60), modes, LengthPrefill(), MODEL, seconds=20)
        self.proxy = Proxy(self.direct, decider, **{"connect_timeout": 120, **settings})
        self.url, self._stop_proxy = serving(self.proxy.application())

    def ask(self, text: str, url: str = "", **body: Any) -> httpx2.Response:
        headers = body.pop("headers", {})
        given = {"model": MODEL, "messages": [{"role": "user", "content": text}], **body}
        return httpx2.post(f"{url or self.url}/chat/completions", json=given, headers=headers, timeout=30)

    def stop(self) -> None:
        self._stop_proxy()
        self._stop_upstream()


@pytest.fixture(scope="module")
def pair(modes: Modes) -> Iterator[Pair]:
    made = Pair(modes, api_key="of the proxy")
    yield made
    made.stop()


def mode_of(body: dict[str, Any]) -> object:
    return body.get("chat_template_kwargs", {}).get("enable_thinking")


def test_the_mode_is_chosen_and_told(pair: Pair) -> None:
    short, long = pair.ask("few"), pair.ask("many words " * 20)
    assert short.headers["x-fusemega-mode"] == "short" and mode_of(pair.upstream.bodies[-2]) is False
    assert long.headers["x-fusemega-mode"] == "long" and mode_of(pair.upstream.bodies[-1]) is True
    assert float(short.headers["x-fusemega-score"]) < 0 < float(long.headers["x-fusemega-score"])
    assert short.headers["x-fusemega-threshold"] == "0" and short.headers["x-of-upstream"] == "yes"
    assert pair.upstream.headers[-1]["authorization"] == "Bearer of the proxy"
    pair.ask("few", headers={"Authorization": "Bearer of the client"}, temperature=0.5, tools=[{"a": "é"}])
    assert pair.upstream.headers[-1]["authorization"] == "Bearer of the client"
    body = pair.upstream.bodies[-1]
    assert body["temperature"] == 0.5 and body["tools"] == [{"a": "é"}], "what else was asked for stays"


def test_no_client_gets_anothers_cookies(pair: Pair) -> None:
    assert pair.ask("few").headers["set-cookie"].startswith("session=")
    pair.ask("few")
    assert "cookie" not in pair.upstream.headers[-1]
    pair.ask("few", headers={"Cookie": "mine=1"})
    assert pair.upstream.headers[-1]["cookie"] == "mine=1"


def test_a_users_choice_wins(pair: Pair) -> None:
    for asked in ({"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"}):
        found = pair.ask("few", **asked)
        assert found.headers["x-fusemega-mode"] == "request" and "x-fusemega-score" not in found.headers
        body = pair.upstream.bodies[-1]
        assert {name: body[name] for name in asked} == asked and body.keys() == {"model", "messages", *asked}
    assert pair.ask("few", model=f"{MODEL}:long").headers["x-fusemega-mode"] == "long"
    assert pair.upstream.bodies[-1]["model"] == MODEL and mode_of(pair.upstream.bodies[-1]) is True
    found = pair.ask("few", model=f"{MODEL}:tau=-1")
    assert (found.headers["x-fusemega-mode"], found.headers["x-fusemega-threshold"]) == ("long", "-1")
    found = pair.ask("few", model="another")
    assert found.headers["x-fusemega-mode"] == "request" and pair.upstream.bodies[-1]["model"] == "another"
    assert mode_of(pair.upstream.bodies[-1]) is None
    for suffix in ("tau=2", "tau=x", "medium"):
        refused = pair.ask("few", model=f"{MODEL}:{suffix}")
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == "model" and f"{MODEL}:short" in error["message"]


def test_a_stream_passes_byte_for_byte(pair: Pair) -> None:
    through, direct = pair.ask("few", stream=True), pair.ask("few", pair.direct, stream=True)
    assert through.content == direct.content == b"".join(EVENTS)
    own = {name: value for name, value in through.headers.items() if not name.startswith("x-fusemega")}
    assert own == dict(direct.headers.items())
    whole, plain = pair.ask("few"), pair.ask("few", pair.direct)
    assert whole.content == plain.content and whole.headers["content-length"] == plain.headers["content-length"]


def test_64_streams_at_once(pair: Pair) -> None:
    async def all_of_them() -> list[bytes]:
        async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=None)) as client:

            async def one(number: int) -> bytes:
                given = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "together"}]}
                return (await client.post(f"{pair.url}/chat/completions", json=given)).content

            return list(await asyncio.gather(*map(one, range(64))))

    assert set(asyncio.run(all_of_them())) == {b"".join(EVENTS)}
    assert pair.upstream.most == 64


def test_faults_before_the_first_byte(modes: Modes, pair: Pair) -> None:
    failed = pair.ask("500")
    assert failed.status_code == 500 and failed.json() == {"error": {"message": "internal"}}, "the upstream's own"
    early = pair.ask("early cut")
    assert early.status_code == 502 and early.json()["error"]["type"] == "upstream_error"
    assert early.headers["x-fusemega-mode"] == "short"
    quick = Pair(modes, timeout=0.5)
    slow = quick.ask("slow")
    assert slow.status_code == 504 and slow.json()["error"]["message"] == "the upstream sent nothing for 0.5 s"
    quick._stop_upstream()
    gone = quick.ask("few")
    assert gone.status_code == 502 and "no connection to the upstream" in gone.json()["error"]["message"]
    assert httpx2.get(quick.url.replace("/v1", "/health")).status_code == 503
    quick._stop_proxy()
    assert quick.proxy.metrics.upstream == {"timeout": 1, "connect": 1}


def test_a_connection_that_the_upstream_closes_is_tried_once_more(modes: Modes) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    listening = socket.create_server(("127.0.0.1", 0))
    answers = [b"", answer, b"", b""]

    def serve() -> None:
        for content in answers:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(content)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    decider = Decider(length_switcher(modes, 60), modes, LengthPrefill(), MODEL, seconds=20)
    proxy = Proxy(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", decider)
    url, stop = serving(proxy.application())
    given = {"model": MODEL, "messages": [{"role": "user", "content": "few"}]}
    found = [httpx2.post(f"{url}/chat/completions", json=given, timeout=30) for _ in range(2)]
    assert [each.status_code for each in found] == [200, 502] and found[0].content == b"{}"
    assert "broke off without an answer" in found[1].json()["error"]["message"] and proxy.metrics.tried_again == 2
    stop()
    listening.close()


def test_a_cut_stream_is_seen_to_be_cut(pair: Pair) -> None:
    before, received = pair.proxy.metrics.upstream["cut"], b""
    given = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "cut"}]}
    with pytest.raises(httpx2.RemoteProtocolError):
        with httpx2.stream("POST", f"{pair.url}/chat/completions", json=given, timeout=30) as answer:
            assert answer.status_code == 200
            for chunk in answer.iter_raw():
                received += chunk
    assert received == b"".join(EVENTS[:5]) and pair.proxy.metrics.upstream["cut"] == before + 1


def test_an_error_inside_a_stream_is_counted(pair: Pair) -> None:
    before = pair.proxy.metrics.errors_in_streams
    found = pair.ask("told error", stream=True)
    assert found.status_code == 200 and b'{"error": {"message": "worker died"}}' in found.content
    assert pair.proxy.metrics.errors_in_streams == before + 1


def test_a_client_that_leaves(pair: Pair) -> None:
    given = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "wait"}]}
    with httpx2.stream("POST", f"{pair.url}/chat/completions", json=given, timeout=30) as answer:
        assert next(answer.iter_raw()) == EVENTS[0], "what is there is passed on at once"
    assert pair.upstream.left.wait(30), "the upstream is told"
    until = time.monotonic() + 30
    while pair.proxy.metrics.in_flight and time.monotonic() < until:
        time.sleep(0.01)
    assert pair.proxy.metrics.clients_gone == 1 and pair.proxy.metrics.in_flight == 0


def test_a_switcher_that_fails_opens_to_long(pair: Pair) -> None:
    found = pair.ask("many words " * 200)
    assert found.headers["x-fusemega-mode"] == "long" and "x-fusemega-score" not in found.headers
    assert mode_of(pair.upstream.bodies[-1]) is True and found.status_code == 200
    found = pair.ask(
        "few", messages=[{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "x"}]}]
    )
    assert found.status_code == 200
    text = httpx2.get(pair.url.replace("/v1", "/metrics")).text
    assert 'fusemega_switch_requests_total{mode="long",decided_by="failure"} ' in text
    assert "fusemega_switch_decision_seconds_bucket" in text


def test_what_is_no_request(pair: Pair) -> None:
    url = f"{pair.url}/chat/completions"
    for content in (b"{", b"[]", b'{"model": "m"}', b'{"messages": []}', b"[" * 100_000):
        found = httpx2.post(url, content=content)
        assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error"
    assert (
        httpx2.get(url).status_code == 405 and "POST /v1/chat/completions" in httpx2.get(url).json()["error"]["message"]
    )
    assert httpx2.post(f"{pair.url}/embeddings", json={}).status_code == 404
    assert httpx2.get(f"{pair.url}/models").json()["data"] == [{"id": MODEL}]
    assert httpx2.get(pair.url.replace("/v1", "/health")).json() == {"status": "ok", "upstream": "status 200"}


def test_the_families_are_all_told() -> None:
    assert all(family.models for family in families().values())
