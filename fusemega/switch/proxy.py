"""The proxy of `fusemega switch serve`: an ASGI application in front of an OpenAI-compatible server.

The request gets the fields of the chosen mode; the answer passes byte for byte, streams included. Status and headers go
to the client with the upstream's first byte, so that whatever fails before it is an error with a status. After it, a
cut upstream cuts the client's connection too: an end that looks whole would hide it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fusemega.switch.decision import BadRequest, Decider
from fusemega.switch.metrics import ProxyMetrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
_NOT_SENT = _HOP | {b"host", b"content-length", b"expect"}
_HEALTH_SECONDS = 2.0
_KEPT_SECONDS = 2.0  # that an idle connection to the upstream is kept
_ERROR_EVENT = b'data: {"error"'


class _Fault(Exception):
    """What becomes an error in OpenAI's form."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


class Proxy:
    """See the module. `application()` is what a server runs.

    Args:
        base_url: the upstream's, with /v1.
        decider: chooses the mode.
        api_key: sent where a client sends none.
        timeout: seconds to wait for the upstream's next byte.
        connect_timeout: seconds for a connection.
        most_bytes: of a request.

    Attributes:
        metrics: what it has counted.
    """

    def __init__(
        self,
        base_url: str,
        decider: Decider,
        api_key: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        most_bytes: int = 64 << 20,
        closing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._base, self._decider, self._key, self._most = base_url.rstrip("/"), decider, api_key, most_bytes
        self._timeout = httpx2.Timeout(timeout, connect=connect_timeout, pool=None)
        self._closing = closing
        self.metrics = ProxyMetrics()
        self._client = httpx2.AsyncClient()

    def application(self) -> Starlette:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            # Servers close idle connections after 5 s and more: these are given up before.
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=_KEPT_SECONDS)
            # One client's cookies are not another's: the upstream's are passed on, and none is kept.
            none = CookieJar(DefaultCookiePolicy(allowed_domains=()))
            self._client = httpx2.AsyncClient(timeout=self._timeout, limits=limits, trust_env=False, cookies=none)
            try:
                yield
            finally:
                await self._client.aclose()
                if self._closing is not None:
                    await self._closing()

        routes = [
            Route("/v1/chat/completions", _Chat(self), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._told, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {404: _not_found, 405: _not_found}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One chat completion."""
        self.metrics.in_flight += 1
        try:
            try:
                body = await self._body(receive)
                begun = time.perf_counter()
                decision = await self._decider.decide(body)
                self.metrics.decided(decision.mode, decision.by, time.perf_counter() - begun)
            except BadRequest as error:
                raise _Fault(400, "invalid_request_error", str(error), error.param) from None
        except _Fault as fault:
            self.metrics.refused += 1
            await _send_fault(send, fault, [])
            return
        except _Gone:
            self.metrics.clients_gone += 1
            return
        finally:
            self.metrics.in_flight -= 1
        self.metrics.in_flight += 1
        content = json.dumps(decision.body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        request = self._client.build_request(
            "POST",
            f"{self._base}/chat/completions",
            headers=self._request_headers(scope["headers"]),
            content=content,
            timeout=self._timeout,
        )
        work = asyncio.ensure_future(self._pass_on(request, decision.headers, send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.metrics.clients_gone += 1
        finally:
            self.metrics.in_flight -= 1
            for task in (work, gone):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _body(self, receive: Receive) -> dict[str, Any]:
        """The request's body.

        Raises:
            _Fault: it is none.
            _Gone: the client left.
        """
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                raise _Fault(413, "invalid_request_error", f"a request of more than {self._most} bytes")
            more = message.get("more_body", False)
        try:
            body = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise _Fault(400, "invalid_request_error", f"the request is not JSON: {error}") from None
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
            raise _Fault(400, "invalid_request_error", "messages: expected a list of one message or more", "messages")
        return body

    def _request_headers(self, given: Iterable[tuple[bytes, bytes]]) -> Headers:
        """The client's headers, with a key if it has none; nothing is asked for that the client did not ask for."""
        kept = [(name, value) for name, value in given if name.lower() not in _NOT_SENT]
        names = {name.lower() for name, _ in kept}
        if b"accept-encoding" not in names:
            kept.append((b"accept-encoding", b"identity"))
        if self._key is not None and b"authorization" not in names:
            kept.append((b"authorization", f"Bearer {self._key}".encode()))
        return kept

    async def _pass_on(self, request: httpx2.Request, told: Headers, send: Send) -> None:
        """Sends the request and passes the answer on; an error in OpenAI's form if there is none."""
        try:
            answer = await self._send(request)
        except _Fault as fault:
            await _send_fault(send, fault, told)
            return
        try:
            chunks = answer.aiter_raw()
            try:
                first = await anext(chunks, b"")
            except httpx2.HTTPError as error:
                await _send_fault(send, self._fault(error, "before its first byte"), told)
                return
            self.metrics.statuses[answer.status_code] += 1
            headers = [(name, value) for name, value in answer.headers.raw if name.lower() not in _HOP]
            start = {"type": "http.response.start", "status": answer.status_code, "headers": [*headers, *told]}
            await send(start)
            streams = b"text/event-stream" in answer.headers.get("content-type", "").encode()
            watch = _Errors() if streams and answer.status_code == 200 else None
            try:
                while True:
                    if watch is not None and watch.sees(first):
                        self.metrics.errors_in_streams += 1
                    await send({"type": "http.response.body", "body": first, "more_body": True})
                    first = await anext(chunks, b"")
                    if not first:
                        break
            except httpx2.HTTPError:
                # The response stays incomplete, and the server that runs this application closes the connection.
                self.metrics.upstream["cut"] += 1
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        """The answer, with its status and headers. A connection that ends before them is tried once more: the upstream
        may have closed it, idle, while the request was on its way."""
        try:
            try:
                return await self._client.send(request, stream=True)
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                self.metrics.tried_again += 1
                return await self._client.send(request, stream=True)
        except httpx2.HTTPError as error:
            raise self._fault(error, "") from None

    def _fault(self, error: Exception, when: str) -> _Fault:
        """What the client is told of a fault before the first byte."""
        if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            self.metrics.upstream["connect"] += 1
            return _Fault(502, "upstream_error", f"no connection to the upstream ({type(error).__name__})")
        if isinstance(error, httpx2.TimeoutException):
            self.metrics.upstream["timeout"] += 1
            return _Fault(504, "upstream_timeout", f"the upstream sent nothing for {self._timeout.read:g} s")
        self.metrics.upstream["broken"] += 1
        return _Fault(502, "upstream_error", f"the upstream broke off {when or 'without an answer'}")

    async def _models(self, request: Request) -> Response:
        """The upstream's list, as it is."""
        headers = self._request_headers(request.scope["headers"])
        try:
            answer = await self._client.get(f"{self._base}/models", headers=headers, timeout=self._timeout)
        except httpx2.HTTPError as error:
            return _as_response(self._fault(error, ""))
        kept = {k: v for k, v in answer.headers.items() if k.lower() in ("content-type",)}
        return Response(answer.content, answer.status_code, kept)

    async def _health(self, _: Request) -> Response:
        """200 if the upstream is healthy, by its /health or, where it has none, by its list of models; else 503."""
        headers, found, healthy = self._request_headers([]), "", False
        try:
            for url in (f"{self._base.removesuffix('/v1')}/health", f"{self._base}/models"):
                answer = await self._client.get(url, headers=headers, timeout=_HEALTH_SECONDS)
                healthy, found = answer.status_code < 400, f"status {answer.status_code}"
                if answer.status_code != 404:
                    break
        except httpx2.HTTPError as error:
            healthy, found = False, type(error).__name__
        return JSONResponse({"status": "ok" if healthy else "upstream", "upstream": found}, 200 if healthy else 503)

    async def _told(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")


class _Chat:
    """`Proxy.chat` as an ASGI application, which writes its answer itself."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._proxy.chat(scope, receive, send)


class _Gone(Exception):
    """The client has left."""


class _Errors:
    """Finds an event with an error in a stream, wherever its chunks are cut; counts a stream once."""

    def __init__(self) -> None:
        self._tail, self._seen = b"\n", False

    def sees(self, chunk: bytes) -> bool:
        """Whether this chunk completes the stream's first error."""
        if self._seen:
            return False
        text = self._tail + chunk
        self._seen = b"\n" + _ERROR_EVENT in text.replace(b"\r", b"\n").replace(b'{ "', b'{"')
        self._tail = text[-len(_ERROR_EVENT) - 4 :]
        return self._seen


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_response(fault: _Fault) -> JSONResponse:
    error = {"message": str(fault), "type": fault.kind, "param": fault.param, "code": None}
    return JSONResponse({"error": error}, fault.status)


async def _send_fault(send: Send, fault: _Fault, told: Headers) -> None:
    response = _as_response(fault)
    await send({"type": "http.response.start", "status": fault.status, "headers": [*response.raw_headers, *told]})
    await send({"type": "http.response.body", "body": response.body})


async def _not_found(request: Request, error: Any) -> Response:
    there = "POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics"
    found = f"{request.method} {request.url.path} is not served here; there are {there}"
    return _as_response(_Fault(error.status_code, "invalid_request_error", found))
