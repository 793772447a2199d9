"""The recipe file of Mutual-Taught. `mutual_taught.py` has the graph."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fusemega.config import Section
from fusemega.recipes.implicit_settings import PromptFiles, RewardModel, TrainStage
from fusemega.recipes.run_files import model_without_load
from fusemega.runtime.layout import ParallelConfig
from fusemega.sampling.engine import SamplingSettings, unless_given
from fusemega.sampling.engines import EngineSettings, TransformersSettings, parse_engine

_SAMPLING: dict[str, Any] = {"n": 5, "temperature": 0.8, "top_p": 0.95, "max_tokens": 2048}
POLICY = "(the policy)"  # in place of engine.load or engine.model, until a stage says which policy it samples from


class SplitSection(Section):
    """How the prompts are divided. No prompt is in two portions."""

    selection: int = Field(2000, ge=1, description="prompts on which the checkpoints of every iteration are compared")
    policy: int | None = Field(
        None, ge=1, description="prompts of each policy's portion; default: portions without a number share the rest"
    )
    reward: int | None = Field(None, ge=1, description="prompts of each reward model's portion; default: likewise")


class BaseRewardModel(RewardModel):
    """The reward model r_0. Each M step trains it anew."""

    template: Literal["same", "own"] = Field(
        "same", description="same: its chat template has to write what the policy's does; own: it may be another one"
    )


class RewardMeasures(Section):
    """What the reward models are measured on, before and after each M step."""

    pairs: str | None = Field(None, description="JSONL of pairs: how often the chosen response has the higher reward")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the believed pseudo-pairs that no reward model is trained on"
    )


class MutualTaughtRecipe(Section):
    """A recipe file."""

    recipe: Literal["mutual_taught"] = Field("mutual_taught", description="the kind of recipe")
    output_dir: str = Field(description="output folder")
    nproc: int = Field(1, ge=1, description="processes of the stages that train or score, on this machine")
    target: str = Field(description="the policy pi_0, which is trained: HF folder or hub id")
    model: dict[str, Any] = Field({}, description="section `model` of the policy's run files, without `load`")
    parallel: ParallelConfig = ParallelConfig()
    reward_model: BaseRewardModel
    prompts: PromptFiles
    splits: SplitSection = SplitSection()
    seed: int = Field(42, ge=0, description="decides which prompts are in which portion, and which pairs are sampled")
    iterations: int = Field(2, ge=1, le=99, description="E steps: policies that may come")
    last_reward: bool = Field(
        False, description="an M step after the last E step, too; otherwise there is one less, as nothing would read it"
    )
    engine: SerializeAsAny[EngineSettings] = Field(
        TransformersSettings(load=POLICY),
        description="what samples: as in a run file of `fusemega sample`, without `load` and `model`, which are the "
        "policy. A server has to know each policy by the path of its folder when the recipe comes to it",
    )
    sampling: SamplingSettings = Field(
        SamplingSettings(**_SAMPLING),
        description="as in a run file of `fusemega sample`, but n 5, temperature 0.8, top_p 0.95 and max_tokens 2048 "
        "where not given; n is of the policy's portions, elsewhere it is 1",
    )
    keep_length: bool = Field(
        False,
        description="train on responses that were cut off at max_tokens, too; where policies are compared they "
        "always count",
    )
    tau: float = Field(
        0.6, ge=0, le=1, description="least win rate over the policy before with which a checkpoint is kept"
    )
    resamples: int = Field(1000, ge=1, le=1_000_000, description="draws of the bootstrap, for the win rates' bands")
    mix: float | None = Field(
        1.0, ge=0, description="ranked pairs for each pseudo-pair, the larger kind is sampled down; null: all of both"
    )
    policy: TrainStage
    reward: TrainStage
    evaluation: RewardMeasures = RewardMeasures()

    @field_validator("model")
    @classmethod
    def _no_load(cls, value: dict[str, Any]) -> dict[str, Any]:
        return model_without_load(value, "load is `target`; leave it out here")

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        key = "load" if value.get("name") == "transformers" else "model"
        if key in value:
            raise ValueError(f"{key} is the policy, which changes; leave it out here")
        return parse_engine({**value, key: POLICY})

    @field_validator("policy")
    @classmethod
    def _has_checkpoints(cls, value: TrainStage) -> TrainStage:
        if value.training.save_interval is None:
            raise ValueError("training.save_interval: required; the policies to choose from are these checkpoints")
        if value.training.keep_checkpoints is not None:
            raise ValueError("training.keep_checkpoints: every checkpoint may be the next policy; leave it out")
        return value

    @field_validator("sampling", mode="before")
    @classmethod
    def _keeps_defaults(cls, given: Any) -> Any:
        return unless_given(given, **_SAMPLING)

    @model_validator(mode="after")
    def _pairs_can_be_made(self) -> MutualTaughtRecipe:
        """sampling.n must be 2 or more: a pair has two responses of one policy."""
        if self.sampling.n < 2:
            raise ValueError("sampling.n: 1, and a pair has two responses of one policy; allowed: 2 or more")
        return self

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments of `portion_sizes`, without the number of prompts."""
        return {"policies": self.iterations, "rewards": self.reward_steps, **self.splits.model_dump()}

    @property
    def reward_steps(self) -> int:
        """How many M steps there are."""
        return self.iterations if self.last_reward else self.iterations - 1
