"""A response's program: runs its code, then answers calls of its functions.

Nothing here is to be trusted once the code has run. All that it can do to its tests is to answer.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from .plain import NotPlain, TooLong, packed, receive, send, unpacked

NAME = "program"  # of its module: what it does as `__main__` is not wanted


def run(sources: list[str], calls: int, answers: int) -> None:
    """Runs the first of `sources` that is Python (else reports the last one's error), then answers until the end.

    A call is [expression, arguments, named arguments]; its answer {"value": ..., "changed": ...} with the arguments
    that it has changed, or {"raises": [type, text]}, or {"not_plain": type}. The first message says how the code ran.
    """
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    try:
        exec(_compiled(sources), module.__dict__)
    except BaseException as error:
        send(answers, {"raises": _told(error)})
        return
    send(answers, {"value": None})
    while True:
        expression, arguments, named = receive(calls)
        send(answers, _answer(module, expression, arguments, named))


def _compiled(sources: list[str]) -> types.CodeType:
    for source in sources[:-1]:
        try:
            return compile(source, NAME, "exec")
        except (SyntaxError, ValueError):
            continue
    return compile(sources[-1], NAME, "exec")


def _answer(module: types.ModuleType, expression: str, arguments: Any, named: Any) -> dict[str, Any]:
    given, by_name = unpacked(arguments), unpacked(named)
    try:
        function = eval(expression, module.__dict__)
    except (NameError, AttributeError, SyntaxError):
        return {"missing": True}
    except BaseException as error:
        return {"raises": _told(error)}
    try:
        value = packed(function(*given, **by_name))
        changed = [packed(given), packed(by_name)]
        answer: dict[str, Any] = {"value": value}
        return answer if changed == [arguments, named] else {**answer, "changed": changed}
    except NotPlain as error:
        return {"not_plain": str(error)}
    except TooLong:
        return {"too_long": True}
    except BaseException as error:
        return {"raises": _told(error)}


def _told(error: BaseException) -> list[str]:
    try:
        text = str(error)[:1000]
    except BaseException:
        text = ""
    return [type(error).__name__, text]
