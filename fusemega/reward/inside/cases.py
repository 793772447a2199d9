"""The test cases of a program. They run here, and call the program in its own sandbox.

What the program returns arrives as plain data, so that it cannot bring along a comparison that is always true; and no
code of the program runs in this process, so that nothing but right answers passes the tests.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from .plain import NotPlain, TooLong, packed, receive, send, unpacked

_NAME = "tests"
_OWN = (NameError, ImportError, SyntaxError)  # mistakes of the tests, whatever the program answers


class Tests:
    """The test cases, and the pipes to the program and to the judge of both."""

    def __init__(self, calls: int, answers: int, verdict: int) -> None:
        self._calls, self._answers, self._verdict = calls, answers, verdict
        self.called = 0
        self._raised: Exception | None = None  # by the program, last, and its name there
        self._name = ""

    def run(self, source: str, entry_point: str | None, context: str) -> NoReturn:
        """Runs the tests; ends this process with their verdict."""
        self._ask_first()
        try:
            tree = ast.parse(source)
            names = [entry_point] if entry_point else _unknown(tree, context)
        except (SyntaxError, ValueError) as error:
            self.end(None, f"the tests do not run ({type(error).__name__})")
        if len(names) != 1:
            self.end(
                None, "the tests call nothing" if not names else "entry_point is needed: several names are unknown"
            )
        module = types.ModuleType(_NAME)
        sys.modules[_NAME] = module
        space, function = module.__dict__, self._function(names[0])
        # Often the beginning of a function, which is not Python yet; then the tests have to do without.
        with contextlib.suppress(SyntaxError):
            exec(compile(context, "context", "exec"), space)
        if names[0].isidentifier():
            space[names[0]] = function
        try:
            exec(compile(tree, _NAME, "exec"), space)
            if not self.called and callable(space.get("check")):
                space["check"](function)
            for name, value in list(space.items()):
                if (
                    name.startswith("test_")
                    and isinstance(value, types.FunctionType)
                    and not value.__code__.co_argcount
                ):
                    value()
        except BaseException as error:
            self._failed(error)
        if not self.called:
            self.end(None, "the tests call nothing")
        self.end(True, "passes")

    def end(self, correct: bool | None, reason: str) -> NoReturn:
        """Ends this process with a verdict; at once, so that no `except` of the tests can go on without it."""
        os.write(self._verdict, json.dumps([correct, reason]).encode())
        os._exit(0)

    def _failed(self, error: BaseException) -> NoReturn:
        if error is self._raised:
            self.end(False, f"raises {self._name}")
        if isinstance(error, _OWN) or not self.called:
            self.end(None, f"the tests do not run ({_shown(type(error).__name__)})")
        self.end(False, "wrong answer")

    def _ask_first(self) -> None:
        ready = self._receive()
        if "raises" in ready:
            self.end(False, f"does not run ({_shown(ready['raises'][0])})")

    def _receive(self) -> dict[str, Any]:
        try:
            answer = receive(self._answers)
        except EOFError:
            self.end(False, "ends early")
        except (TooLong, MemoryError):
            self.end(False, "answers too much")
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.end(False, "answers no data")
        return answer

    def _function(self, expression: str) -> Callable[..., Any]:
        def candidate(*arguments: Any, **named: Any) -> Any:
            return self._called(expression, arguments, named)

        candidate.__name__ = candidate.__qualname__ = expression
        return candidate

    def _called(self, expression: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self.called += 1
        try:
            send(self._calls, [expression, packed(arguments), packed(named)])
        except NotPlain as error:
            self.end(None, f"the tests pass what is not plain data ({error})")
        except BrokenPipeError:
            self.end(False, "ends early")
        answer = self._receive()
        if "missing" in answer:
            self.end(False, "the function is missing")
        if "too_long" in answer:
            self.end(False, "answers too much")
        if "not_plain" in answer:
            self.end(None, "answers what is not plain data")
        try:
            if "raises" in answer:
                kind, text = answer["raises"]
                self._raised, self._name = _exception(kind, text), _shown(kind)
            else:
                value = unpacked(answer["value"])
                if "changed" in answer:
                    first, second = unpacked(answer["changed"][0]), unpacked(answer["changed"][1])
                    _lay_over(list(arguments), list(first))
                    _lay_over([named[name] for name in named], [second[name] for name in named])
                return value
        except (NotPlain, KeyError, TypeError, ValueError, IndexError):
            self.end(False, "answers no data")
        assert self._raised is not None
        raise self._raised


def _lay_over(before: list[Any], after: list[Any]) -> None:
    """What a call has changed of its arguments, changed here too."""
    for old, new in zip(before, after, strict=False):
        if type(old) is not type(new) or old == new:
            continue
        if isinstance(old, (list, bytearray)):
            old[:] = new
        elif isinstance(old, (dict, set)):
            old.clear()
            old.update(new)


def _named(name: object) -> type[Exception]:
    """The builtin exception of that name; RuntimeError for others, and for those that would end a process."""
    found = getattr(builtins, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError


def _shown(name: object) -> str:
    """The name of a builtin exception; for all others one, as verdicts are counted by it."""
    found = getattr(builtins, name, None) if isinstance(name, str) else None
    return str(name) if isinstance(found, type) and issubclass(found, BaseException) else "an exception of its own"


def _exception(name: object, text: object) -> Exception:
    try:
        return _named(name)(str(text))
    except TypeError:  # of Unicode errors, which want more
        return RuntimeError(str(text))


def _unknown(tree: ast.Module, context: str) -> list[str]:
    """The names that the tests call and neither they, nor Python, nor the context define."""
    known = set(dir(builtins))
    called: dict[str, None] = {}
    try:
        trees = [tree, ast.parse(context)]
    except SyntaxError:
        trees = [tree]
    for node in (node for each in trees for node in ast.walk(each)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            known.add(node.id)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).split(".")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in known:
            called.setdefault(node.func.id)
    return list(called)
