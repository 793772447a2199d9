"""Chat templates, rendered as transformers renders them, but within a budget of time, memory and output.

This is the only place where a model's template is run. It runs in a process of its own (`template_process.py`), which
is started when it is first needed and kept until a template exceeds its budget, which ends it.
"""

from __future__ import annotations

import atexit
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fusemega.errors import UserError
from fusemega.files.tokenizer_files import TEMPLATE_BYTES
from fusemega.text import template_process
from fusemega.text.document import BadRow
from fusemega.text.tokenizer import Tokenizer

SECONDS = 5.0  # of processor time for a rendering
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that transformers treats as equal


class OverBudget(UserError):
    """A chat template used more time, memory or output than a conversation may."""


class ChatTemplate:
    """A chat template of a tokenizer.

    Attributes:
        source: its name in messages.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, source: str | None = None) -> None:
        self.source = source or tokenizer.source
        if len(template) > TEMPLATE_BYTES:
            raise UserError(f"{self.source}: a chat template of {len(template)} characters; at most {TEMPLATE_BYTES}")
        self._template = template
        self._special_tokens: dict[str, Any] = _plain(tokenizer.hf.special_tokens_map)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The result of transformers' `apply_chat_template(..., tokenize=False)`, with a fixed date for today's.

        Args:
            messages: fields of None are left out.
            variables: further variables that the template may ask for.

        Raises:
            BadRow: the template refuses the conversation.
            OverBudget: it needs more than a conversation may.
        """
        given = {
            "messages": [_message(message) for message in messages],
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        if clash := given.keys() & variables.keys():
            raise BadRow("template refuses", f"{min(clash)} is no variable for a chat template; it has its own meaning")
        asked = marshal.dumps(given | self._special_tokens | _plain(variables))
        longest = (1 << 16) + 4 * len(self._template) + 16 * len(asked)
        request = marshal.dumps((self._template, asked, longest, SECONDS))
        kind, text = _PROCESS.ask(request, self.source)
        if kind == b"R":
            return text
        if kind == b"E":
            raise BadRow("template refuses", f"the chat template refuses the conversation: {text}")
        if kind == b"M":
            size = template_process.memory(len(request)) >> 20
            raise OverBudget(
                f"{self.source}: its chat template needs more than {size} MiB of memory for a conversation"
            )
        raise OverBudget(
            f"{self.source}: its chat template makes more than {longest} characters of a conversation "
            f"of {len(asked)} bytes"
        )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning} | given | {"reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """`value` of plain JSON types, as transformers hands values to templates; others as "<their type>"."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [*map(_plain, value)]
    return f"<{type(value).__name__}>"


class _Process:
    """The process that renders, one conversation at a time, for all threads of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, source: str) -> tuple[bytes, str]:
        """The reply's kind and text."""
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self.end()
                self._running = self._start()
            assert self._running.stdin is not None and self._running.stdout is not None
            try:
                self._running.stdin.write(len(request).to_bytes(8, "little") + request)
                self._running.stdin.flush()
                reply = template_process.receive(self._running.stdout)
            except BrokenPipeError:
                reply = b""
            except BaseException:  # a partial message was read: the rest would be mistaken for the next reply
                self.end()
                raise
            if not reply:
                self._lost(source)
            return reply[:1], reply[1:].decode("utf-8", "surrogatepass")

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._running is not None:
            process, self._running = self._running, None
            process.kill()
            process.communicate()

    def forget(self) -> None:
        """Called in a forked child: the process, and a lock that another thread may hold, belong to the parent."""
        self.__init__()  # type: ignore[misc]

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(template_process.__file__).resolve())]
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise UserError(f"cannot start a process that renders chat templates: {error.strerror}") from None

    def _lost(self, source: str) -> NoReturn:
        process, self._running = self._running, None
        assert process is not None
        process.communicate()
        if process.returncode == -signal.SIGPROF:
            limit = f"{SECONDS:g} s of processor time"
            raise OverBudget(f"{source}: its chat template needs more than {limit} for a conversation")
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        raise OverBudget(f"{source}: its chat template ended the process that renders it ({how})")


_PROCESS = _Process()
atexit.register(_PROCESS.end)
os.register_at_fork(after_in_child=_PROCESS.forget)
