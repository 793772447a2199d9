"""The stages of pruning: a search for blocks, and the model without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusemega.files.json_files import read_json
from fusemega.hf.hub import resolve
from fusemega.models.registry import architecture_of
from fusemega.models.stages import check_layout
from fusemega.prune.apply import planned
from fusemega.prune.order import read_order
from fusemega.recipes.steps import Steps, files_of
from fusemega.runtime.layout import ParallelConfig


class PruneSteps(Steps):
    """`Steps` with the commands of `fusemega prune`."""

    def prune_search(self, load: str, blocks: int, settings: Mapping[str, Any]) -> str:
        """`fusemega prune search` as stage prune-search. Returns the order, `order/order.json`.

        Args:
            load: the whole model.
            blocks: how many are removed.
            settings: the run file's other keys, `data` among them.
        """
        out = self.folder / "order"
        run = {"model": self._model(load), "parallel": dict(self.parallel), "blocks": blocks, "output": str(out)}
        inputs = {"model": self._located(load), **files_of(settings["data"])} if "data" in settings else {}
        outputs = {"order": str(out / "order.json")}
        self._launched("prune search", "prune-search", run | dict(settings), inputs, outputs, (str(out),))
        return outputs["order"]

    def prune_apply(self, model: str, order: str, blocks: int, export: str, out: str | None = None) -> str:
        """`fusemega prune apply` as stage prune-apply. Returns the model, folder `pruned` or `out`.

        Raises:
            UserError: the order is there, and it is of another model, or the model cannot be written without its first
                blocks, or the layout does not divide what is left.
        """
        out = out or str(self.folder / "pruned")
        if not (self._is_made(model) or self._is_made(order)):
            architecture, found = architecture_of(read_json(resolve(model) / "config.json")), read_order(order)
            found.check_model(architecture, None, model)
            _, config = planned(architecture, found.removed(blocks), export)
            check_layout(architecture_of(config), ParallelConfig(**self.parallel))
        words = ("prune", "apply", model, order, out, "--blocks", str(blocks), "--export", export)
        self._tool("prune-apply", words, {"model": self._located(model), "order": order}, {"model": out})
        return out
