"""What a merge method is: a generator that asks for passes over a tensor's blocks and ends with how to merge a block.

    def passes(self, job):
        squares = yield lambda block: [cell_sums(d * d) for d in block.deltas()]   # run over every block, in parallel
        ...                                                                        # one result for each block
        return Merge(lambda block: block.base + ...)

So a method reads like its formula, and knows nothing of files, block sizes or workers. Whatever these are, it must
give the same bits: it may combine elements at one position, `cell_sums`, and exact counts, and nothing else.

Shape suffixes: K models (without the base), n elements of one block, flat, m places in it. A delta is a model's element
minus the base's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from fusemega.config import Section
from fusemega.errors import choose

ELEMENTWISE_ALIGNMENT = 64
"""Blocks begin at multiples of this many elements, so that vector instructions split each tensor the same way."""


@dataclass(frozen=True)
class TensorSpec:
    """One output tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Block:
    """A contiguous part of one tensor of every model, widened when it is asked for. Not to be written to.

    Attributes:
        tensor: the tensor it is a part of.
        index: its number among the blocks of the job.
        start: its first element, counted in the flat tensor.
        stored_base: [n] in the base's own dtype, or None where the merge has no base.
        stored: K times [n] in each model's own dtype.
        dtype: dtype of the computation: fp32 (fp64 if a source is fp64).
    """

    tensor: TensorSpec
    index: int
    start: int
    stored_base: torch.Tensor | None
    stored: list[torch.Tensor]
    dtype: torch.dtype = torch.float32

    @cached_property
    def base(self) -> torch.Tensor | None:
        """[n], widened."""
        return None if self.stored_base is None else self.stored_base.to(self.dtype)

    def model(self, number: int) -> torch.Tensor:
        """[n], widened."""
        return self.stored[number].to(self.dtype)

    def models(self) -> Iterator[torch.Tensor]:
        """K times [n], one after the other, so that only one needs room."""
        return (self.model(number) for number in range(len(self.stored)))

    def zeros(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A new tensor [n], of the computation's dtype unless told otherwise."""
        return torch.zeros(len(self.stored[0]), dtype=dtype or self.dtype)

    def at(self, places_m: np.ndarray) -> Block:
        """The block at m of its places only; `start` has no meaning there."""
        base = None if self.stored_base is None else _gather(self.stored_base, places_m)
        stored = [_gather(model, places_m) for model in self.stored]
        return Block(self.tensor, self.index, self.start, base, stored, self.dtype)

    def delta(self, number: int) -> torch.Tensor:
        """A new tensor [n]."""
        assert self.base is not None
        model = self.stored[number]
        return model - self.base if model.dtype == self.dtype else model.to(self.dtype).sub_(self.base)

    def deltas(self) -> list[torch.Tensor]:
        """K new tensors [n]."""
        return [self.delta(number) for number in range(len(self.stored))]

    def plus_base(self, delta: torch.Tensor) -> torch.Tensor:
        """`delta` + base, in the memory of `delta`."""
        assert self.base is not None
        return delta.add_(self.base)


def _gather(values_n: torch.Tensor, places_m: np.ndarray) -> torch.Tensor:
    """`values_n` at some places, gathered by numpy, which is two and a half times as fast as torch."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values_n.element_size()]
    return torch.from_numpy(values_n.view(bits).numpy().take(places_m)).view(values_n.dtype)


@dataclass(frozen=True)
class Job:
    """The tensors that a method merges together, because they share statistics: most often one.

    Attributes:
        tensors: at least one.
        settings: the method's `Settings`, the same for all of them.
        models: K `ModelSettings`.
        seed: the seed of the merge.
    """

    tensors: Sequence[TensorSpec]
    settings: Any
    models: Sequence[Any]
    seed: int

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)


@dataclass(frozen=True)
class Merge:
    """The last step of a job: how each block is merged.

    Attributes:
        apply: block -> merged values [n] in the block's dtype, and the number of (element, model) pairs whose sign was
            the elected one (0 where none is elected).
        report: entries of the merge report for the job's tensors: numbers, and lists of K numbers.
        pairs: (element, model) pairs that stood for election over the whole job; 0 where there is none.
    """

    apply: Callable[[Block], tuple[torch.Tensor, float]]
    report: Mapping[str, Any] = field(default_factory=dict)
    pairs: int = 0


Pass = Callable[[Block], Any]


@dataclass(frozen=True)
class PartialPass:
    """A pass over parts of the only tensor of a job, a few parts in each block, whose `start` has no meaning.

    Attributes:
        measure: run over every block.
        pieces: (start, count) of each part, whatever the blocks of other passes are.
    """

    measure: Pass
    pieces: list[tuple[int, int]]


T = TypeVar("T")
PassesFor = Generator[Pass | PartialPass, list[Any], T]
"""Asks for passes by `yield`, gets each pass's results of all blocks, and returns a T in the end."""
Passes = PassesFor[Merge]


class Method(ABC):
    """A way to merge. Subclasses are one short file each, under `@register`."""

    name: ClassVar[str]
    needs_base: ClassVar[bool] = True
    only_two: ClassVar[bool] = False
    """Whether it takes the base and exactly one other model."""
    whole_rows: ClassVar[bool] = False
    """Whether a block must hold whole rows (the last dimension)."""
    pass_names: ClassVar[tuple[str, ...]] = ()
    """Names of the passes that it may run before it merges, for the plan."""
    vectors: ClassVar[tuple[int, int]] = (2, 1)
    """Temporaries [n] held beside the block: a fixed number, and a number for each model; for the plan's memory."""

    Settings: ClassVar[type[Section]] = Section
    """The settings for a tensor."""
    ModelSettings: ClassVar[type[Section]] = Section
    """The settings for one model in a tensor."""

    def group(self, tensor: str, settings: Any) -> str:
        """The key of the tensor's job: tensors with the same key are merged in one job."""
        return tensor

    def check(self, settings: Any, models: Sequence[Any]) -> None:  # noqa: B027  (most methods take anything)
        """Refuses settings that no merge can follow.

        Raises:
            ValueError: what is wrong, without naming the tensor.
        """

    def measures(self, settings: Any) -> tuple[str, ...]:
        """The passes before the merge under these settings."""
        return self.pass_names

    def remembered_bytes(self, elements: int, models: int) -> int:
        """Memory that it may hold between passes for a tensor of so many elements; for the plan."""
        return 0

    @abstractmethod
    def passes(self, job: Job) -> Passes:
        """The merge of one job; see the module's docstring."""


_METHODS: dict[str, Method] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: the method is found under its `name`."""
    _METHODS[cls.name] = cls()
    return cls


def method_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_METHODS)


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: none, with the nearest.
    """
    return _METHODS[choose("merge_method", name, _METHODS)]
