"""Typed run files: YAML in, frozen pydantic models out, every mistake named by its key's path.

Each room declares its own section by subclassing `Section`; `load` reads a file, applies `a.b=c`
overrides and validates. Nothing here knows any particular section.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from fusemega.errors import UserError, nearest

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """One block of a run file: unknown keys are refused, and values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with `a.b=c` overrides applied and `${...}` references resolved.

    Raises:
        UserError: missing file, malformed YAML (with line), not a mapping, malformed override.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the run file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        config: Any = OmegaConf.create(yaml.safe_load(text) or {})
        if not OmegaConf.is_dict(config):
            found = type(yaml.safe_load(text)).__name__
            raise UserError(f"{path}: a run file is a mapping of sections, found a {found}")
        return _overridden(config, overrides)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: malformed YAML: {getattr(error, 'problem', error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`read_yaml`'s overrides, for a mapping that comes from elsewhere.

    Raises:
        UserError: malformed override.
    """
    try:
        return _overridden(OmegaConf.create(data), overrides)
    except OmegaConfBaseException as error:
        raise UserError(f"override: {str(error).splitlines()[0]}") from None


def _overridden(config: Any, overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise UserError(f"override {override!r}: expected key=value, such as training.lr=1e-5")
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def validate(model: type[S], data: dict[str, Any], source: str | Path) -> S:
    """`data` as a `model`, or one UserError that lists every mistake by key path."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, item) for item in error.errors()]
        raise UserError(f"{source}: " + "; ".join(lines)) from None


def load(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """`read_yaml` then `validate`."""
    return validate(model, read_yaml(path, overrides), path)


def _explain(model: type[BaseModel], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path) or "(top level)"
    if item["type"] == "extra_forbidden":
        section = _section_at(model, item["loc"][:-1])
        names = list(section.model_fields) if section else []
        return f"{key}: unknown key{nearest(path[-1], names)}; allowed here: {', '.join(names)}"
    if item["type"] == "missing":
        return f"{key}: required, and not given"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "literal_error":
        allowed = str(item.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: found {item['input']!r}{nearest(item['input'], allowed)}; allowed: {', '.join(allowed)}"
    found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
    return f"{key}: {message}{found}"


def _section_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel] | None:
    """The section that the key path leads to, through Optional and list annotations; None where it is not one."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return None
        if isinstance(part, int):
            continue
        field = current.model_fields.get(str(part))
        current = _first_section(field.annotation) if field else None
    return current


def _first_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((hit for arg in typing.get_args(annotation) if (hit := _first_section(arg))), None)
