"""`fusemega switch serve`: the proxy, checked against its switcher, model and upstream before it takes requests."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from fusemega.config import Section
from fusemega.errors import UserError, nearest
from fusemega.runtime.console import say
from fusemega.sampling.engines import HTTPAddress
from fusemega.switch.families import MODES
from fusemega.switch.modes import Modes
from fusemega.switch.prefill import PrefillSettings, RemotePrefill, open_prefill, parse_prefill
from fusemega.switch.switcher import Switcher

_PACKAGES = ("starlette", "uvicorn", "httpx2")


class UpstreamSettings(Section):
    """The server that answers: vLLM, SGLang, `transformers serve`, and others with OpenAI's chat completions."""

    base_url: HTTPAddress = Field(description="its address, such as http://localhost:8000/v1")
    model: str = Field(description="the model's name on it")
    api_key_env: str | None = Field(
        None,
        description="environment variable with a key that is sent where a client sends none; it is written nowhere",
    )
    connect_timeout: float = Field(10.0, gt=0, description="seconds for a connection")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for its next byte")
    check: bool = Field(
        True,
        description="before the start ask it for one token in each mode: it must have the model, and read as many "
        "prompt tokens as the template writes; a server that ignores the switch is refused",
    )


class SwitchServeRun(Section):
    """A proxy that chooses short or long reasoning for each request."""

    switcher: str = Field(description="folder of the trained switcher")
    tokenizer: str = Field(description="folder or hub id with the model's tokenizer and chat template")
    upstream: UpstreamSettings
    prefill: SerializeAsAny[PrefillSettings] = Field(
        description="where hidden states come from: `name` selects the source; its settings follow"
    )
    threshold: float | None = Field(None, ge=-1, le=1, description="in place of the switcher's")
    decide_timeout: float = Field(
        5.0, gt=0, description="seconds after which the long mode is taken without a decision"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is all")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    @field_validator("prefill", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return parse_prefill(value) if isinstance(value, dict) else value


def serve(run: SwitchServeRun) -> None:
    """Serves until it is told to end.

    Raises:
        UserError: a package, the switcher, the model or the upstream is missing or does not fit; the port is taken.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise UserError(f"the proxy needs the package {package}: pip install 'fusemega[serve]'")
    import uvicorn

    from fusemega.switch.decision import Decider
    from fusemega.switch.proxy import Proxy

    switcher = Switcher.load(run.switcher)
    modes = Modes(switcher.config.modes, run.tokenizer)
    switcher.check_modes(modes, run.tokenizer)
    modes.check_server()
    key = _key(run.upstream)
    if run.upstream.check:
        check_upstream(run.upstream, modes, key)
    bound = _bound(run.host, run.port)
    prefill = open_prefill(run.prefill, switcher.config)
    if isinstance(prefill, RemotePrefill):
        prefill.check()
    decider = Decider(switcher, modes, prefill, run.upstream.model, run.threshold, run.decide_timeout)
    proxy = Proxy(
        run.upstream.base_url,
        decider,
        key,
        run.upstream.timeout,
        run.upstream.connect_timeout,
        closing=prefill.close,
    )
    host, port = bound.getsockname()[:2]
    threshold = switcher.config.threshold if run.threshold is None else run.threshold
    say(f"http://{host}:{port}/v1 in front of {run.upstream.base_url}: {run.upstream.model}, threshold {threshold:g}")
    if switcher.config.chosen is None and run.threshold is None:
        say("the threshold is the default, not one that was picked; see `fusemega switch calibrate`")
    config = uvicorn.Config(
        proxy.application(),
        log_level="warning",
        access_log=False,
        server_header=False,  # those of the upstream pass
        date_header=False,
        timeout_graceful_shutdown=30,
    )
    uvicorn.Server(config).run(sockets=[bound])


def check_upstream(upstream: UpstreamSettings, modes: Modes, key: str | None) -> None:
    """Asks the upstream for one token in each mode.

    Raises:
        UserError: it does not answer, does not have the model, or reads another number of prompt tokens than the
            template writes in one of the modes.
    """
    import httpx2

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = httpx2.Timeout(upstream.timeout, connect=upstream.connect_timeout)
    messages = [{"role": "user", "content": "How many legs have 3 spiders?"}]
    with httpx2.Client(headers=headers, timeout=timeout, trust_env=False) as client:
        told = True
        for mode in MODES:
            body = modes.request({"model": upstream.model, "messages": messages, "max_tokens": 1}, mode)
            try:
                answer = client.post(f"{upstream.base_url}/chat/completions", json=body)
            except httpx2.HTTPError as error:
                raise UserError(
                    f"upstream.base_url: {upstream.base_url}: no server answers ({type(error).__name__})"
                ) from None
            if answer.status_code != 200:
                raise UserError(_refusal(client, upstream, mode, answer))
            told = _compare(upstream, modes, mode, messages, answer) and told
        if not told:
            say(f"{upstream.base_url}: tells no prompt tokens, so whether it obeys the switch is not known")


def _refusal(client: Any, upstream: UpstreamSettings, mode: str, answer: Any) -> str:
    """Why the upstream does not answer a probe."""
    said = " ".join(answer.text.split())[:300]
    listed: list[str] = []
    try:
        listed = [str(model["id"]) for model in client.get(f"{upstream.base_url}/models").json()["data"]]
    except Exception:  # whatever it is, it is no list of models
        listed = []
    if listed and upstream.model not in listed:
        return (
            f"upstream.model: {upstream.base_url} does not have {upstream.model!r}{nearest(upstream.model, listed)}; "
            "it "
            f"lists: {', '.join(listed)} (a request for it: HTTP {answer.status_code}: {said})"
        )
    return f"{upstream.base_url}: refuses a request in the {mode} mode: HTTP {answer.status_code}: {said}"


def _compare(upstream: UpstreamSettings, modes: Modes, mode: str, messages: list[dict[str, str]], answer: Any) -> bool:
    """Whether the answer tells its prompt tokens; refuses those of another prompt."""
    try:
        usage = answer.json().get("usage")
    except ValueError:
        raise UserError(f"{upstream.base_url}: its answer is not JSON: {answer.text[:100]!r}") from None
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if not isinstance(count, int):
        return False
    own = len(modes.ids(messages, mode, "of the check"))
    if count != own:
        both = [len(modes.ids(messages, each, "of the check")) for each in MODES]
        raise UserError(
            f"{upstream.base_url}: reads {count} tokens of a prompt in the {mode} mode, which the switcher's template "
            f"writes with {own} ({both[0]} short, {both[1]} long): it ignores the switch, or has another chat template"
        )
    return True


def _key(upstream: UpstreamSettings) -> str | None:
    if upstream.api_key_env is None:
        return None
    key = os.environ.get(upstream.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"upstream.api_key_env: the environment has no {upstream.api_key_env}; set it to the server's key"
        )
    return key


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, so that a taken port is told before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"port: cannot listen on {host}:{port}: {error.strerror or error}") from None
    return bound
