"""WRPO (Yang et al., ICLR 2025, arXiv:2412.03187): SFT on the best responses of the sources, then a second sampling,
from the SFT model, and preference optimisation on the best of the sources and the best and worst of its own.

    fusemega run RECIPE.yaml [KEY=VALUE ...]
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fusemega.config import Section
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome
from fusemega.recipes.implicit import ImplicitWork
from fusemega.recipes.implicit_settings import OWN, ImplicitRecipe, SamplingOverrides
from fusemega.recipes.registry import Recipe
from fusemega.sampling.engines import EngineSettings, TransformersSettings, parse_engine
from fusemega.selection.protocols.wrpo import WRPOSelectionSettings

_SFT = "(the SFT model)"  # in place of engine.load, until the recipe's folder is known


class OwnSection(Section):
    """How the SFT model answers the prompts that are left."""

    engine: SerializeAsAny[EngineSettings] = Field(
        TransformersSettings(load=_SFT),
        description="as of a source; of transformers without `load`, which is the SFT model. A server has to serve "
        "OUTPUT_DIR/sft/hf when the recipe comes to it: start it then, and run the recipe again",
    )
    sampling: SamplingOverrides = Field(SamplingOverrides(), description="what differs from the recipe's `sampling`")

    @field_validator("engine", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("name") != "transformers":
            return parse_engine(value)
        if "load" in value:
            raise ValueError("load is the SFT model; leave it out here")
        return parse_engine({**value, "load": _SFT})


class WRPORecipe(ImplicitRecipe):
    """A recipe file."""

    recipe: Literal["wrpo"] = Field("wrpo", description="the kind of recipe")
    select: WRPOSelectionSettings = Field(
        WRPOSelectionSettings(), description="settings of the protocol wrpo, without target"
    )
    own: OwnSection = OwnSection()

    @model_validator(mode="after")
    def _target_is_own(self) -> WRPORecipe:
        """select.target is set by the recipe."""
        if self.select.target is not None:
            raise ValueError(f"select.target: the recipe sets it, to {OWN}; leave it out")
        self.merged(self.own.sampling, "own.")
        return self


class WRPOFusion(Recipe[WRPORecipe]):
    """`recipe: wrpo`."""

    Settings = WRPORecipe

    def graph(self, settings: WRPORecipe) -> Graph:
        """See `Recipe.graph`."""
        return _work(settings).steps.graph()

    def finish(self, settings: WRPORecipe, outcome: Outcome) -> list[str]:
        """See `Recipe.finish`."""
        sets = {f"sets of {name}": f"{settings.output_dir}/sets/{name}" for name in ("sources", OWN)}
        return _work(settings).summary(outcome, sets)


RECIPE = WRPOFusion()


def _work(recipe: WRPORecipe) -> ImplicitWork:
    work = ImplicitWork(recipe)
    groups = work.scored("sources", work.responses())
    protocol = {"name": "wrpo", **recipe.select.model_dump(exclude_unset=True)}
    sets = work.select("sources", groups, protocol)
    model = work.sft(sets / "sft.jsonl", {"name": "sft"})
    engine = recipe.own.engine
    if isinstance(engine, TransformersSettings):
        engine = engine.model_copy(update={"load": model})
    left = str(sets / "left.jsonl")
    sampled = work.sample(OWN, OWN, left, engine, recipe.merged(recipe.own.sampling, "own."))
    own = work.scored(OWN, {OWN: (left, [sampled])})
    triples = work.select(OWN, [*groups, *own], {**protocol, "target": OWN})
    # A triple stands in the order of the objective: the sources' best, the target's best and worst.
    work.preference(triples / "preference.jsonl", {"name": "wrpo", "beta": 0.01, "alpha": 0.1})
    work.measure()
    return work
