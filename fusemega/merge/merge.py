"""A merge from run file to folder: open, plan, execute, report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusemega.checkpoint.megatron_folder import RunCheckpoint, is_megatron_folder, open_megatron
from fusemega.errors import UserError
from fusemega.files.integrity import check_contents, file_hash, recorded_hashes, write_integrity
from fusemega.files.lock import locked
from fusemega.files.output import check_room, disk_errors, publish, refuse_existing
from fusemega.files.owned import drop_scratch, is_scratch, mark_scratch, scratch_of
from fusemega.hf.adapter import CONFIG, WEIGHTS, merge_adapter, split_name
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.hf.loadable import settle, stop_ids
from fusemega.hf.proof import check_written
from fusemega.hf.ranges import RangeWriter
from fusemega.hf.safetensors_writer import write_index
from fusemega.hf.side_files import copy_side_files, side_files, write_config, write_template
from fusemega.merge.execute import Progress, execute
from fusemega.merge.journal import JOURNAL, Journal
from fusemega.merge.plan import MergePlan, plan_merge
from fusemega.merge.rounding import of_models, warnings
from fusemega.merge.run_file import MergeRun
from fusemega.merge.vocabulary import extend_tokenizer
from fusemega.runtime.console import say, warn
from fusemega.runtime.workers import WorkerLost, default_workers

REPORT, PAGE = "merge_report.json", "merge_report.html"


@dataclass(frozen=True)
class Options:
    """How a merge is executed; no option changes a bit of its result.

    Attributes:
        workers: processes; None: one for each core, at most 8.
        block_elements: approximate number of elements in a block; None: what fits near the caches.
        resume: continue an interrupted merge.
    """

    workers: int | None = None
    block_elements: int | None = None
    resume: bool = False


@contextmanager
def opened(run: MergeRun, out: Path, source: str, notes: Sequence[str] = ()) -> Iterator[MergePlan]:
    """The plan of a run. Megatron folders among the models, and bases with adapters (BASE+ADAPTER), are written beside
    `out` as Hugging Face folders for as long as the block runs.

    Raises:
        UserError: see `plan_merge`.
    """
    names = dict.fromkeys([*([run.base_model] if run.base_model else []), *(entry.model for entry in run.models)])
    pairs = {name: split_name(name) for name in names}
    paths = {name: resolve(pair[0] if pair else name) for name, pair in pairs.items()}
    adapters = {name: resolve(pair[1]) for name, pair in pairs.items() if pair}
    scratch = Path(os.path.realpath(out)).with_name(f".{out.name}.exported")
    megatron = [name for name, path in paths.items() if is_megatron_folder(path)]
    with ExitStack() as held:
        if megatron or adapters:
            held.enter_context(locked(scratch))
            mark_scratch(scratch)
        try:
            for name in megatron:
                paths[name] = _exported(paths[name], scratch)
            for name, adapter in adapters.items():
                paths[name] = _with_adapter(paths[name], adapter, scratch)
            plan = plan_merge(run, paths, source, notes)
            try:
                yield plan
            finally:
                plan.close()
        except (Exception, GeneratorExit):
            _drop(scratch, out)
            raise
        _drop(scratch, out)


def _drop(scratch: Path, out: Path) -> None:
    """Deletes exported folders, unless an interrupted merge can be resumed from these very files: a dry run of it, or
    one with a mistyped setting, leaves them."""
    if not scratch_of(out).exists():
        drop_scratch(scratch)


def _exported(source: Path, scratch: Path) -> Path:
    """A Megatron folder as a Hugging Face folder below `scratch`; kept from an interrupted merge if it is there."""
    import torch

    from fusemega.convert.convert import export_megatron

    opened = open_megatron(source)
    out = scratch / opened.content_hash
    if out.is_dir():
        check_contents(out)
    else:
        # A run's main parameters are not rounded before they are merged.
        export_megatron(source, out, dtype=torch.float32 if isinstance(opened, RunCheckpoint) else None)
    return out


def _with_adapter(base: Path, adapter: Path, scratch: Path) -> Path:
    """A base with an adapter merged into it, below `scratch`, under a name made from the content of both."""
    content = hashlib.blake2b(HFFolder(base).content_hash().encode(), digest_size=16)
    for folder, names in ((base, side_files(base)), (adapter, [*side_files(adapter), CONFIG, WEIGHTS])):
        hashes = [(name, file_hash(folder / name)) for name in names if (folder / name).is_file()]
        content.update(json.dumps(hashes).encode())  # of the small files too: the merge may carry them
    out = scratch / content.hexdigest()
    if out.is_dir():
        check_contents(out)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        merge_adapter(base, adapter, out)
    return out


def merge(
    plan: MergePlan, out: Path, options: Options, *, progress: Progress, page: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    """Executes a plan; the folder `out` appears complete or not at all.

    What an interrupted merge has written is kept beside `out` as `.NAME.incomplete`, for `options.resume`, also if only
    one of its processes was killed. After an error it is removed.

    Args:
        plan: a plan from `opened`.
        out: absent, or an empty folder.
        options: how it is executed.
        progress: gets the number of elements written, first that of an interrupted merge.
        page: report -> the HTML page that is written beside it.

    Returns:
        The report, as in merge_report.json.

    Raises:
        UserError: `out` is not empty, the disk is too small, a source is damaged or holds NaN or infinities.
    """
    with locked(out):
        refuse_existing(out)
        for folder in plan.folders:
            check_written(folder)
        return _locked_merge(plan, Path(os.path.realpath(out)), options, progress, page)


def _locked_merge(
    plan: MergePlan, out: Path, options: Options, progress: Progress, page: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    partial = scratch_of(out)
    resume = options.resume and (partial / JOURNAL).is_file() and not partial.is_symlink()
    if os.path.lexists(partial) and not (is_scratch(partial) or (partial / JOURNAL).is_file()):
        raise UserError(f"{partial}: exists and is not an interrupted merge; move it away")
    if (partial / JOURNAL).is_file() and not resume:
        raise UserError(f"{partial}: left by an interrupted merge; continue it with --resume, or delete it")
    if not resume:
        with disk_errors(out):
            drop_scratch(partial)
            partial.mkdir(parents=True)
            try:
                check_room(out, partial, plan.output_bytes)
            except UserError:
                partial.rmdir()
                raise
    with ExitStack() as opened_files:
        try:
            with disk_errors(out):
                journal = opened_files.enter_context(closing(Journal(partial, plan, resume)))
                files = RangeWriter(partial, plan.shards, resume=bool(journal.done))
                writer = opened_files.enter_context(closing(files))
        except Exception:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            with disk_errors(out):
                return _merge(plan, partial, out, writer, journal, options, progress, page)
        except WorkerLost as error:
            raise WorkerLost(f"{out}: {error}; --resume continues from what is finished") from None
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _merge(
    plan: MergePlan,
    partial: Path,
    out: Path,
    writer: RangeWriter,
    journal: Journal,
    options: Options,
    progress: Progress,
    page: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    rows = execute(
        plan,
        writer,
        journal,
        workers=options.workers or default_workers(),
        block_elements=plan.block_elements(options.block_elements),
        progress=progress,
    )
    report = _report(plan, rows)
    for note in report["notes"][len(plan.notes) :]:
        warn(note)
    _finish(plan, partial, report, page)
    if plan.run.output_format == "megatron":
        publish(_imported(partial), out)
        shutil.rmtree(partial)
    else:
        write_integrity(partial, leave_out=[JOURNAL])
        publish(partial, out)
        (out / JOURNAL).unlink()  # only now: publishing waits for the disk, and a resume needs the journal until then
    return report


def _imported(merged: Path) -> Path:
    """The merged folder as a Megatron folder, inside it."""
    from fusemega.convert.convert import import_hf

    out = merged / "megatron"
    shutil.rmtree(out, ignore_errors=True)  # a merge that was interrupted in here has left it
    import_hf(merged, out)
    for name in (REPORT, PAGE):
        shutil.copyfile(merged / name, out / name)
    write_integrity(out, recorded_hashes(out))  # now with report and page
    return out


def _finish(plan: MergePlan, partial: Path, report: dict[str, Any], page: Callable[[dict[str, Any]], str]) -> None:
    """Writes the small files beside the weights."""
    write_index(partial, plan.shards)
    copy_side_files(plan.folders[plan.vocabulary.donor].path, partial)
    extend_tokenizer(partial, plan.vocabulary.added)
    if plan.template is not None:
        write_template(partial, plan.template)
    write_config(partial, plan.config)
    for note in settle(partial, plan.folders[plan.vocabulary.donor].path, chats=True, ends=_common_ends(plan)):
        say(note)
    (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (partial / PAGE).write_text(page(report), encoding="utf-8")


def _common_ends(plan: MergePlan) -> set[int]:
    """The ids at which all models stop. In a union of vocabularies it is empty, because ids change: there, only the
    template's closing token counts."""
    if plan.run.vocabulary == "union":
        return set()
    return set.intersection(*(set(stop_ids(folder.path)) for folder in plan.models))


def _report(plan: MergePlan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that decides the result and nothing that does not: a resumed merge has the same report."""
    models = [str(folder.path) for folder in plan.models]
    rounding = of_models(models, rows)
    return {
        "method": plan.method.name,
        "base": str(plan.folders[0].path) if plan.has_base else None,
        "models": models,
        "run": plan.run.model_dump(mode="json"),
        "notes": [*plan.notes, *warnings(rounding)],
        "rounding": rounding,
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "tensors": rows,
    }
