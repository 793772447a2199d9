"""FuseChat-3.0 (Yang et al., 2025, arXiv:2503.04222): SFT on the best response of all sources, then length-normalised
DPO on pairs within one source, by domain.

    fusemega run RECIPE.yaml [KEY=VALUE ...]
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome
from fusemega.recipes.implicit import ImplicitWork
from fusemega.recipes.implicit_settings import ImplicitRecipe
from fusemega.recipes.registry import Recipe
from fusemega.selection.protocols.fusechat3 import FuseChat3Settings


class FuseChat3Recipe(ImplicitRecipe):
    """A recipe file."""

    recipe: Literal["fusechat3"] = Field("fusechat3", description="the kind of recipe")
    select: FuseChat3Settings = Field(FuseChat3Settings(), description="settings of the protocol fusechat3")


class FuseChat3Fusion(Recipe[FuseChat3Recipe]):
    """`recipe: fusechat3`."""

    Settings = FuseChat3Recipe

    def graph(self, settings: FuseChat3Recipe) -> Graph:
        """See `Recipe.graph`."""
        return _work(settings).steps.graph()

    def finish(self, settings: FuseChat3Recipe, outcome: Outcome) -> list[str]:
        """See `Recipe.finish`."""
        work = _work(settings)
        return work.summary(outcome, {"sets": f"{settings.output_dir}/sets/sources"})


RECIPE = FuseChat3Fusion()


def _work(recipe: FuseChat3Recipe) -> ImplicitWork:
    work = ImplicitWork(recipe)
    groups = work.scored("sources", work.responses())
    sets = work.select("sources", groups, {"name": "fusechat3", **recipe.select.model_dump(exclude_unset=True)})
    work.sft(sets / "sft.jsonl", {"name": "sft"})
    work.preference(sets / "preference.jsonl", {"name": "dpo", "loss_type": "sigmoid_norm", "beta": 10.0})
    work.measure()
    return work
