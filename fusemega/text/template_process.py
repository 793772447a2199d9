"""The process that renders chat templates, within limits that the kernel enforces.

Templates come with models from anywhere. No check inside the process could bound their loops, or what compiled code
does with `10 ** 10 ** 9`, `'x' * 10 ** 10`, a width of 3,000,000,000 or lists of lists of lists; each would need its
own. This process holds nothing else that could be lost. SIGPROF ends it when a rendering has used its processor time
(other work on the machine does not count), its address space is bounded, and what it writes is counted.

`fusemega.text.templates` starts this file as a script: it imports jinja2 and nothing of fusemega. Both ways a message
is its length in 8 bytes and its content. A request: marshal of (template, marshal of its variables, longest output in
characters, seconds). A reply: a letter, then UTF-8: R the rendering, E why the template refuses, M no memory, O too
much output.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder, so that its modules do not shadow others of the same name

import json
import marshal
import resource
import signal
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

import jinja2
from jinja2 import ext, nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 512 << 20  # bytes of address space, plus what a long conversation needs
_LONGEST_REASON = 1000  # characters of a refusal, which a template may make as long as it likes
# Templates that print today's date would make samples differ from one day to the next. This fixed one is that on which
# Llama-3.2's own template falls back.
_TODAY = datetime(2024, 7, 26)


def main() -> None:
    """Answers requests until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # signals are for the parent; this process ends with it
    # Its default action ends the process; an ignored or blocked signal would be inherited from the parent.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a template that crashes it leaves no core file
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while request := receive(requests, _bound_memory):
        reply = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


def receive(pipe: IO[bytes], announce: Callable[[int], None] = lambda length: None) -> bytes:
    """The next message; b"" if the other side has closed the pipe. `announce` gets its length before it is read."""
    header = pipe.read(8)
    if len(header) < 8:
        return b""
    length = int.from_bytes(header, "little")
    announce(length)
    content = pipe.read(length)
    return content if len(content) == length else b""


def memory(length: int) -> int:
    """Bytes of address space in which a request of `length` bytes is rendered."""
    return MEMORY + 32 * length


def _bound_memory(length: int) -> None:
    wanted = memory(length)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _answer(request: bytes) -> bytes:
    try:
        template, asked, longest, seconds = marshal.loads(request)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        variables = marshal.loads(asked)
        pieces, length = [], 0
        for piece in _compiled(template).generate(variables):
            length += len(piece)
            if length > longest:
                return b"O"
            pieces.append(piece)
        return b"R" + "".join(pieces).encode("utf-8", "surrogatepass")
    except MemoryError:
        return b"M"
    except Exception as error:
        try:
            return b"E" + (str(error) or type(error).__name__)[:_LONGEST_REASON].encode("utf-8", "surrogatepass")
        except Exception:  # an exception's own text can fail, too
            return b"E" + type(error).__name__.encode()


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def environment() -> jinja2.Environment:
    """The environment in which transformers compiles chat templates, apart from the date."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _TODAY.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


class _Generation(ext.Extension):
    """`{% generation %}`, which marks an assistant's text; that text is written unchanged."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes through which a template could reach other objects."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's, without private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given: Mapping[Any, Any] = dict(*args[1:], **kwargs)
        for name in given:
            _refuse_private(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the private name {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
