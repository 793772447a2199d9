"""The server of the engine `openai`: its client, its key, its models, and what its refusals mean."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fusemega.errors import UserError, nearest
from fusemega.runtime.console import say
from fusemega.sampling.completion import BrokenAnswer, parse_completion
from fusemega.sampling.engines import OpenAISettings

_CONNECT = 10.0  # seconds for a connection
_LISTING = 30.0  # seconds for the list of models
_NO_KEY = "none"  # the client insists on one; servers without keys read none
_FOR_ALL = (401, 403, 404)  # statuses that every request would get: no permission, no such model or address
_FOR_ONE = (400, 413, 422)  # statuses that say that this request cannot be answered


class ServerFault(Exception):
    """A request without a response.

    Attributes:
        lasting: it would fail in the same way again.
    """

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Server:
    """An OpenAI-compatible server.

    Raises:
        UserError: the package `openai` is missing, or the variable with the key.
    """

    def __init__(self, settings: OpenAISettings) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("engine.name: openai needs the package openai: pip install 'fusemega[sample]'") from None
        self._openai = openai
        self._settings = settings
        self._key = _NO_KEY
        if (name := settings.api_key_env) is not None:
            self._key = os.environ.get(name, "").strip()
            if not self._key:
                raise UserError(f"engine.api_key_env: the environment has no {name}; set it to the server's key")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """The client, with its own tries after faults."""
        timeout = self._openai.Timeout(self._settings.timeout, connect=min(_CONNECT, self._settings.timeout))
        async with self._openai.AsyncOpenAI(
            base_url=self._settings.base_url,
            api_key=self._key,
            timeout=timeout,
            max_retries=self._settings.max_retries,
        ) as client:
            yield client

    async def ask(self, client: Any, body: dict[str, Any]) -> bytes:
        """The body of the server's answer to a chat completion.

        Raises:
            UserError: no request can succeed: no permission, no such model.
            ServerFault: this request cannot, or could not now.
        """
        try:
            answer = await client.chat.completions.with_raw_response.create(**body)
        except self._openai.APIStatusError as error:
            said = self._said(error)
            if error.status_code in _FOR_ALL:
                raise UserError(f"{self._settings.base_url}: {said}") from None
            raise ServerFault(said, lasting=error.status_code in _FOR_ONE) from None
        except self._openai.APITimeoutError:
            raise ServerFault(f"no answer within {self._settings.timeout:g} s") from None
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise ServerFault(f"no connection ({type(cause).__name__}: {self._hidden(str(cause))})") from None
        content: bytes = answer.content
        return content

    def check_model(self) -> None:
        """Refuses a server that does not answer, or does not have the model.

        A model that the server does not list is tried with a request for one token: some servers list other models
        than they have.

        Raises:
            UserError: names the nearest of the listed models.
        """
        asyncio.run(self._check_model())

    async def _check_model(self) -> None:
        settings = self._settings
        async with self.client() as client:
            listed = await self._listed(client)
            if listed is not None and settings.model in listed:
                return
            body = {"model": settings.model, "messages": [{"role": "user", "content": "Hi"}]}
            # At least two further tries: a server may close its connection after an error in its list of models.
            patient = client.with_options(max_retries=max(2, settings.max_retries))
            try:
                parse_completion(await self.ask(patient, body | {settings.length_field: 1}))
            except (UserError, ServerFault, BrokenAnswer) as error:
                names = ", ".join(listed or ()) or "none"
                hint = nearest(settings.model, listed or ())
                raise UserError(
                    f"engine.model: {settings.base_url} does not have {settings.model!r}{hint}; it lists: {names} "
                    f"(a request for it: {error})"
                ) from None
        if listed:
            say(f"{settings.base_url}: answers for {settings.model}, which is not among its listed models")

    async def _listed(self, client: Any) -> list[str] | None:
        """The names that the server lists; None where it lists none.

        Raises:
            UserError: no server answers, or it wants a (nother) key.
        """
        try:
            return [
                str(model.id)
                async for model in client.with_options(
                    timeout=min(_LISTING, self._settings.timeout), max_retries=2
                ).models.list()
            ]
        except self._openai.AuthenticationError as error:
            raise UserError(f"{self._settings.base_url}: {self._said(error)}{self._about_key()}") from None
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise UserError(
                f"engine.base_url: {self._settings.base_url}: no server answers "
                f"({type(cause).__name__}: {self._hidden(str(cause))})"
            ) from None
        except Exception:  # whatever else is no list of models
            return None

    def _about_key(self) -> str:
        name = self._settings.api_key_env
        return "; give engine.api_key_env" if name is None else f" (the key is that of {name})"

    def _said(self, error: Any) -> str:
        """A refusal in one line: the status and the server's own words, without the key."""
        body = error.body
        words = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
        return self._hidden(f"HTTP {error.status_code}: {' '.join(str(words or error.message).split())[:300]}")

    def _hidden(self, text: str) -> str:
        return text if self._key == _NO_KEY else text.replace(self._key, "[key]")
