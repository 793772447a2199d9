"""What a part is told: its name, the device, where to work, and whether its sizes are those of a card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from gpu.card import Card

T = TypeVar("T")


@dataclass
class Job:
    """One part's circumstances.

    Attributes:
        name: of the part.
        work: a folder that the parts share, for what they make.
        quick: tiny sizes on a GPU too.
    """

    name: str
    work: Path
    quick: bool = False

    @cached_property
    def card(self) -> Card:
        """The device. torch is imported when it is first asked for.

        Raises:
            UserError: there should be a GPU, and torch cannot use it.
        """
        from gpu.card import Card

        return Card.find()

    @property
    def real(self) -> bool:
        """Whether sizes are those of a card, and times say something."""
        return self.card.is_gpu and not self.quick

    @property
    def why_not(self) -> str:
        """Why a figure is not measured, where `real` is false."""
        return "--quick" if self.card.is_gpu else "no GPU"

    def size(self, real: T, tiny: T) -> T:
        """The size for a card, or the tiny one."""
        return real if self.real else tiny

    def folder(self) -> Path:
        """A new folder of this part's own."""
        made = self.work / self.name
        made.mkdir(parents=True)
        return made
