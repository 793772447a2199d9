"""What the rotation of a text has besides its model's frequencies.

Shape suffixes: R rotated entries of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_ATTRIBUTE = "fusemega_text_rope"


@dataclass(frozen=True)
class TextRope:
    """Queries and keys are scaled, and long texts may have frequencies of their own. Equal ones compute the same.

    Attributes:
        scale: cosines and sines are multiplied by it.
        same_up_to: texts of more tokens have `frequencies` of their own; None: none has.
    """

    scale: float
    same_up_to: int | None

    def frequencies(self, length: int) -> torch.Tensor:
        """Inverse frequencies, float32 [R/2] on the CPU, of a text of `length` > `same_up_to` tokens."""
        raise NotImplementedError


NOTHING = TextRope(1.0, None)


def with_rope(config: Any, rope: TextRope | None) -> None:
    """Gives a TransformerConfig its model's rope: the one object that reaches the rotation in every layer."""
    if rope is not None:
        setattr(config, _ATTRIBUTE, rope)


def rope_of(config: Any) -> TextRope:
    """What `with_rope` gave it."""
    found: TextRope = getattr(config, _ATTRIBUTE, NOTHING)
    return found
