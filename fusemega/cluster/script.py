"""The text of a job script: options for sbatch, then slurm/lib.sh as it is, then the body of slurm/train.sbatch or
slurm/stage.sbatch. So a script needs nothing but itself and the settings beside it, and the logic stands once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusemega import __version__
from fusemega.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
"""slurm/ of the repository, which the installed package carries."""

HELPER = "exclude.sbatch"
"""What the library submits; it is looked for beside the settings."""

_LIBRARY = "lib.sh"
_END = "END_OF_FUSEMEGA_FILE"
_BODY_BEGINS = "read_site\n"
"""The line of a template with which its body begins; before it, it looks for the library."""


@dataclass(frozen=True)
class Script:
    """What is in a job script.

    Attributes:
        template: `train` or `stage`: whose body it has.
        options: for sbatch, in lines of their own.
        command: the `fusemega launch` that made it.
        folder: absolute, where the site's settings are looked for, as `site.env`.
        work_dir: absolute, where the job runs: relative paths of the settings are relative to it.
        python: the interpreter, where the site's file names none; "": python3.
        ranks_per_node: of commands that run as several ranks. An exclusive node has all its GPUs, also where fewer were
            asked for.
        arguments: the template's; in front of those with which the script is submitted.
        writes: files that the script writes before anything else, for a script that goes alone.
    """

    template: str
    options: Sequence[str]
    command: str
    folder: Path
    work_dir: Path
    python: str
    ranks_per_node: int
    arguments: Sequence[str]
    writes: Mapping[Path, str] = field(default_factory=dict)

    def text(self) -> str:
        """The whole script.

        Raises:
            UserError: this installation has no templates.
        """
        head = [*self.options, quoted(f"--chdir={self.work_dir}")]
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in head)]
        lines += ["# shellcheck disable=SC2317  # functions that only traps call", "#"]
        lines += [f"# fusemega {__version__} wrote this script. The command was:"]
        lines += [f"#     {' '.join(self.command.split())}"]
        lines += ["set -uo pipefail", ""]
        for path, written in self.writes.items():
            lines += _writing(path, written)
        lines += [f"FUSEMEGA_SLURM={shlex.quote(str(self.folder))}", "unset FUSEMEGA_SITE"]
        lines.append(f"export NPROC_PER_NODE={self.ranks_per_node}")
        if self.python:
            lines.append(f"export PYTHON=${{PYTHON:-{shlex.quote(self.python)}}}")
        if self.arguments:
            lines.append(f'set -- {shlex.join(self.arguments)} "$@"')
        lines += [
            "",
            f"# --- slurm/{_LIBRARY} ---",
            template_text(_LIBRARY),
            f"# --- slurm/{self.template}.sbatch ---",
            "",
        ]
        return "\n".join(lines) + _body(f"{self.template}.sbatch")


def quoted(option: str) -> str:
    """An option as a line of a script gives it to sbatch."""
    return f'"{option}"' if " " in option else option


def _writing(path: Path, text: str) -> list[str]:
    """Lines of a script that put a file in its place as a whole: tasks of an array may do so at the same time."""
    if _END in text.splitlines():
        raise UserError(f"{path}: has a line {_END}, which ends it in a script")
    place, aside = shlex.quote(str(path)), f'{shlex.quote(f"{path}.")}"$SLURM_JOB_ID"'
    return [
        f"mkdir -p {shlex.quote(str(path.parent))} || exit 2",
        f"cat >{aside} <<'{_END}' || exit 2",
        text.rstrip("\n"),
        _END,
        f"mv {aside} {place} || exit 2",
        "",
    ]


def _body(name: str) -> str:
    before, line, after = template_text(name).partition(f"\n{_BODY_BEGINS}")
    if not line:
        raise UserError(
            f"{TEMPLATES / name}: has no line {_BODY_BEGINS.strip()!r}; it is of another version of fusemega"
        )
    return f"{_BODY_BEGINS}{after}"


def template_text(name: str) -> str:
    """A file of slurm/.

    Raises:
        UserError: this installation lacks it.
    """
    try:
        return (TEMPLATES / name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{TEMPLATES / name}: {error.strerror}: this installation of fusemega lacks its job scripts"
        ) from None
