"""Which part of a graph is asked for: up to a stage, and from a stage on again."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from fusemega.errors import UserError
from fusemega.pipeline.graph import Graph


@dataclass(frozen=True)
class Scope:
    """What is asked of a graph.

    Attributes:
        until: names of the stages that may run; None: all.
        again: names of the stages that run again although they are finished. What they made is removed first.
    """

    until: Set[str] | None = None
    again: Set[str] = frozenset()

    @classmethod
    def of(cls, graph: Graph, until: str | None, start: str | None) -> Scope:
        """The part that the options `--until` and `--from` name.

        Args:
            graph: the whole graph.
            until: a stage (or the beginning of several names): it and all that it needs may run. None: everything may.
            start: likewise: it and all that need it run again. None: only what has to run.

        Raises:
            UserError: no stage has the name, or the two have nothing in common.

        Example:
            In a graph sample -> select -> sft, `Scope.of(graph, "select", "sample")` makes sample and select again, and
            leaves sft out.
        """
        allowed = None if until is None else graph.before(graph.named("--until", until))
        again = set() if start is None else graph.after(graph.named("--from", start))
        if allowed is not None and start is not None and not again & allowed:
            listed = ", ".join(stage.name for stage in graph.stages if stage.name in allowed)
            raise UserError(f"--from {start}: --until {until} ends before it; stages until then: {listed}")
        return cls(allowed, frozenset(again if allowed is None else again & allowed))

    def leaves(self, name: str) -> bool:
        """Whether the stage is not asked for."""
        return self.until is not None and name not in self.until


ALL = Scope()
"""The whole graph, and nothing again that is finished."""
