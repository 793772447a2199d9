"""Weight rules: which box of which Hugging Face tensor is which box of this rank's Megatron parameter.

A rule only moves bits, it never computes, so the same list of pieces imports (HF to Megatron) and exports
(Megatron to HF). Names on the Megatron side carry the *global* layer index, so a rule does not depend on the
pipeline layout; a stage looks up the rules of the parameters it holds.

Shape suffixes: V vocabulary, H hidden, F feed-forward, N query heads, G key/value groups, D head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from fusemega.files.boxes import Box, whole

if TYPE_CHECKING:  # conversions use rules without torch
    from fusemega.runtime.layout import ParallelConfig
    from fusemega.runtime.parallel import World


@dataclass(frozen=True)
class WeightRanks:
    """A rank's place in the groups that split weights; the default is a rank that holds every weight whole.

    Attributes:
        tp_size, tp_rank: tensor parallelism, which splits matrices.
        ep_size, ep_rank: expert parallelism, which deals out whole experts.
        expert_tp_size, expert_tp_rank: tensor parallelism inside an expert.
    """

    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    expert_tp_size: int = 1
    expert_tp_rank: int = 0

    @classmethod
    def of(cls, world: World) -> WeightRanks:
        """The place of this process."""
        return cls(
            tp_size=world.tp_size,
            tp_rank=world.tp_rank,
            ep_size=world.ep_size,
            ep_rank=world.ep_rank,
            expert_tp_size=world.expert_tp_size,
            expert_tp_rank=world.expert_tp_rank,
        )

    @classmethod
    def all_of(cls, layout: ParallelConfig) -> list[WeightRanks]:
        """The ranks of one pipeline stage as they follow each other in the world, until all weights are held.

        With expert parallelism there may be several tensor-parallel groups of them: one replica of the other weights
        each.
        """
        tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
        expert_tp = layout.expert_tp_size
        places = range(math.lcm(tp, ep * expert_tp))
        return [cls(tp, n % tp, ep, n // expert_tp % ep, expert_tp, n % expert_tp) for n in places]

    def at(self, rank: int) -> WeightRanks:
        """The same groups, seen by another rank of the group that splits a matrix: TP, inside an expert expert TP."""
        return replace(self, tp_rank=rank, expert_tp_rank=rank)

    @cached_property  # asked for by each of tens of thousands of rules
    def of_an_expert(self) -> WeightRanks:
        """What splits the matrices of an expert in the place of tensor parallelism."""
        return WeightRanks(tp_size=self.expert_tp_size, tp_rank=self.expert_tp_rank)


WHOLE = WeightRanks()
"""The place of a rank that holds every weight whole."""


@dataclass(frozen=True)
class Piece:
    """`local[slices(local_box)]` of a Megatron parameter is `hf[slices(hf_box)]` of the tensor `hf`."""

    hf: str
    hf_box: Box
    local_box: Box


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron parameter and the HF tensors it is made of.

    Attributes:
        megatron: the parameter's name, with the global layer index.
        duplicate: a second copy of tensors that another rule holds (the tied head of the last pipeline stage):
            filled on import, skipped on export.
    """

    megatron: str

    @property
    def duplicate(self) -> bool:
        return False

    @property
    @abstractmethod
    def partition_dim(self) -> int | None:
        """The dimension that tensor parallelism splits; None where every rank holds the whole."""

    @property
    def expert(self) -> tuple[int, int] | None:
        """Of an expert's parameter: the expert's number, and how many experts its layer has."""
        return None

    def held_by(self, ranks: WeightRanks) -> bool:
        """Whether such a rank has the parameter, or a part of it."""
        return True

    def split(self, ranks: WeightRanks) -> tuple[int, int]:
        """(Rank, size) in the group of ranks that split the parameter, as in `WeightRanks.at`; (0, 1): none do."""
        return (0, 1) if self.partition_dim is None else (ranks.tp_rank, ranks.tp_size)

    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """HF tensor name -> shape."""

    @abstractmethod
    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        """Shape of the parameter on such a rank."""

    @abstractmethod
    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        """The boxes that such a rank holds. Elements of the parameter outside all pieces are zero padding."""


@dataclass(frozen=True)
class Replicated(Rule):
    """The same tensor on every tensor-parallel rank (norm weights)."""

    hf: str
    shape: tuple[int, ...]

    @property
    def partition_dim(self) -> None:
        return None

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf: self.shape}

    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        return self.shape

    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        return [Piece(self.hf, whole(self.shape), whole(self.shape))]


@dataclass(frozen=True)
class _Split(Rule):
    """A matrix that is split into equal parts along one dimension, `dim`."""

    dim: ClassVar[int]

    hf: str
    shape: tuple[int, int]

    @property
    def partition_dim(self) -> int:
        return self.dim

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf: self.shape}

    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        return tuple(size // ranks.tp_size if n == self.dim else size for n, size in enumerate(self.shape))

    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        local = self.local_shape(ranks)
        start = ranks.tp_rank * local[self.dim]
        box = tuple((start, start + size) if n == self.dim else (0, size) for n, size in enumerate(local))
        return [Piece(self.hf, box, whole(local))]


@dataclass(frozen=True)
class ColumnParallel(_Split):
    """A matrix whose output dimension (dim 0) is split, with its rows in Megatron's order: ColumnParallelLinear.

    Example:
        >>> ColumnParallel("fc1", "up", (12, 5)).pieces(WeightRanks(tp_size=2, tp_rank=1))
        [Piece(hf='up', hf_box=((6, 12), (0, 5)), local_box=((0, 6), (0, 5)))]
    """

    dim: ClassVar[int] = 0


@dataclass(frozen=True)
class RowParallel(_Split):
    """A matrix whose input dimension (dim 1) is split: Megatron's RowParallelLinear.

    Example:
        >>> RowParallel("fc2", "down", (5, 12)).pieces(WeightRanks(tp_size=2, tp_rank=1))
        [Piece(hf='down', hf_box=((0, 5), (6, 12)), local_box=((0, 5), (0, 6)))]
    """

    dim: ClassVar[int] = 1


@dataclass(frozen=True)
class GateUp(Rule):
    """`linear_fc1` [2F/TP, H] of a gated MLP: this rank's rows of the gate, then the same rows of the up matrix.

    HF keeps two matrices [F, H]; or, where both names are the same, one [2F, H] with the gate's rows first.
    """

    gate: str
    up: str
    shape: tuple[int, int]

    @property
    def partition_dim(self) -> int:
        return 0

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.gate == self.up:
            return {self.gate: (2 * self.shape[0], self.shape[1])}
        return {self.gate: self.shape, self.up: self.shape}

    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        return (2 * (self.shape[0] // ranks.tp_size), self.shape[1])

    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        rows, columns = self.shape[0] // ranks.tp_size, self.shape[1]
        start = ranks.tp_rank * rows
        up = start + (self.shape[0] if self.gate == self.up else 0)
        return [
            Piece(self.gate, ((start, start + rows), (0, columns)), ((0, rows), (0, columns))),
            Piece(self.up, ((up, up + rows), (0, columns)), ((rows, 2 * rows), (0, columns))),
        ]


@dataclass(frozen=True)
class OfExpert(Rule):
    """A parameter of one expert: on one rank of expert parallelism, and there split by expert tensor parallelism.

    Attributes:
        inner: the same rule of a layer without experts.
        number: the expert.
        experts: how many the layer has; expert-parallel rank r holds the r-th part of them.
    """

    inner: Rule
    number: int
    experts: int

    @classmethod
    def of(cls, inner: Rule, number: int, experts: int) -> OfExpert:
        """The rule of an expert's parameter with the name of `inner`."""
        return cls(inner.megatron, inner, number, experts)

    @property
    def partition_dim(self) -> int | None:
        return self.inner.partition_dim

    @property
    def expert(self) -> tuple[int, int]:
        return self.number, self.experts

    def held_by(self, ranks: WeightRanks) -> bool:
        return self.number // (self.experts // ranks.ep_size) == ranks.ep_rank

    def split(self, ranks: WeightRanks) -> tuple[int, int]:
        return self.inner.split(ranks.of_an_expert)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inner.hf_shapes()

    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        return self.inner.local_shape(ranks.of_an_expert)

    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        return self.inner.pieces(ranks.of_an_expert)


@dataclass(frozen=True)
class QKV(Rule):
    """`linear_qkv` [(N + 2G) * D / TP, H]: for each group its query heads, then its key, then its value.

    HF keeps three matrices: q [N*D, H], k and v [G*D, H]; or, where the three names are the same, one with the rows of
    q, then k, then v. Query head h belongs to group h // (N/G) everywhere.
    `columns` is (H,) for the weight and () for the bias, whose entries have the order of the weight's rows.

    Where TP is larger than G, Megatron cuts these rows wherever the ranks' shares end, and gathers what they give
    (transformer/attention.py:1398): no row is on two ranks, and each rank then takes its group's key and value.
    """

    q: str
    k: str
    v: str
    heads: int
    groups: int
    head_dim: int
    columns: tuple[int, ...]

    @property
    def partition_dim(self) -> int:
        return 0

    @property
    def _is_one(self) -> bool:
        return self.q == self.k == self.v

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        narrow = (self.groups * self.head_dim, *self.columns)
        if self._is_one:
            return {self.q: ((self.heads + 2 * self.groups) * self.head_dim, *self.columns)}
        return {self.q: (self.heads * self.head_dim, *self.columns), self.k: narrow, self.v: narrow}

    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        return ((self.heads + 2 * self.groups) * self.head_dim // ranks.tp_size, *self.columns)

    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        query_rows = self.heads // self.groups * self.head_dim
        group_rows = query_rows + 2 * self.head_dim
        rows, *_ = self.local_shape(ranks)
        first, end = ranks.tp_rank * rows, (ranks.tp_rank + 1) * rows
        columns = whole(self.columns)
        keys, values = ((self.heads + n * self.groups) * self.head_dim if self._is_one else 0 for n in (0, 1))
        out = []
        for group in range(first // group_rows, -(-end // group_rows)):
            at = group * group_rows
            for name, before, size in (
                (self.q, 0, query_rows),
                (self.k, keys, self.head_dim),
                (self.v, values, self.head_dim),
            ):
                start, stop = max(at, first), min(at + size, end)
                if start < stop:
                    in_hf = before + group * size - at  # from a row of Megatron's whole matrix to one of the tensor
                    hf_rows, local_rows = (start + in_hf, stop + in_hf), (start - first, stop - first)
                    out.append(Piece(name, (hf_rows, *columns), (local_rows, *columns)))
                at += size
        return out


@dataclass(frozen=True)
class VocabRows(Rule):
    """Embedding or head [V_padded/TP, H]. HF's V is padded to the next multiple of TP, the least Megatron needs.

    Padding rows lie at the end, so on the last rank or ranks: zero on import, dropped on export.
    """

    hf: str
    shape: tuple[int, int]
    is_duplicate: bool = False

    @property
    def duplicate(self) -> bool:
        return self.is_duplicate

    @property
    def partition_dim(self) -> int:
        return 0

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf: self.shape}

    def local_shape(self, ranks: WeightRanks) -> tuple[int, ...]:
        return (padded_vocab_size(self.shape[0], ranks.tp_size) // ranks.tp_size, self.shape[1])

    def pieces(self, ranks: WeightRanks) -> list[Piece]:
        rows, columns = self.local_shape(ranks)
        start = ranks.tp_rank * rows
        stop = min(start + rows, self.shape[0])
        if stop <= start:
            return []
        return [Piece(self.hf, ((start, stop), (0, columns)), ((0, stop - start), (0, columns)))]


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The next multiple of `tp_size`: each rank needs equally many rows, and nothing here needs more than that."""
    return -(-vocab_size // tp_size) * tp_size
