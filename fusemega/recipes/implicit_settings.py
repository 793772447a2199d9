"""What the recipe files of FuseChat-3.0, WRPO and FuseRL have in common. `implicit.py` has the graph."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from fusemega.checkpoint.open_model import ModelConfig
from fusemega.config import Section, mistakes
from fusemega.errors import UserError, nearest
from fusemega.recipes.run_files import model_without_load
from fusemega.runtime.layout import ParallelConfig
from fusemega.sampling.engine import SamplingSettings
from fusemega.sampling.engines import EngineSettings, parse_engine
from fusemega.selection.run_file import DecontaminateConfig, DedupConfig
from fusemega.training.optimizer import OptimizerSection
from fusemega.training.run_file import TrainingSection

MODELS = ("target", "sft", "preference")
"""The models that are measured: before training, between, and after."""
OWN = "own"
"""Source of the target's own samples."""
_TAKEN = (*MODELS, OWN, "all")


class PromptFiles(Section):
    """The prompts. Files alone stand for `path`."""

    path: str | list[str] = Field(description="JSONL, parquet or another file of rows, or a folder; or a list of them")
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at an unusable row, or skip and count it")
    unknown_fields: Literal["error", "ignore"] = Field(
        "error", description="an unknown field is an error, or is left out and counted"
    )
    limit: int | None = Field(None, ge=1, description="use only this many rows, the first ones")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list) else value

    @property
    def paths(self) -> list[str]:
        """All of them."""
        return [self.path] if isinstance(self.path, str) else self.path


class SamplingOverrides(Section):
    """Settings of `sampling` that differ from the recipe's."""

    n: int | None = Field(None, description="responses to each prompt")
    temperature: float | None = Field(None, description="0 takes the most probable token each time")
    top_p: float | None = Field(None, description="draw from the fewest tokens that together have this probability")
    top_k: int | None = Field(None, description="draw from this many most probable tokens")
    repetition_penalty: float | None = Field(None, description="a larger one makes repeated tokens rarer")
    max_tokens: int | None = Field(None, description="most tokens of a response")
    seed: int | None = Field(None, description="the seed of a response depends on it, the prompt and the number")


class ResponseSource(Section):
    """A source: a model that answers, or answers that there are."""

    engine: SerializeAsAny[EngineSettings] | None = Field(None, description="as in a run file of `fusemega sample`")
    responses: str | None = Field(None, description="in place of engine: a file of responses, as `sample` writes them")
    sampling: SamplingOverrides = Field(SamplingOverrides(), description="what differs from the recipe's `sampling`")
    domains: list[str] | None = Field(None, description="domains whose prompts it answers; default: all")

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return parse_engine(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_of_both(self) -> ResponseSource:
        """Exactly one of engine and responses is given; responses that are there have no sampling."""
        if (self.engine is None) == (self.responses is None):
            raise ValueError("give exactly one of engine and responses")
        if self.responses is not None and self.sampling != SamplingOverrides():
            raise ValueError("responses: with a file, sampling has no effect; leave it out")
        return self


class DomainSection(Section):
    """One domain of the prompts."""

    n: int | None = Field(None, ge=1, description="responses of each source to a prompt; default: `sampling.n`")


class RewardModel(ModelConfig):
    """A reward model."""

    seq_length: int = Field(4096, ge=2, description="tokens that a prompt may have with a response")
    micro_batch_size: int = Field(1, ge=1, description="rows of seq_length tokens in one forward pass")
    parallel: ParallelConfig | None = Field(None, description="its layout; default: the recipe's")


class RewardSection(Section):
    """Who says which response is better: exactly one of the keys."""

    model: RewardModel | None = Field(None, description="a reward model: `fusemega score`")
    judge: dict[str, Any] | None = Field(
        None, description="a judge: as in a run file of `fusemega judge`, without data and output"
    )
    rules: list[dict[str, Any]] | None = Field(None, description="as in a run file of `fusemega rules`")

    @model_validator(mode="after")
    def _one_of_them(self) -> RewardSection:
        """Exactly one of model, judge and rules is given."""
        if [self.model, self.judge, self.rules].count(None) != 2:
            raise ValueError("give exactly one of model, judge and rules")
        return self


class TrainStage(Section):
    """One of the two trainings."""

    seq_length: int = Field(2048, ge=2, description="tokens in a row, as data.seq_length")
    max_length: int | None = Field(None, ge=2, description="rows of several responses: as data.max_length")
    truncation: Literal["keep_start", "keep_end", "drop"] = Field("keep_start", description="as data.truncation")
    objective: dict[str, Any] = Field({}, description="settings of the objective that differ from the recipe's")
    optimizer: OptimizerSection
    training: TrainingSection

    @model_validator(mode="after")
    def _exported(self) -> TrainStage:
        """`training.export_hf` must stay true: the exported folder is what the next stage reads."""
        if not self.training.export_hf:
            raise ValueError("training.export_hf: false, and the next stage reads that folder; leave it out")
        return self


class BestSection(Section):
    """When the held-out rows of the preference set are scored during training."""

    interval: int = Field(ge=1, description="iterations between evaluations")
    patience: int | None = Field(None, ge=1, description="stop after this many without a new lowest loss")
    keep_best: bool = Field(False, description="export the checkpoint of the lowest loss")


class MeasureSection(Section):
    """What is measured of the target, the model after SFT, and the model after preference training."""

    text: str | None = Field(None, description="JSONL of conversations or texts: bits per byte")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the preference set that is not trained on: accuracy on its pairs"
    )
    pairs: str | None = Field(None, description="JSONL of further pairs: the accuracy on them")
    training: BestSection | None = Field(None, description="score the held-out rows during preference training, too")
    tasks: dict[str, Any] | None = Field(
        None,
        description="as in a run file of `fusemega tasks`; no output_dir, and `engine` is transformers, without load",
    )
    seq_length: int = Field(2048, ge=2, description="tokens in a row")

    @field_validator("tasks")
    @classmethod
    def _own_model(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        engine = (value or {}).get("engine", {})
        if "load" in engine or engine.get("name", "transformers") != "transformers":
            raise ValueError("engine: each model is run in this process; leave load out, and name or give transformers")
        return value

    @model_validator(mode="after")
    def _rows_to_score(self) -> MeasureSection:
        """training needs held_out."""
        if self.training is not None and not self.held_out:
            raise ValueError("training: there are no held-out rows to score; give held_out")
        return self


class ImplicitRecipe(Section):
    """A recipe file of implicit fusion."""

    output_dir: str = Field(description="output folder")
    nproc: int = Field(1, ge=1, description="processes of the stages that train or score, on this machine")
    target: str = Field(description="the model that is trained: HF folder or hub id")
    model: dict[str, Any] = Field({}, description="section `model` of its run files, without `load`")
    parallel: ParallelConfig = ParallelConfig()
    prompts: PromptFiles
    domains: dict[str, DomainSection] = Field(
        {}, description="the domains of the prompts; default: the prompts are not told apart when they are sampled"
    )
    sources: dict[str, ResponseSource] = Field(min_length=1, description="name -> a model, or responses that there are")
    sampling: SamplingSettings = Field(SamplingSettings(), description="as in a run file of `fusemega sample`")
    keep_length: bool = Field(False, description="keep responses that were cut off at max_tokens")
    verify: dict[str, Any] | None = Field(
        None, description="as in a run file of `fusemega verify`, without data and output; default: nothing is verified"
    )
    reward: RewardSection
    seed: int = Field(42, ge=0, description="decides which prompts go to which set")
    dedup: DedupConfig | None = Field(None, description="as in a run file of `fusemega select`")
    decontaminate: DecontaminateConfig | None = Field(None, description="as in a run file of `fusemega select`")
    sft: TrainStage
    preference: TrainStage
    evaluation: MeasureSection = MeasureSection()

    @field_validator("model")
    @classmethod
    def _no_load(cls, value: dict[str, Any]) -> dict[str, Any]:
        return model_without_load(value, "load is `target`; leave it out here")

    @field_validator("sources", "domains")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in _TAKEN:
                raise ValueError(f"{name!r} names files: letters, digits, and . - _ ; not {', not '.join(_TAKEN)}")
        return value

    @model_validator(mode="after")
    def _domains_are_known(self) -> ImplicitRecipe:
        """domains of a source must be among `domains`, and each domain needs a source."""
        for name, source in self.sources.items():
            for domain in source.domains or []:
                if domain not in self.domains:
                    raise ValueError(
                        f"sources.{name}.domains: unknown name {domain!r}{nearest(domain, self.domains)}; allowed: "
                        f"{', '.join(self.domains) or 'none, because the recipe has no domains'}"
                    )
            if source.engine is not None:
                for domain in self.domains or [""]:
                    self.sampling_of(name, domain)
        for domain in self.domains:
            if all(source.domains is not None and domain not in source.domains for source in self.sources.values()):
                raise ValueError(f"domains.{domain}: no source answers its prompts")
        return self

    def sampling_of(self, source: str, domain: str) -> dict[str, Any]:
        """Section `sampling` of a source's run file for a domain: the source's own settings, the domain's, the
        recipe's."""
        n = self.domains[domain].n if domain else None
        return self.merged(self.sources[source].sampling, f"sources.{source}.", {} if n is None else {"n": n})

    def merged(self, own: SamplingOverrides, at: str, domain: dict[str, Any] | None = None) -> dict[str, Any]:
        """Section `sampling` with settings of a source, over those of a domain, over the recipe's.

        Raises:
            UserError: a wrong value; it names the key, after `at`.
        """
        values = self.sampling.model_dump(exclude_defaults=True) | (domain or {}) | own.model_dump(exclude_none=True)
        try:
            SamplingSettings.model_validate(values)
        except ValidationError as error:
            raise UserError(mistakes(SamplingSettings, error, f"{at}sampling.")) from None
        return values
