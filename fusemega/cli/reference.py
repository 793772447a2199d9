"""The reference pages of run files and commands, written from the typed models and the command line themselves."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fusemega import cli
from fusemega.config import Section

_WRITTEN = "<!-- Written by tools/make_reference.py from the code: change it there. -->\n"
_TABLE_HEAD = ("| key | type | default | |", "|---|---|---|---|")
_BY_NAME = (
    "objective",
    "engine",
    "protocol",
    "rules",
    "tasks",
    "search",
    "prefill",
)  # sections whose `name` picks their keys
_CONSTRAINTS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def pages() -> dict[str, str]:
    """File name below docs/reference -> its text."""
    return {"config.md": config_page(), "cli.md": cli_page()}


def write(folder: Path) -> None:
    """Writes the pages into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def config_page() -> str:
    """Every key of every run file: type, default, meaning, constraints."""
    import fusemega.merge.methods  # noqa: F401  (registers them)
    from fusemega.align.project import ProjectRun
    from fusemega.losses.registry import objective_named, objective_names
    from fusemega.merge.method import find_method, method_names
    from fusemega.merge.run_file import MergeRun
    from fusemega.prune.run_file import SEARCHES, PruneEvalRun, PruneRun
    from fusemega.recipes.fusechat3 import FuseChat3Recipe
    from fusemega.recipes.fuserl import FuseRLRecipe
    from fusemega.recipes.fusion import FusionRecipe
    from fusemega.recipes.mutual_settings import MutualTaughtRecipe
    from fusemega.recipes.wrpo import WRPORecipe
    from fusemega.reward.judge import JudgeRun
    from fusemega.reward.rule_set import RULES
    from fusemega.reward.rules import RulesRun
    from fusemega.reward.verify import VerifyRun
    from fusemega.sampling.engines import ENGINES
    from fusemega.sampling.run_file import SampleRun
    from fusemega.scoring.evaluate import EvalRun
    from fusemega.scoring.rewards import ScoreRun
    from fusemega.scoring.teach import TeachRun
    from fusemega.selection.protocol import protocol_named, protocol_names
    from fusemega.selection.run_file import SelectRun
    from fusemega.switch.prefill import PREFILLS
    from fusemega.switch.run_file import SwitchRun
    from fusemega.switch.serve import SwitchServeRun
    from fusemega.tasks.run_file import TasksRun
    from fusemega.tasks.task import task_named, task_names
    from fusemega.training.run_file import TrainRun

    runs: dict[str, type[Section]] = {
        "train": TrainRun,
        "teach": TeachRun,
        "project": ProjectRun,
        "eval": EvalRun,
        "score": ScoreRun,
        "sample": SampleRun,
        "verify": VerifyRun,
        "judge": JudgeRun,
        "rules": RulesRun,
        "select": SelectRun,
        "tasks": TasksRun,
        "switch": SwitchRun,
        "switch serve": SwitchServeRun,
        "prune search": PruneRun,
        "prune eval": PruneEvalRun,
        "merge": MergeRun,
        "run": FusionRecipe,
        "run` with `recipe: fusechat3": FuseChat3Recipe,
        "run` with `recipe: wrpo": WRPORecipe,
        "run` with `recipe: fuserl": FuseRLRecipe,
        "run` with `recipe: mutual_taught": MutualTaughtRecipe,
    }
    lines = [
        "# Run files\n",
        _WRITTEN,
        "YAML, read by the commands below (`run`: recipes). Any value can be replaced on the command line, as in",
        "`optimizer.lr=1e-5`, and `${section.key}` stands for another. Keys that are not listed here are refused, and",
        "so is a key that occurs twice.\n",
    ]
    sections: dict[type[Section], str] = {}
    for verb, run in runs.items():
        for name, field in run.model_fields.items():
            section = _section(field.annotation)
            if section is not None:
                _name(sections, section, name, verb.rpartition(" ")[2])
        lines += [f"## `fusemega {verb}`\n", *_table(run, described=sections)]
    for section in list(sections):  # and the sections inside them
        for name, field in section.model_fields.items():
            inner = _section(field.annotation)
            if inner is not None:
                _name(sections, inner, name, sections[section])
    for section, name in sections.items():
        if name in _BY_NAME:
            continue
        lines += [f"## `{name}`\n", f"{_first_paragraph(section)}\n", *_table(section)]
    lines += ["## `objective`\n", "`name` picks the objective; the other keys are its own.\n"]
    own: dict[type[Section], str] = {}
    for name in objective_names():
        objective = objective_named(name)
        for key, field in objective.Settings.model_fields.items():
            section = _section(field.annotation)
            if section is not None and section not in sections:
                own.setdefault(section, key)
        settings = _table(objective.Settings, without="name", described=sections)
        has_any = len(objective.Settings.model_fields) > 1
        lines += [f"### `{name}`\n", f"{_first_paragraph(objective)}\n", *(settings if has_any else ["No settings.\n"])]
    for section, name in own.items():
        lines += [f"### `{name}`\n", f"{_first_paragraph(section)}\n", *_table(section)]
    lines += ["## `engine`\n", "`name` picks the engine; the other keys are its own.\n"]
    for name, engine in ENGINES.items():
        lines += [f"### `{name}`\n", f"{_first_paragraph(engine)}\n", *_table(engine, without="name")]
    lines += ["## `search`\n", "`name` picks the search; the other keys are its own.\n"]
    for name, searching in SEARCHES.items():
        lines += [f"### `{name}`\n", f"{_first_paragraph(searching)}\n", *_table(searching, without="name")]
    lines += ["## `prefill`\n", "`name` picks the source of hidden states; the other keys are its own.\n"]
    for name, prefill in PREFILLS.items():
        lines += [f"### `{name}`\n", f"{_first_paragraph(prefill)}\n", *_table(prefill, without="name")]
    lines += ["## `rules`\n", "`name` picks the rule; the other keys are its own.\n"]
    for name, each in sorted(RULES.items()):
        lines += [f"### `{name}`\n", f"{_first_paragraph(each)}\n", *_table(each, without="name")]
    lines += ["## `protocol`\n", "`name` picks the protocol; the other keys are its own.\n"]
    for name in protocol_names():
        protocol = protocol_named(name)
        lines += [f"### `{name}`\n", f"{_first_paragraph(protocol)}\n", *_table(protocol.Settings, without="name")]
    lines += ["## `tasks`\n", "`name` picks the task; the other keys are its own.\n"]
    further: dict[type[Section], str] = {}
    for name in task_names():
        task = task_named(name).Settings
        for key, field in task.model_fields.items():
            section = _section(field.annotation)
            if section is not None and section not in sections:
                further.setdefault(section, key)
        lines += [f"### `{name}`\n", f"{_first_paragraph(task)}\n", *_table(task, without="name", described=sections)]
    for section, name in further.items():
        lines += [f"### `{name}`\n", f"{_first_paragraph(section)}\n", *_table(section)]
    lines += ["## `merge_method`\n", "The keys of `parameters`, of a merge and of each of its models.\n"]
    for name in method_names():
        method = find_method(name)
        rows = [row for settings in (method.Settings, method.ModelSettings) for row in _table(settings)[2:] if row]
        lines += [f"### `{name}`\n", *([*_TABLE_HEAD, *rows, ""] if rows else ["No settings.\n"])]
    return "\n".join(lines).rstrip() + "\n"


def _name(sections: dict[type[Section], str], section: type[Section], name: str, of: str) -> None:
    """Gives a section its heading: its key, or where another section has that heading, also where the key stands."""
    from fusemega.selection.protocol import ProtocolSettings

    name = "protocol" if issubclass(section, ProtocolSettings) else name
    taken = name in sections.values() and name not in _BY_NAME
    sections.setdefault(section, f"{name} of {of}" if taken else name)


def cli_page() -> str:
    """Every command with its arguments and options."""
    lines = ["# Commands\n", _WRITTEN]
    lines += [
        "Exit status: 0; 2 for a mistake that the user can correct, with one line on stderr; 1 for any other failure.\n"
    ]
    for name in cli.COMMANDS:
        lines += _command(f"fusemega {name}", _asked(name).commands[name])
    for name in cli.GROUPS:
        group = _asked(name).commands[name]
        for verb, command in group.commands.items():
            lines += _command(f"fusemega {name} {verb}", command)
    return "\n".join(lines).rstrip() + "\n"


def _asked(name: str) -> Any:
    return typer.main.get_command(cli.build_app(name))


def _command(title: str, command: Any) -> list[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option" and param.name != "help"]
    usage = " ".join([title, *(_metavar(param) for param in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## `{title}`\n", f"    {usage}\n", *_reflowed(command.help or "")]
    rows = [(f"`{_metavar(param)}`", "", param.help or "") for param in arguments if param.help]
    for param in options:
        default = "" if param.default in (None, False) else f"`{param.default}`"
        rows.append((", ".join(f"`{name}`" for name in param.opts), default, param.help or ""))
    if rows:
        lines += ["| | default | |", "|---|---|---|"]
        lines += [f"| {name} | {default} | {_cell(text)} |" for name, default, text in rows] + [""]
    return lines


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.rstrip("_").upper())


def _reflowed(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        yield " ".join(paragraph.split()) + "\n"


def _table(model: type[Section], without: str = "", described: Mapping[type[Section], str] | None = None) -> list[str]:
    """The keys of a section; `described` has the headings of sections that are known under another key's name."""
    lines = [*_TABLE_HEAD]
    for name, field in model.model_fields.items():
        if name == without:
            continue
        shown = field.alias or name
        section = _section(field.annotation)
        limits = " and ".join(f"{_CONSTRAINTS[key]} {value:g}" for key, value in _limits(field))
        heading = (described or {}).get(section, name) if section else ""
        link = f"see [`{heading}`](#{heading.replace(' ', '-')})" if section else ""
        meaning = "; ".join(filter(None, [field.description, link, limits]))
        several = "list of sections" if get_origin(field.annotation) is list else "section"
        kind = several if section is not None else _type(field.annotation)
        lines.append(f"| `{shown}` | {_cell(kind)} | {_default(field, section)} | {_cell(meaning)} |")
    rules = [" ".join(doc.split()) for doc in _rules(model)]
    return [*lines, "", *(f"{rule}\n" for rule in rules)]


def _limits(field: FieldInfo) -> Iterator[tuple[str, float]]:
    for constraint in field.metadata:
        for key in _CONSTRAINTS:
            if hasattr(constraint, key):
                yield key, getattr(constraint, key)


def _rules(model: type[Section]) -> list[str]:
    """What the model checks of several keys together: the docstrings of its validators."""
    validators = model.__pydantic_decorators__.model_validators.values()
    return [validator.func.__doc__ or "" for validator in validators]


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return "required"
    if section is not None and field.default is not None:
        return "as below"
    return f"`{json.dumps(field.default)}`"


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)} {_type(parts[0])}s"
    if origin is dict:
        return "section"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names[annotation]


def _section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((hit for part in get_args(annotation) if (hit := _section(part))), None)


def _first_paragraph(described: type) -> str:
    return " ".join((described.__doc__ or "").strip().split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
