"""The functions that a stage may call: those decorated with `@stage_function`, by `module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from fusemega.errors import UserError, nearest

F = TypeVar("F", bound=Callable[..., Any])

FUNCTIONS: dict[str, Callable[..., Any]] = {}
_IMPORTED = "fusemega.recipes."  # only modules of recipes are imported because a file names them


def stage_function(function: F) -> F:
    """Allows stages to call `function`. Its keyword arguments and what it returns are JSON-able."""
    FUNCTIONS[name_of(function)] = function
    return function


def name_of(function: Callable[..., Any]) -> str:
    """The name by which a stage calls the function, such as `fusemega.recipes.measures:measure`."""
    return f"{function.__module__}:{function.__qualname__}"


def find_function(name: str) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        UserError: no module of fusemega's recipes has it under `@stage_function`.
    """
    module = name.partition(":")[0]
    if name not in FUNCTIONS and module.startswith(_IMPORTED):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"function {name}: {error}") from None
    if name not in FUNCTIONS:
        allowed = "a function under @stage_function of a module in fusemega/recipes"
        raise UserError(f"function {name}: not known{nearest(name, FUNCTIONS)}; allowed: {allowed}")
    return FUNCTIONS[name]
