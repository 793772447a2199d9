"""`fusemega train`: everything a run file names, opened, checked, put together, trained and exported."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusemega import __version__
from fusemega.checkpoint.megatron_folder import RunCheckpoint, describe_run
from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.json_files import read_json
from fusemega.files.lock import locked
from fusemega.files.output import check_writable, write_durably
from fusemega.hf.folder import HFFolder
from fusemega.hf.loadable import closing_id, settle
from fusemega.hf.rounding import LOST, unchanged
from fusemega.losses.registry import Objective, build_objective, check_data, objective_named
from fusemega.models.heads import HeadKind
from fusemega.monitoring.session import holds_more, note_stop, watched
from fusemega.passes.batches import check_groups, prepare_together
from fusemega.passes.frozen import FrozenModel, open_frozen
from fusemega.runtime.activity import EXPORT, LOADING, doing
from fusemega.runtime.console import phase, say, warn
from fusemega.runtime.parallel import environment_rank, initialize
from fusemega.runtime.precision import Kernels
from fusemega.runtime.together import on_main
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.balancing import coefficient
from fusemega.training.checkpoints import Checkpoints
from fusemega.training.export import check_export, remove_other_export, update_export
from fusemega.training.held_out import HeldOut
from fusemega.training.identity import content_of
from fusemega.training.metrics import Costs, Metrics
from fusemega.training.monitor import Monitor
from fusemega.training.profile import Profile
from fusemega.training.records import DONE_MARKER, JOB_FOLDER, RUN_RECORD, read_evaluations, read_metrics
from fusemega.training.reference_check import check_reference
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from fusemega.training.wandb_run import require_wandb

_SAMPLES_ASKED = 1000
"""How many samples `_closes_turns` looks at."""


@dataclass(frozen=True)
class Checked:
    """A run whose inputs were all opened and found to fit; nothing is allocated or written yet."""

    run: TrainRun
    source: ModelSource
    objective: Objective[Any]
    frozen: dict[str, ModelSource]

    @classmethod
    def of(cls, run: TrainRun, world_size: int) -> Checked:
        """Open and check everything a run names.

        Raises:
            UserError: a layout that does not divide, a damaged model folder, a store or a teacher that does not fit.
        """
        if run.training.wandb_project is not None:
            require_wandb()
        if run.training.profile is not None:
            run.training.profile.check_world(world_size)
        scores = objective_named(run.objective.name).wants == "score"
        heads: tuple[HeadKind, ...] = ("scalar",) if scores else ("vocabulary",)
        seed = run.training.seed if scores else None
        source = ModelSource(run.model, run.parallel, world_size, run.data.chat_template, heads, seed)
        source.note_length(run.data.seq_length)
        run.training.check_recompute(source.chunk_sizes)
        coefficient(run, source.architecture)  # called for its errors
        if run.training.share_prefix:
            source.check_sharing("training.share_prefix", run.data.seq_length)
        objective = build_objective(run.objective, source.tokenizer, source.vocab_size)
        frozen = {}
        for name, request in objective.frozen.items():
            frozen[name] = open_frozen(request.model, run.parallel, world_size, source, f"objective.{name}")
            frozen[name].note_length(run.data.seq_length)
            if run.training.share_prefix:
                frozen[name].check_sharing("training.share_prefix", run.data.seq_length)
        return cls(run, source, objective, frozen)

    def prepared(self, data: DataConfig) -> TokenizedDataset:
        """Text as samples for this run, read from the cache or tokenized into it. For one process.

        Raises:
            UserError: as `prepare`.
        """
        cache = cache_folder() / "data"
        return prepare(
            data,
            self.source.tokenizer,
            cache,
            vocab_size=self.source.vocab_size,
            progress=True,
            share_prefix=self.run.training.share_prefix,
        )

    def check_data(self, dataset: TokenizedDataset) -> None:
        """Refuses training data that the objective or the layout does not take.

        Raises:
            UserError: names the row.
        """
        check_data(self.objective, dataset)
        if dataset.is_grouped:
            check_groups(dataset, self.run.data.seq_length, self.run.parallel, self.run.training.share_prefix)

    def held_out(self, dataset: TokenizedDataset) -> Objective[Any] | None:
        """The objective for held-out groups of responses; None for text, whose log-probability is measured.

        Raises:
            UserError: names the row.
        """
        if self.objective.unit == "group" and dataset.is_grouped:
            assert self.run.evaluation is not None
            share = self.run.training.share_prefix
            check_groups(dataset, self.run.evaluation.data.seq_length, self.run.parallel, share)
            return self.objective.for_data(dataset)
        if self.objective.wants == "score":
            raise UserError(
                "evaluation.data: text, of which a model's log-probability is measured, and objective.name "
                f"{self.run.objective.name} trains a model that gives a score; allowed: groups of responses"
            )
        return None


def open_trainer(run: TrainRun, held: ExitStack | None = None) -> tuple[Trainer, Checked]:
    """Everything `train` does before its first step. Collective.

    Args:
        run: what to train.
        held: keeps the lock of the run's folder; None: it is not locked.

    Raises:
        UserError: bad input, before anything is allocated or written.
    """
    _, world_size, _ = environment_rank()
    checked = Checked.of(run, world_size)
    world = initialize(run.parallel, run.training.seed, run.monitoring.collective_timeout)
    output = Path(run.output_dir)
    on_main(world, lambda: _claim(output, held))
    if held is not None:
        held.enter_context(watched(output, run.monitoring, world, is_kept=(output / RUN_RECORD).exists))
        held.enter_context(doing(LOADING))
    if run.training.export_hf:
        on_main(world, lambda: check_export(output))
    tokenizer = checked.source.tokenizer
    vocab_size, share = checked.source.vocab_size, run.training.share_prefix
    dataset = prepare_together(run.data, tokenizer, cache_folder() / "data", vocab_size, world, share)
    checked.check_data(dataset)
    profiled = profile_of(run, dataset.num_units)
    if profiled is not None:
        on_main(world, profiled.check)
    data = run.batches(dataset, checked.objective, checked.source.pad_id, world, checked.source.unscored_id)
    held_out, scorer = None, None
    if run.evaluation is not None:
        held_out = prepare_together(run.evaluation.data, tokenizer, cache_folder() / "data", vocab_size, world, share)
        scorer = checked.held_out(held_out)
    gpt = checked.source.build(world, run.training.recompute())
    frozen = {
        name: FrozenModel.build(source, checked.objective.frozen[name].wants, gpt, world)
        for name, source in checked.frozen.items()
    }
    with phase("what the run is made from is hashed"):
        content = content_of(checked.source, checked.objective, dataset, held_out, world)
    chats = _closes_turns(tokenizer, dataset)
    describe = partial(
        describe_run,
        hf=checked.source.hf,
        config=gpt.hf_config,
        dtypes=checked.source.dtypes(),
        chats=chats,
        chat_template=None if run.data.chat_template is None else tokenizer.chat_template,
    )
    trainer = Trainer.create(run, world, gpt, checked.objective, data, frozen)
    scored = HeldOut(run.evaluation, held_out, str(content["held_out"]), scorer)
    checkpoints = Checkpoints(run, world, scored, content=content, describe=describe)
    # New callbacks are added here. Profiling comes first, to see the step alone; metrics come after the callbacks that
    # add to them, and before evaluation, which may take long.
    first = [] if profiled is None else [profiled]
    trainer.callbacks = [*first, Costs(), Monitor(run.monitoring), checkpoints, Metrics(), scored]
    checkpoints.resume(trainer)
    check_reference(trainer)
    # Last, because a run that is refused must leave nothing, nor its settings in the record of the run it would resume.
    on_main(world, lambda: _write_record(output, run, trainer.finished))
    return trainer, checked


def profile_of(run: TrainRun, num_samples: int) -> Profile | None:
    """The callback that `training.profile` asks for, with its iterations checked; None without that section.

    Raises:
        UserError: the run has fewer iterations.
    """
    section = run.training.profile
    if section is None:
        return None
    section.check_length(run.training.iterations(num_samples))
    return Profile(section, run.output_dir)


def train(run: TrainRun) -> int:
    """Run, or resume, a training run in this process and its peers.

    Returns:
        0; or the number of the signal that stopped the run, after a checkpoint, before its end.

    Raises:
        UserError: bad input, before anything is allocated or written; a loss that is not finite; a full disk.
    """
    with ExitStack() as held:
        return _train(run, held)


def _train(run: TrainRun, held: ExitStack) -> int:
    trainer, checked = open_trainer(run, held)
    if trainer.world.is_main:
        say(_summary(trainer, checked.source.kernels))
    if stopped := trainer.fit():
        note_stop()
        say(f"stopped after iteration {trainer.iteration}, with a checkpoint; the same command resumes from there")
        return stopped
    output = Path(run.output_dir)
    with doing(EXPORT):
        on_main(trainer.world, lambda: _finish(output, trainer, checked))
    return 0


def _finish(output: Path, trainer: Trainer, checked: Checked) -> None:
    """Writes what others look for in the folder of a finished run: the export, then the marker."""
    checkpoints, source = trainer.callback(Checkpoints), checked.source
    wanted = checkpoints.result(trainer.iteration)
    finish = partial(_settle, trainer=trainer, checked=checked)
    dtype = trainer.run.training.export_dtype
    checkpoint = None if wanted is None else RunCheckpoint(wanted)
    weights = str(checkpoints.content["model"]) if checkpoint is None else checkpoint.content_hash
    if trainer.run.data.chat_template is not None:  # the export carries it
        weights += f" {source.tokenizer.template_hash}"
    if trainer.run.training.export_hf:
        update_export(output, checkpoint or source.folder, weights, dtype, finish)
    else:
        remove_other_export(output, weights)
    write_durably(output / DONE_MARKER, f"{trainer.iteration}\n")


def _settle(made: Path, trainer: Trainer, checked: Checked) -> None:
    """Checks and corrects the export: users load what was trained, and it stops where it was taught to."""
    chats = _closes_turns(checked.source.tokenizer, trainer.data.dataset)
    for note in settle(made, checked.source.tokenizer, chats=chats):
        say(note)
    before = checked.source.folder
    same = unchanged(before, HFFolder(made)) if isinstance(before, HFFolder) else None
    if same is not None and same >= LOST:
        warn(
            f"{same:.1%} of the exported weights of the layers are as before the training, since their type rounds "
            "small updates away; training.export_dtype: fp32 keeps what was learned"
        )


def _closes_turns(tokenizer: Tokenizer, dataset: TokenizedDataset) -> bool:
    """Whether the first samples supervise the token that closes a turn."""
    closing = closing_id(tokenizer)
    some = (dataset[i] for i in range(min(len(dataset), _SAMPLES_ASKED)))
    return closing is not None and any(bool((sample.ids[sample.supervised] == closing).any()) for sample in some)


def _claim(output: Path, held: ExitStack | None) -> None:
    """Checks the run's folder and locks it, so that no other process writes it from here on."""
    check_output(output)
    if held is not None:
        held.enter_context(locked(output))
        check_output(output)  # again: another process may have written there before the lock was ours


def check_output(output: Path) -> None:
    """Refuses an unrelated folder, and a run's folder whose rows cannot be read.

    Raises:
        UserError: says what is in the way.
    """
    if output.exists() and (
        not output.is_dir() or (holds_more(output, JOB_FOLDER) and not (output / RUN_RECORD).is_file())
    ):
        raise UserError(f"{output}: exists and is not the folder of a training run; choose another output_dir")
    if (output / RUN_RECORD).exists() and not {"fusemega", "run"} <= read_json(output / RUN_RECORD).keys():
        raise UserError(f"{output / RUN_RECORD}: not the record of a training run; choose another output_dir")
    check_writable(output)
    read_metrics(output)
    read_evaluations(output)


def _write_record(output: Path, run: TrainRun, finished: bool) -> None:
    """Makes the run's folder and writes the resolved run file. Removes an earlier end's marker if more is to do."""
    try:
        if not finished:
            (output / DONE_MARKER).unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        record = {"fusemega": __version__, "run": run.model_dump(mode="json")}
        write_durably(output / RUN_RECORD, json.dumps(record, indent=1))
    except OSError as error:
        raise UserError(f"{output}: cannot write there: {error.strerror}") from None


def _summary(trainer: Trainer, kernels: Kernels) -> str:
    world, dataset = trainer.world, trainer.data.dataset
    layout = f"{world.layout} x DP {world.dp_size}"
    start = f"resuming after iteration {trainer.iteration}" if trainer.iteration else "starting"
    return f"{start} of {trainer.train_iters} | {layout} | {trainer.run.model.dtype}, {kernels} | {dataset.in_words()}"
