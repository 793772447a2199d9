"""Which requests to a server are under way, answered, refused and failed, and when to give up."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from fusemega.errors import UserError
from fusemega.sampling.engine import REFUSED, Missing, Response, SampleRequest
from fusemega.sampling.engines import OpenAISettings
from fusemega.sampling.server import ServerFault

_HOPELESS = 8  # requests in a row without a response, or twice those under way at once if that is more


class Account:
    """Deals out requests and takes what became of them.

    A refusal becomes a response, so that the prompt is not tried in every later run. But if the server has refused
    everything so far, the fault is in the settings: then nothing is recorded.

    Args:
        wanted: the requests.
        answered_before: whether an earlier run with these settings got a response.
        settings: of the engine.
    """

    def __init__(self, wanted: Sequence[SampleRequest], answered_before: bool, settings: OpenAISettings) -> None:
        self._waiting = deque(wanted)
        self._total = len(wanted)
        self._server = settings.base_url
        self._retries = settings.max_retries
        self._most = max(_HOPELESS, 2 * settings.concurrency)
        self._under_way = 0
        self._in_a_row = 0
        self._answered = answered_before
        self._held: list[Response] = []
        self._failed: list[tuple[SampleRequest, str]] = []
        self._dropped: list[SampleRequest] = []

    @property
    def is_open(self) -> bool:
        """Whether a request waits or is under way."""
        return bool(self._waiting) or self._under_way > 0

    def next_request(self) -> SampleRequest | None:
        """The next request to be sent; None after the last one, or when it was given up."""
        if not self._waiting:
            return None
        self._under_way += 1
        return self._waiting.popleft()

    def take(self, request: SampleRequest, found: Response | Exception) -> Iterator[Response]:
        """The responses that can be given now.

        Args:
            request: one that `next_request` gave.
            found: what became of it.

        Raises:
            UserError: no request can succeed.
            Exception: `found`, where it is nothing that a server can cause.
        """
        self._under_way -= 1
        if isinstance(found, Response):
            self._answered, self._in_a_row = True, 0
            yield from self._held
            self._held.clear()
            yield found
            return
        if not isinstance(found, ServerFault):
            raise found
        if found.lasting:
            refused = Response(request.key, request.sample, "", REFUSED, None, None, str(found))
            if self._answered:
                yield refused
                return
            self._held.append(refused)
            if len(self._held) >= self._most:
                self._refuse_all()
            return
        self._failed.append((request, str(found)))
        self._in_a_row += 1
        if self._in_a_row >= self._most:
            self._dropped += self._waiting
            self._waiting.clear()

    def close(self) -> None:
        """Says what is missing.

        Raises:
            Missing: requests failed.
            UserError: every request was refused.
        """
        if self._held and not self._failed:
            self._refuse_all()
        missing = [request for request, _ in self._failed] + self._dropped
        missing += [SampleRequest(held.key, (), held.sample) for held in self._held]
        if not missing:
            return
        kinds = Counter(reason for _, reason in self._failed)
        told = ", ".join(f"{count}: {reason}" for reason, count in kinds.most_common(3))
        line = f"{self._server}: {len(missing)} of {self._total} requests have no response"
        if self._dropped:
            line += f", {len(self._dropped)} of them not begun after {self._in_a_row} failures in a row"
        raise Missing(f"{line}; {self._retries} further tries each ({told})", missing)

    def _refuse_all(self) -> None:
        raise UserError(f"{self._server}: refuses all of the first {len(self._held)} requests: {self._held[0].reason}")
