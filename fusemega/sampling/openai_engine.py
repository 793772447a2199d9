"""Engine `openai`: a model behind a server with OpenAI's chat completions, through the `openai` client.

The client itself tries again after timeouts, lost connections, and the statuses 408, 409, 429 and 5xx, and waits as
long as `Retry-After` says. Here requests are tried again whose answers are no completion: malformed, cut, without
choices. The messages are sent as they are, so that the server applies the model's chat template, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from typing import Any

from fusemega.errors import UserError
from fusemega.runtime.console import say, warn
from fusemega.sampling.account import Account
from fusemega.sampling.completion import BrokenAnswer, Completion, parse_completion
from fusemega.sampling.engine import Response, SampleRequest, SamplingSettings, request_seed
from fusemega.sampling.engines import OpenAISettings
from fusemega.sampling.rendered import PromptIds
from fusemega.sampling.server import Server, ServerFault

_RETRY_AFTER = 120.0  # seconds that the client waits at most, see MAX_RETRY_AFTER_DELAY in openai/_constants.py
_PAUSE = 0.5  # seconds before the first try of ours; doubled each time, at most 8


class OpenAIEngine:
    """See the module, and `Engine`.

    Attributes:
        identity: the model's name, what is sent besides messages and sampling settings. Not the address: a server may
            move.

    Raises:
        UserError: the package `openai` or the key's variable is missing; no tokenizer or chat template.
    """

    def __init__(self, settings: OpenAISettings) -> None:
        self._settings = settings
        self._server = Server(settings)
        variables = dict(settings.extra_body.get("chat_template_kwargs") or {})
        if "reasoning_effort" in settings.extra_body:
            variables["reasoning_effort"] = settings.extra_body["reasoning_effort"]
        self._prompts = None if settings.tokenizer is None else PromptIds(settings.tokenizer, variables=variables)
        self.identity: Mapping[str, Any] = {
            "name": "openai",
            "model": settings.model,
            "extra_body": settings.extra_body,
        }
        self._prepared = False
        self._reasoned = 0

    def prepare(self) -> None:
        """See `Engine`: the server answers, and has the model."""
        if not self._prepared:
            self._server.check_model()
            self._prepared = True

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        skip: Collection[tuple[str, int]] = frozenset(),
    ) -> Iterator[Response]:
        """See `Engine`."""
        self.prepare()
        wanted = [request for request in requests if (request.key, request.sample) not in skip]
        answered_before = bool(requests) and len(wanted) < len(requests)
        loop = asyncio.new_event_loop()
        answers = self._answers(wanted, settings, answered_before)
        try:
            # The loop runs while the next answer is waited for; requests under way go on on their servers meanwhile.
            while (answer := loop.run_until_complete(anext(answers, None))) is not None:
                yield answer
        finally:
            loop.run_until_complete(_end_tasks())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
        if self._reasoned:
            say(f"{self._reasoned} responses came with their reasoning apart; the text alone is kept")

    async def _answers(
        self, wanted: Sequence[SampleRequest], settings: SamplingSettings, answered_before: bool
    ) -> AsyncGenerator[Response, None]:
        """The responses as they come; then an exception if some are missing."""
        account = Account(wanted, answered_before, self._settings)
        done: asyncio.Queue[tuple[SampleRequest, Response | Exception]] = asyncio.Queue()

        async def work(client: Any) -> None:
            while (request := account.next_request()) is not None:
                try:
                    done.put_nowait((request, await self._answer(client, request, settings)))
                except Exception as error:
                    done.put_nowait((request, error))

        async with self._server.client() as client:
            workers = [asyncio.ensure_future(work(client)) for _ in range(min(self._settings.concurrency, len(wanted)))]
            try:
                while account.is_open:
                    for response in account.take(*await done.get()):
                        yield response
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        account.close()

    async def _answer(self, client: Any, request: SampleRequest, settings: SamplingSettings) -> Response:
        """One response.

        Raises:
            UserError: no request of this kind can succeed.
            ServerFault: this one cannot, or could not now.
        """
        tries, pause = self._settings.max_retries + 1, _PAUSE
        for left in reversed(range(tries)):
            try:
                whole = tries * (self._settings.timeout + _RETRY_AFTER)  # the client's own tries and pauses
                body = self._body(request, settings)
                completion = parse_completion(await asyncio.wait_for(self._server.ask(client, body), whole))
                return self._checked(request, completion)
            except BrokenAnswer as error:
                if not left:
                    raise ServerFault(f"the answer is no completion ({error})") from None
            except TimeoutError:
                raise ServerFault("no whole answer in time") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, 8.0)
        raise AssertionError("the last try returns or raises")

    def _body(self, request: SampleRequest, settings: SamplingSettings) -> dict[str, Any]:
        """What is sent. `top_k` and `repetition_penalty`, which are not OpenAI's, only where they are asked for."""
        further: dict[str, Any] = dict(self._settings.extra_body)
        if settings.top_k is not None:
            further["top_k"] = settings.top_k
        if settings.repetition_penalty != 1:
            further["repetition_penalty"] = settings.repetition_penalty
        return {
            "model": self._settings.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": request_seed(settings.seed, request.key, request.sample),
            self._settings.length_field: settings.max_tokens,
            "extra_body": further,
        }

    def _checked(self, request: SampleRequest, found: Completion) -> Response:
        if self._prompts is not None and request.sample == 0:
            self._compare(request, found, self._prompts)
        self._reasoned += found.reasoned
        return Response(request.key, request.sample, found.text, found.finish_reason, found.prompt_tokens, found.tokens)

    def _compare(self, request: SampleRequest, found: Completion, prompts: PromptIds) -> None:
        """Refuses a server that reads a prompt otherwise than its model's tokenizer and template write it."""
        own = prompts.ids(request.messages, request.key)
        server, count = self._settings.base_url, found.prompt_tokens
        if found.prompt_ids is not None:
            if doubled := prompts.doubled_bos(found.prompt_ids):
                raise UserError(
                    f"{server}: the server reads {doubled} of a prompt: its chat template is applied twice, "
                    "or it adds bos to a text that has one"
                )
            if list(found.prompt_ids) != own:
                place = next((i for i, (a, b) in enumerate(zip(found.prompt_ids, own, strict=False)) if a != b), None)
                where = f"the token at {place} differs" if place is not None else "one is the other's beginning"
                raise UserError(
                    f"{server}: the server reads {len(found.prompt_ids)} tokens of a prompt that "
                    f"{self._settings.tokenizer} writes with {len(own)} ({where}): another chat template or tokenizer"
                )
        elif count is not None and count != len(own):
            raise UserError(
                f"{server}: the server counts {count} tokens of a prompt that {self._settings.tokenizer} writes with "
                f"{len(own)}: another chat template or tokenizer, or bos twice"
            )
        elif count is None:
            warn(f"{server}: tells nothing of its prompt tokens, so they are not compared with engine.tokenizer")
            self._prompts = None


async def _end_tasks() -> None:
    """After Ctrl-C a task still waits for the next answer, and its generator cannot be closed before it has ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
