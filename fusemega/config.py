"""Typed run files: YAML in, frozen pydantic models out, every mistake named by its key's path.

Each room declares its own section by subclassing `Section`; `load` reads a file, applies `a.b=c`
overrides and validates. Nothing here knows any particular section.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from fusemega.errors import UserError, choose, nearest
from fusemega.files.yaml_files import read_yaml_file
from fusemega.run_values import resolved, with_overrides

S = TypeVar("S", bound="Section")

# What pydantic puts into a key's path for the types of a union: `data.path.list[str]`.
_UNION_MEMBER = re.compile(r"(constrained-)?(str|int|float|bool)|(list|dict|literal)\[.*\]|function-after\[.*\]")


class Section(BaseModel):
    """One block of a run file: unknown keys are refused, and values cannot be changed afterwards.

    Nor does an empty text stand for a path (it would be the current folder), an infinity or `yes` for a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
            raise ValueError("expected a number or text, found a boolean; quote it if text is meant")
        return value


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with `a.b=c` overrides applied and `${section.key}` references resolved.

    Raises:
        UserError: missing file, malformed YAML (with line), not a mapping, malformed override, a reference to nothing.
    """
    values = read_yaml_file(path, "the run file")
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: a run file is a mapping of sections, found a {type(values).__name__}")
    return apply_overrides(values or {}, overrides, path)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], source: str | Path) -> dict[str, Any]:
    """`values` with `a.b=c` overrides applied and `${section.key}` references resolved.

    Raises:
        UserError: malformed override, or a reference to nothing; it names `source`.
    """
    laid_over = with_overrides(values, overrides)
    try:
        return resolved(laid_over)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def validate(model: type[S], data: dict[str, Any], source: str | Path) -> S:
    """`data` as a `model`, or one UserError that lists every mistake by key path after `source`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {mistakes(model, error)}") from None
    except UserError as error:  # of a section that is chosen by name, see `mistakes`
        raise UserError(f"{source}: {error}") from None


def mistakes(model: type[BaseModel], error: ValidationError, at: str = "") -> str:
    """Every mistake of `error` by key path, each path after `at`.

    A validator that picks a section's model by name raises it as a UserError; `validate` adds the file.
    """
    return "; ".join(at + _explain(model, item) for item in error.errors())


def choose_section(models: Mapping[str, type[S]], section: Mapping[str, Any], at: str) -> S:
    """The section of the model that `section["name"]` picks.

    Args:
        models: name -> model.
        section: what the run file has.
        at: its place in the run file, for messages, such as "engine.".

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    if "name" not in section:
        raise UserError(f"{at}name: required, and not given; allowed: {', '.join(sorted(models))}")
    model = models[choose(f"{at}name", str(section["name"]), models)]
    try:
        return model.model_validate(dict(section))
    except ValidationError as error:
        raise UserError(mistakes(model, error, at)) from None


def load(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """`read_yaml` then `validate`."""
    return validate(model, read_yaml(path, overrides), path)


def _explain(model: type[BaseModel], item: Any) -> str:
    path = [str(part) for part in item["loc"] if not _UNION_MEMBER.fullmatch(str(part))]
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
    """The section that the key path leads to, through Optional, list and dict annotations; None where it is not one."""
    current: type[BaseModel] | None = model
    in_mapping = False
    for part in path:
        if current is None:
            return None
        if isinstance(part, int) or in_mapping:  # an element of a list, or of a mapping of names to sections
            in_mapping = False
            continue
        field = current.model_fields.get(str(part))
        current = _first_section(field.annotation) if field else None
        in_mapping = field is not None and typing.get_origin(field.annotation) is dict
    return current


def _first_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((hit for arg in typing.get_args(annotation) if (hit := _first_section(arg))), None)
