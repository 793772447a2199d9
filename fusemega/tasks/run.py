"""All tasks of a run: checked first, then measured one after the other, and the results written at the end.

OUT/run.json      the settings of the last call; marks the folder as ours
OUT/TASK/         questions and answers (`answers.py`), judged.jsonl with what was found of each answer, further files
OUT/lm_eval/      see `lm_eval.py`
OUT/tasks.json    the results, when everything is done
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.files.output import check_writable, disk_errors, write_durably
from fusemega.runtime.console import say
from fusemega.sampling.engine import Engine
from fusemega.sampling.engines import TransformersSettings, open_engine
from fusemega.tasks import lm_eval, results
from fusemega.tasks.answers import answered, read_items
from fusemega.tasks.log_probs import LogProbTask
from fusemega.tasks.run_file import TasksRun
from fusemega.tasks.task import AnsweredBy, AnswerSettings, AnswerTask, Judged, Task, TaskItem, build_task

_JUDGED = "judged.jsonl"


def run_tasks(run: TasksRun, engine: Engine | None = None) -> dict[str, Any]:
    """Runs what is missing of all tasks, and writes `run.output_dir`/tasks.json.

    Args:
        run: the run file.
        engine: in place of the one that the run file names.

    Returns:
        The content of tasks.json.

    Raises:
        UserError: unusable data, engine, machine or output, before anything is asked.
        Missing: some questions got no answer; the others are recorded, and the next call goes on.
    """
    out = Path(run.output_dir)
    results.check_folder(out)
    check_writable(out)
    tasks = {label: build_task(settings) for label, settings in run.tasks.items()}
    items = {label: _checked(run, label, task) for label, task in tasks.items() if isinstance(task, AnswerTask)}
    if run.lm_eval is not None:
        lm_eval.check_installed()
    engine = open_engine(run.engine) if engine is None else engine
    found: dict[str, dict[str, Any]] = {}
    with locked(out), disk_errors(out):
        results.begin(out, run.model_dump(mode="json"))
        for label, task in tasks.items():
            if isinstance(task, LogProbTask):
                found[label] = _told(task, _log_probs(run, label, task), {})
        for label, (rows, data_hash) in items.items():
            task, sampling = tasks[label], _sampling(run, label)
            assert isinstance(task, AnswerTask)
            say(f"{label}: {len(rows)} rows")
            judged = _asked(run, label, task, rows, engine)
            found[label] = _told(task, judged, {"sampling": sampling.model_dump(mode="json"), "data_hash": data_hash})
        content: dict[str, Any] = {
            "generator": run.generator_name,
            "engine": dict(engine.identity),
            "tasks": {label: found[label] for label in run.tasks},
            "versions": results.versions(),
        }
        if run.lm_eval is not None:
            assert isinstance(run.engine, TransformersSettings)
            del engine  # its memory is lm_eval's now
            gc.collect()
            content["lm_eval"] = lm_eval.run_lm_eval(run.lm_eval, run.engine, content["engine"], out / "lm_eval")
        results.write(out, content)
    return content


def _checked(run: TasksRun, label: str, task: AnswerTask) -> tuple[list[TaskItem], str]:
    try:
        task.check(_sampling(run, label))
    except UserError as error:
        raise UserError(f"tasks.{label}: {error}") from None
    return read_items(task, task.settings.data, f"tasks.{label}.")


def _sampling(run: TasksRun, label: str) -> Any:
    settings = run.tasks[label]
    return settings.sampling if isinstance(settings, AnswerSettings) and settings.sampling else run.sampling


def _log_probs(run: TasksRun, label: str, task: LogProbTask) -> Judged:
    assert isinstance(run.engine, TransformersSettings)
    say(f"{label}: log-probabilities")
    try:
        judged = task.judged(task.scorer(run.engine).score(task.settings.data))
    except UserError as error:
        raise UserError(f"tasks.{label}: {error}") from None
    gc.collect()  # the model's memory is the engine's now
    return judged


def _asked(run: TasksRun, label: str, task: AnswerTask, rows: list[TaskItem], engine: Engine) -> Judged:
    folder = Path(run.output_dir) / label
    rows = answered(rows, folder, run.engine, engine, _sampling(run, label), run.generator_name)
    judged = task.judge(rows, AnsweredBy(run.generator_name, (folder / "responses.jsonl").stat().st_mtime))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged.rows)
    for name, content in {_JUDGED: lines, **judged.files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_durably(folder / name, content)
    return judged


def _told(task: Task, judged: Judged, more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": task.settings.name,
        "figures": judged.figures,
        "counts": judged.counts,
        "settings": task.settings.model_dump(mode="json", exclude={"sampling"}),
        **more,
    }
