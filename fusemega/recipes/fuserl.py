"""FuseRL (arXiv:2504.06562): SFT on the best response of each source, weighed by reward, then preference optimisation
on the responses of each source, weighed likewise.

    fusemega run RECIPE.yaml [KEY=VALUE ...]
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome
from fusemega.recipes.implicit import ImplicitWork
from fusemega.recipes.implicit_settings import ImplicitRecipe
from fusemega.recipes.registry import Recipe
from fusemega.selection.protocols.fuserl import FuseRLSettings


class FuseRLRecipe(ImplicitRecipe):
    """A recipe file."""

    recipe: Literal["fuserl"] = Field("fuserl", description="the kind of recipe")
    select: FuseRLSettings = Field(
        FuseRLSettings(),
        description="settings of the protocol fuserl; alpha and top_k_responses go to the objectives too",
    )

    @model_validator(mode="after")
    def _one_alpha(self) -> FuseRLRecipe:
        """alpha and top_k_responses are given in select."""
        for key in ("alpha", "top_k_responses"):
            for stage in ("sft", "preference"):
                if key in getattr(self, stage).objective:
                    raise ValueError(f"{stage}.objective.{key}: give select.{key}, which decides it everywhere")
        return self


class FuseRLFusion(Recipe[FuseRLRecipe]):
    """`recipe: fuserl`."""

    Settings = FuseRLRecipe

    def graph(self, settings: FuseRLRecipe) -> Graph:
        """See `Recipe.graph`."""
        return _work(settings).steps.graph()

    def finish(self, settings: FuseRLRecipe, outcome: Outcome) -> list[str]:
        """See `Recipe.finish`."""
        return _work(settings).summary(outcome, {"sets": f"{settings.output_dir}/sets/sources"})


RECIPE = FuseRLFusion()


def _work(recipe: FuseRLRecipe) -> ImplicitWork:
    work = ImplicitWork(recipe)
    groups = work.scored("sources", work.responses())
    sets = work.select("sources", groups, {"name": "fuserl", **recipe.select.model_dump(exclude_unset=True)})
    weights: dict[str, Any] = {"alpha": recipe.select.alpha}
    best = {} if recipe.select.top_k_responses is None else {"top_k_responses": recipe.select.top_k_responses}
    work.sft(sets / "sft.jsonl", {"name": "fuse_sft", **weights, **best})
    work.preference(sets / "preference.jsonl", {"name": "fuse_po", "loss_type": "dpo", "beta": 0.01, **weights})
    work.measure()
    return work
