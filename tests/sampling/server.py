"""A real HTTP server with OpenAI's chat completions, which fails as it is told to.

Its answer depends on the request alone: the prompt's words backwards, and the seed. `faults` has, for a prompt's text,
what to do at its first requests, one entry each: see `_Handler._fail`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "org/teacher-7b"


@dataclass
class Served:
    """A running server.

    Attributes:
        faults: text of a prompt -> what happens at its first requests.
        always: what happens at every request for a completion; "" for nothing.
        models: the names that it lists; None: it lists none.
        key: the key that it wants.
        extra: further fields of each answer.
        asked: (text of the prompt, seed) -> requests for a completion.
        times: text of the prompt -> when its requests came.
        bodies: of all requests for a completion.
        hang: what the fault "hang" waits for.
    """

    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    always: str = ""
    models: list[str] | None = field(default_factory=lambda: ["org/teacher-1b", MODEL])
    key: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    asked: Counter[tuple[str, int]] = field(default_factory=Counter)
    times: dict[str, list[float]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    hang: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def answer(text: str, seed: int) -> str:
    return f"{' '.join(reversed(text.split()))} ({seed})"


@contextmanager
def serve() -> Iterator[Served]:
    served = Served()
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        served.hang.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path != "/v1/models" or self.served.models is None:
            self._send({"error": {"message": "not found"}}, 404)
            return
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.served.models]
        self._send({"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        text, seed = body["messages"][-1]["content"], int(body.get("seed", 0))
        with self.served.lock:
            self.served.asked[text, seed] += 1
            self.served.times.setdefault(text, []).append(time.monotonic())
            self.served.bodies.append(body)
            waiting = self.served.faults.get(text)
            fault = waiting.pop(0) if waiting else self.served.always
        if fault:
            self._fail(fault)
        elif body["model"] != MODEL:
            self._send({"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404)
        else:
            self._send(completion(answer(text, seed), len(text.split())) | self.served.extra)

    def _refused(self) -> bool:
        if self.served.key is None or self.headers["Authorization"] == f"Bearer {self.served.key}":
            return False
        self._send({"error": {"message": f"Incorrect API key provided: {self.headers['Authorization'][7:]}"}}, 401)
        return True

    def _fail(self, fault: str) -> None:
        whole = json.dumps(completion("never seen", 1)).encode()
        if fault == "timeout":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "hang":
            self.served.hang.wait()
            self.close_connection = True
        elif fault == "429":
            self._send({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.7"})
        elif fault == "500":
            self._send({"error": {"message": "internal"}}, 500)
        elif fault == "400":
            self._send({"error": {"message": "This model's maximum context length is 8 tokens."}}, 400)
        elif fault == "reset":
            self.close_connection = True
        elif fault == "cut":
            self._raw(whole[: len(whole) // 2], len(whole))
            self.close_connection = True
        elif fault == "chunk":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s" % (len(whole), whole[:20]))
            self.close_connection = True
        elif fault == "malformed":
            self._raw(whole[:-5], len(whole) - 5)
        elif fault == "html":
            self._raw(b"<html>Bad gateway</html>", 24, "text/html")
        elif fault == "empty":
            self._send(completion("", 1) | {"choices": []})
        elif fault == "error":
            self._send({"error": {"message": "worker died"}})
        else:
            raise AssertionError(fault)

    def _send(self, value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._raw(content, len(content), status=status, headers=headers)

    def _raw(
        self,
        content: bytes,
        length: int,
        kind: str = "application/json",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def completion(text: str, prompt_tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(text.split()), "total_tokens": 0},
    }
