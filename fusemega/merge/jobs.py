"""Groups tensors into jobs: which are merged together, and with which settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from fusemega.config import Section, validate
from fusemega.errors import UserError, nearest
from fusemega.merge.method import Job, Method, TensorSpec
from fusemega.merge.run_file import MergeRun, ModelEntry
from fusemega.merge.settings import filters, fits, resolve

LAYER = re.compile(r".*\blayers\.(\d+)\.")


def plan_jobs(
    method: Method, run: MergeRun, entries: Sequence[ModelEntry], specs: Sequence[TensorSpec], layers: int, source: str
) -> list[Job]:
    """Resolves every setting of every tensor, and puts together the tensors that share statistics.

    Raises:
        UserError: an unknown setting, a value it cannot have, or a filter that fits no tensor.
    """
    _check_names(method, run, entries, source)
    _check_filters(run, entries, specs, source)
    each = [{**run.parameters, **entry.parameters} for entry in entries]

    @cache
    def validated(section: type[Section], where: str, values: tuple[tuple[str, Any], ...]) -> Section:
        return validate(section, dict(values), f"{source}: {where}")

    def resolved(section: type[Section], given: Mapping[str, Any], spec: TensorSpec, where: str) -> Section:
        layer = LAYER.match(spec.name)
        depth = 0.0 if layer is None else int(layer[1]) / (layers - 1) if layers > 1 else 1.0
        values = []
        for key in _keys(section):
            if given.get(key) is None:
                continue
            try:
                value = resolve(given[key], spec.name, depth)
            except ValueError as error:
                raise UserError(f"{source}: {where}.{key}: {error}") from None
            if value is not None:
                values.append((key, value))
        return validated(section, where, tuple(values))

    jobs: dict[str, Job] = {}
    for spec in specs:
        settings = resolved(method.Settings, run.parameters, spec, "parameters")
        models = [
            resolved(method.ModelSettings, given, spec, f"models.{number}.parameters")
            for number, given in enumerate(each)
        ]
        try:
            method.check(settings, models)
        except ValueError as error:
            raise UserError(f"{source}: parameters: {error} (tensor {spec.name})") from None
        group = method.group(spec.name, settings)
        before = jobs[group].tensors if group in jobs else ()
        jobs[group] = Job((*before, spec), settings, models, run.seed)
    return list(jobs.values())


def _keys(section: type[Section]) -> list[str]:
    """The names of a section's settings in a run file."""
    return [info.alias or name for name, info in section.model_fields.items()]


def _check_names(method: Method, run: MergeRun, entries: Sequence[ModelEntry], source: str) -> None:
    own, models = _keys(method.Settings), _keys(method.ModelSettings)
    places = [("parameters", run.parameters, [*own, *models])]
    places += [(f"models.{i}.parameters", entry.parameters, models) for i, entry in enumerate(entries)]
    for where, given, allowed in places:
        for key in given:
            if key not in allowed:
                names = ", ".join(allowed) or "none"
                raise UserError(
                    f"{source}: {where}.{key}: not a setting of {method.name}{nearest(key, allowed)}; allowed: {names}"
                )


def _check_filters(run: MergeRun, entries: Sequence[ModelEntry], specs: Sequence[TensorSpec], source: str) -> None:
    for given in [run.parameters, *(entry.parameters for entry in entries)]:
        for key, setting in given.items():
            for pattern in filters(setting):
                if not any(fits(pattern, spec.name) for spec in specs):
                    raise UserError(f"{source}: parameters.{key}: filter {pattern!r} fits no tensor of the model")
