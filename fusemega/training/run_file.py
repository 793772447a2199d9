"""The typed run file of `fusemega train`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fusemega.checkpoint.open_model import ModelConfig
from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.losses.registry import ObjectiveSettings, objective_named, parse_objective
from fusemega.monitoring.settings import MonitoringSection
from fusemega.passes.batches import RowShape, TrainingData
from fusemega.passes.micro_batch import Fields
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World
from fusemega.scoring.evaluation import EvaluationSection
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.optimizer import OptimizerSection

# The fields of `training` that decide the loss curve: a resumed run must not change them.
IDENTITY_FIELDS = ("global_batch_size", "seed", "router_aux_loss_coef")
# The fields of `optimizer` that do not decide it.
FREE_OPTIMIZER_FIELDS = ("overlap_grad_reduce", "overlap_param_gather")


class ProfileSection(Section):
    """Iterations whose operations are recorded by torch.profiler, into output_dir/profile."""

    start: int = Field(ge=0, description="updates done when recording begins; the first few of a run are slower")
    stop: int = Field(ge=1, description="updates done when it ends; at most those of the run")
    ranks: list[int] = Field([0], min_length=1, description="processes that record")

    @model_validator(mode="after")
    def _in_order(self) -> ProfileSection:
        """start must be less than stop; ranks count from 0, each at most once."""
        if self.start >= self.stop:
            raise ValueError(f"start {self.start} is not below stop {self.stop}")
        if min(self.ranks) < 0:
            raise ValueError(f"ranks: {min(self.ranks)} is not a rank; they are counted from 0")
        if twice := [rank for rank in self.ranks if self.ranks.count(rank) > 1]:
            raise ValueError(f"ranks: {twice[0]} is listed twice")
        return self

    def check_world(self, world_size: int) -> None:
        """Refuses ranks that a world of this size lacks.

        Raises:
            UserError: names the rank.
        """
        if max(self.ranks) >= world_size:
            raise UserError(
                f"training.profile.ranks: there is no rank {max(self.ranks)} among {world_size} process(es); "
                f"allowed: 0 to {world_size - 1}"
            )

    def check_length(self, iterations: int) -> None:
        """Refuses iterations that a run of this length never comes to.

        Raises:
            UserError: says how many there are.
        """
        if self.stop > iterations:
            raise UserError(f"training.profile.stop: {self.stop} is more than the run's {iterations} iteration(s)")


class TrainingSection(Section):
    """Length, batch size, checkpoints, logging and export of a run."""

    train_iters: int | None = Field(None, ge=1, description="number of updates; give this or train_epochs")
    train_epochs: float | None = Field(None, gt=0, description="passes over the data, in place of train_iters")
    global_batch_size: int = Field(ge=1, description="samples (or groups of them) in one update, in every layout")
    micro_batch_size: int = Field(1, ge=1, le=1 << 16, description="rows of data.seq_length tokens in one forward pass")
    packing: bool = Field(
        True, description="fill rows with several samples of the global batch; false: one sample in each row"
    )
    share_prefix: bool = Field(
        False,
        description="lay the tokens that all responses of a group begin with (the prompt) into a row once; loss and "
        "gradient stay the same",
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="coefficient of the loss that balances experts, in transformers' scale; 0: none; default: that of "
        "the model's configuration if output_router_logits is true there, else 0",
    )
    seed: int = Field(1234, ge=0, description="seed of the order of the data and of the random state")
    log_interval: int = Field(1, ge=1, description="iterations between console lines; files get every iteration")
    save_interval: int | None = Field(None, ge=1, description="iterations between checkpoints; the last is saved too")
    keep_checkpoints: int | None = Field(
        None, ge=1, description="number of newest checkpoints to keep, besides the best one; default: all"
    )
    async_save: bool = Field(False, description="write checkpoints in the background while training continues")
    wandb_project: str | None = Field(None, description="also log to this project of Weights & Biases")
    export_hf: bool = Field(True, description="at the end, write output_dir/hf, a folder that transformers loads")
    export_dtype: Literal["source", "fp32", "bf16", "fp16"] = Field(
        "source",
        description="dtype of the weights in hf, converted from the optimizer's fp32 weights; source: the dtype "
        "of model.load; fp32 for a model that will be merged, because narrower dtypes round small "
        "updates away",
    )
    profile: ProfileSection | None = Field(None, description="iterations to profile; left out, nothing is recorded")
    recompute_granularity: Literal["selective", "full"] | None = Field(
        None,
        description="activations that backward computes again: selective (attention's core) or full (whole layers)",
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None,
        description="for full: uniform (all layers, in groups) or block (only the first layers of each pipeline "
        "stage, one by one)",
    )
    recompute_num_layers: int | None = Field(
        None, ge=1, description="for full: layers in a group (uniform), or number of layers (block)"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        """Exactly one of train_iters and train_epochs is given."""
        if (self.train_iters is None) == (self.train_epochs is None):
            raise ValueError("give exactly one of train_iters and train_epochs")
        return self

    @model_validator(mode="after")
    def _recompute_is_whole(self) -> TrainingSection:
        """recompute_granularity full needs recompute_method and recompute_num_layers; selective takes neither."""
        for name in ("recompute_method", "recompute_num_layers"):
            given = getattr(self, name) is not None
            if given and self.recompute_granularity != "full":
                raise ValueError(f"{name} has no effect without recompute_granularity: full; set that, or leave it out")
            if not given and self.recompute_granularity == "full":
                raise ValueError(f"recompute_granularity: full needs {name}")
        return self

    def recompute(self) -> dict[str, Any]:
        """TransformerConfig's fields about recomputation."""
        names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
        return {name: getattr(self, name) for name in names}

    def check_recompute(self, chunks: Iterable[int]) -> None:
        """Refuses groups of layers that do not divide the chunks of a model, or more layers than a chunk has.

        Args:
            chunks: how many layers each chunk has.

        Raises:
            UserError: names the number.

        Example:
            >>> groups = {"granularity": "full", "method": "uniform", "num_layers": 3}
            >>> settings = {f"recompute_{name}": value for name, value in groups.items()}
            >>> section = TrainingSection(train_iters=1, global_batch_size=1, **settings)
            >>> section.check_recompute([6, 3])
            >>> section.check_recompute([4])  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            fusemega.errors.UserError: training.recompute_num_layers: 3 with ... of 4 layers; allowed: 1, 2, 4
        """
        layers = self.recompute_num_layers
        if layers is None:
            return
        for count in sorted(set(chunks)):
            wrong = count % layers if self.recompute_method == "uniform" else layers > count
            if wrong:
                allowed = [n for n in range(1, count + 1) if self.recompute_method == "block" or count % n == 0]
                raise UserError(
                    f"training.recompute_num_layers: {layers} with recompute_method {self.recompute_method} does not "
                    f"suit a pipeline stage (or piece of one) of {count} layers; allowed: "
                    f"{', '.join(map(str, allowed))}"
                )

    def iterations(self, num_samples: int) -> int:
        """The number of updates for a data set of `num_samples`."""
        if self.train_iters is not None:
            return self.train_iters
        assert self.train_epochs is not None
        return math.ceil(num_samples * self.train_epochs / self.global_batch_size)


class TrainRun(Section):
    """One training run. `model.load` is trained by `objective` on `data`; everything is written below `output_dir`."""

    output_dir: str = Field(description="folder of the run: checkpoints, metrics, the exported model")
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    objective: SerializeAsAny[ObjectiveSettings] = Field(
        description="`name` selects the objective; its settings follow"
    )
    optimizer: OptimizerSection
    training: TrainingSection
    evaluation: EvaluationSection | None = Field(None, description="held-out text to score during training")
    monitoring: MonitoringSection = MonitoringSection()

    def batches(
        self, dataset: TokenizedDataset, fields: Fields, pad_id: int, world: World, unscored_id: int | None = None
    ) -> TrainingData:
        """The batches of this run from `dataset`, as rank `world` takes them.

        Args:
            fields: what the objective adds to a micro-batch.
            pad_id: token id of the padding.
            unscored_id: see `RowShape`.
        """
        training, unit = self.training, self.model.row_unit(self.parallel)
        shape = RowShape(
            self.data.seq_length,
            training.micro_batch_size,
            training.packing,
            pad_id,
            unit,
            unscored_id,
            training.share_prefix,
        )
        return TrainingData(dataset, fields, shape, training.global_batch_size, training.seed, world)

    @field_validator("objective", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return parse_objective(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _samples_are_whole(self) -> TrainRun:
        """context_parallel_size must be 1 for an objective that couples the tokens of a sample (chunk)."""
        size = self.parallel.context_parallel_size
        if size > 1 and not objective_named(self.objective.name).splits_samples:
            raise ValueError(
                f"objective.name {self.objective.name} sums over neighbouring tokens of a sample, and "
                f"parallel.context_parallel_size {size} gives them to several ranks; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _prefixes_are_of_groups(self) -> TrainRun:
        """training.share_prefix needs an objective that compares the responses to one prompt."""
        if self.training.share_prefix and objective_named(self.objective.name).unit != "group":
            raise ValueError(
                f"training.share_prefix has no effect with objective.name {self.objective.name}, whose rows are single "
                "texts; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _rows_divide(self) -> TrainRun:
        """data.seq_length, and its product with training.micro_batch_size, must be multiples of what context and
        sequence parallelism and FP8 need (also those of the evaluation)."""
        lengths = {"data.seq_length": self.data.seq_length}
        if self.evaluation is not None:
            lengths["evaluation.data.seq_length"] = self.evaluation.data.seq_length
        rows = self.training.micro_batch_size
        for key, length in lengths.items():
            keys = (key, "training.micro_batch_size")
            self.parallel.check_rows(length, rows, keys)
            self.model.check_row(length * rows, " x ".join(keys), self.parallel)
        return self
