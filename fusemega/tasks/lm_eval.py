"""Tasks of the Language Model Evaluation Harness (`lm_eval`), on a Hugging Face folder, in a process of their own.

The package is an extra and is never imported here: its command runs as a child, whose output is kept in
OUT/lm_eval/log.txt. What it writes, results and samples, is beside that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import new_folder
from fusemega.runtime import lifeline
from fusemega.runtime.console import say
from fusemega.sampling.engines import TransformersSettings

_SETTINGS = "settings.json"
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_LAST_LINES = 3


class LmEvalSection(Section):
    """Options of `lm_eval run`, by its names; the model's are taken from `engine`."""

    tasks: list[str] = Field(
        min_length=1, description="names of tasks, as `lm_eval ls tasks` lists them, or of your own"
    )
    include_path: str | None = Field(None, description="folder with tasks of your own (YAML)")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question; default: the task's own")
    batch_size: int | Literal["auto"] = Field(1, description="requests that are computed together")
    limit: float | None = Field(None, gt=0, description="only so many rows of each task, or, below 1, such a part")
    apply_chat_template: bool = Field(False, description="ask through the chat template")
    device: str | None = Field(None, description="as torch calls it; default: lm_eval's choice")
    seed: int = Field(0, ge=0, description="seed of lm_eval")


def check_installed() -> None:
    """Refuses to begin where the package is missing.

    Raises:
        UserError: names the extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval: the package is not installed: pip install 'fusemega[lm-eval]'")


def run_lm_eval(
    section: LmEvalSection, engine: TransformersSettings, identity: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Runs the tasks, unless `out` has their results already.

    Args:
        identity: `Engine.identity`, which says which weights the results are of.
        out: folder for results, samples and the log; appears complete or not at all.

    Returns:
        lm_eval's `results`, `versions`, `n-samples` and `lm_eval_version`.

    Raises:
        UserError: it failed, with the last line that it said; `out` has results of another model or settings.
    """
    settings = {"lm_eval": section.model_dump(mode="json"), "engine": dict(identity)}
    if out.exists():
        _check_same(out, settings)
        say(f"lm_eval: {out} has the results already")
        return _results(out)
    with new_folder(out) as place:
        (place / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        say(f"lm_eval: {', '.join(section.tasks)}")
        with (place / "log.txt").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(
                _command(section, engine, place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                preexec_fn=_dies_with_us(),
            )
            try:
                status = child.wait()
            except BaseException:
                child.kill()
                child.wait()
                raise
        if status:
            said = (place / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"lm_eval: ended with status {status}: {' | '.join(said[-_LAST_LINES:]) or 'no output'}")
        _results(place)
    return _results(out)


def _dies_with_us() -> Any:
    parent = os.getpid()
    return lambda: lifeline.die_with(parent)


def _command(section: LmEvalSection, engine: TransformersSettings, place: Path) -> list[str]:
    model = f"pretrained={engine.load},dtype={_DTYPES[engine.dtype]}"
    if engine.trust_remote_code:
        model += ",trust_remote_code=True"
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model]
    words += ["--tasks", ",".join(section.tasks), "--batch_size", str(section.batch_size), "--seed", str(section.seed)]
    words += ["--output_path", str(place)]
    for name in ("include_path", "num_fewshot", "limit", "device"):
        value = getattr(section, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return [*words, "--log_samples", *(["--apply_chat_template"] if section.apply_chat_template else [])]


def _check_same(out: Path, settings: Mapping[str, Any]) -> None:
    if not (out / _SETTINGS).is_file() or read_json(out / _SETTINGS) != json.loads(json.dumps(settings)):
        raise UserError(f"{out}: has results of another model or other settings; choose another output_dir")


def _results(out: Path) -> dict[str, Any]:
    files = sorted(out.rglob("results_*.json"))
    if len(files) != 1:
        raise UserError(f"lm_eval: {out} has {len(files)} files of results, expected one: see {out / 'log.txt'}")
    found = read_json(files[0], finite=False)
    for name in ("results", "versions", "n-samples", "lm_eval_version"):
        if name not in found:
            raise UserError(f"{files[0]}: has no {name}; this release of lm_eval is not one that is understood")
    return {name: found[name] for name in ("results", "versions", "n-samples", "lm_eval_version")}
