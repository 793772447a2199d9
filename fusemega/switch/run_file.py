"""Run file of `fusemega switch`: one file for all of its steps but `serve`, each of which reads its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fusemega.checkpoint.open_model import ModelConfig
from fusemega.config import Section
from fusemega.reward.code import CodeLimits
from fusemega.reward.verify import MathsSettings
from fusemega.runtime.parallel import ParallelConfig
from fusemega.sampling.engine import SamplingSettings, unless_given
from fusemega.sampling.engines import EngineSettings, parse_engine
from fusemega.sampling.prompts import PromptsConfig
from fusemega.switch.modes import ModesConfig

TRAIN, CALIBRATION, TEST = "train", "calibration", "test"


class LabelSettings(Section):
    """How prompts are labelled."""

    sampling: SamplingSettings = Field(
        SamplingSettings(n=8), description="of each mode; n is how many responses a mode and prompt get, 8 if not given"
    )
    max_tokens_short: int | None = Field(
        None, ge=1, description="most tokens of a response in the short mode; default: sampling.max_tokens"
    )
    early_stop: int | None = Field(
        None,
        ge=2,
        description="after so many responses to a prompt that are all right or all wrong a mode is sampled no further: "
        "cheaper, and the pass rates near 0 and 1 are then over fewer; default: never",
    )
    unverifiable: Literal["error", "skip"] = Field(
        "error", description="prompts with neither answer nor tests are an error, or are left out and counted"
    )
    maths: MathsSettings = MathsSettings()
    code: CodeLimits = CodeLimits()
    workers: int | None = Field(
        None, ge=1, description="responses that are verified at the same time; default: one for each core, at most 8"
    )

    @field_validator("sampling", mode="before")
    @classmethod
    def _of_each_mode(cls, value: Any) -> Any:
        return unless_given(value, n=8)

    @model_validator(mode="after")
    def _stops_early(self) -> LabelSettings:
        """An early stop comes before the end."""
        if self.early_stop is not None and self.early_stop >= self.sampling.n:
            raise ValueError(f"early_stop: {self.early_stop}, and sampling.n is {self.sampling.n}; allowed: fewer")
        return self


class FeatureSettings(Section):
    """Which hidden states the switcher reads."""

    layer: Literal["final"] | int = Field(
        "final", description="final: after the final norm; a number: the stream after that layer, counted from 0"
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="last: at the last token of the prefill; mean: the mean over its tokens"
    )
    seq_length: int = Field(4096, ge=1, description="tokens of a row; a prompt that is longer is refused")
    micro_batch_size: int = Field(1, ge=1, le=1 << 16, description="rows of seq_length tokens in one forward pass")
    short_answers: bool = Field(
        False,
        description="also the log-probability of the first short answer to each prompt, for the baseline `perplexity`; "
        "after `label`",
    )

    @field_validator("layer")
    @classmethod
    def _counted(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 0:
            raise ValueError("layers are counted from 0")
        return value


class TrainSettings(Section):
    """The network and its training: the published loss; what the paper leaves open is this project's choice."""

    hidden_sizes: list[int] = Field([1024, 256], description="sizes of the hidden layers, GELU after each")
    dropout: float = Field(0.1, ge=0, lt=1, description="after each hidden layer")
    standardize: bool = Field(
        True, description="bring each feature to mean 0 and variance 1 over the training prompts first"
    )
    margin_weight: float = Field(1.0, ge=0, description="weight of the margin loss beside the squared error")
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0)
    batch_size: int = Field(64, ge=1, description="prompts in a step")
    max_epochs: int = Field(300, ge=1)
    patience: int = Field(30, ge=1, description="epochs without a better validation loss, after which it ends")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the training prompts that decides when to end")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="one training each; the best on validation is kept")
    calibrate: bool = Field(True, description="fit scale and shift of each mode's logit on the validation prompts")

    @field_validator("hidden_sizes")
    @classmethod
    def _sizes(cls, value: list[int]) -> list[int]:
        if any(size < 1 or size > 1 << 16 for size in value):
            raise ValueError("sizes are from 1 to 65536")
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("a seed occurs twice")
        return value


class BaselineSettings(Section):
    """What the switcher is compared with by `fusemega switch eval`."""

    text: bool = Field(True, description="a linear classifier of the prompt's words and word pairs, hashed")
    sentence_encoder: str | None = Field(
        None, description="folder or hub id of a text encoder; its mean vector with the same network"
    )
    perplexity: bool = Field(
        True, description="CAR: long where the short answer's perplexity is high; needs features.short_answers"
    )
    resamples: int = Field(1000, ge=100, le=100_000, description="bootstrap resamples of the bands")


class SwitchRun(Section):
    """A switcher between short and long reasoning, from prompts to a threshold."""

    output_dir: str = Field(description="folder of labels, features, the switcher and reports")
    model: ModelConfig
    modes: ModesConfig = ModesConfig()
    engine: SerializeAsAny[EngineSettings] | None = Field(
        None,
        description="label: where responses come from, as in `fusemega sample`; default: transformers, with model.load",
    )
    prompts: PromptsConfig = Field(description="prompts with `answer` or `tests`, to train on")
    calibration_prompts: PromptsConfig | None = Field(
        None, description="to pick the threshold on; default: the validation share of `prompts`"
    )
    test_prompts: PromptsConfig | None = Field(
        None, description="for `eval`; default: those that the threshold was picked on, which it then says"
    )
    labels: LabelSettings = LabelSettings()
    parallel: ParallelConfig = ParallelConfig()
    features: FeatureSettings = FeatureSettings()
    train: TrainSettings = TrainSettings()
    baselines: BaselineSettings = BaselineSettings()

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return parse_engine(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _rows_divide(self) -> SwitchRun:
        """features.seq_length must be a multiple of what the layout needs."""
        keys = ("features.seq_length", "features.micro_batch_size")
        self.parallel.check_rows(self.features.seq_length, self.features.micro_batch_size, keys)
        return self

    @property
    def sets(self) -> dict[str, PromptsConfig]:
        """Name -> prompts, of the sets that are given."""
        given = {TRAIN: self.prompts, CALIBRATION: self.calibration_prompts, TEST: self.test_prompts}
        return {name: prompts for name, prompts in given.items() if prompts is not None}

    @property
    def out(self) -> Path:
        """`output_dir`."""
        return Path(self.output_dir)

    def labels_file(self, name: str) -> Path:
        """The labels of a set."""
        return self.out / "labels" / f"{name}.jsonl"

    @property
    def features_store(self) -> Path:
        """The store of hidden states, of all sets."""
        return self.out / "features"

    @property
    def answers_store(self) -> Path:
        """The store of the short answers' log-probabilities, of all sets."""
        return self.out / "short_answers"

    @property
    def switcher(self) -> Path:
        """The trained switcher's folder."""
        return self.out / "switcher"
