"""Which blocks are removed from a model, in which order, and the files that say so.

Two forms are read: ours, and the one of BlockPruner's authors (https://github.com/MrGGLS/BlockPruner):
`{"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], ...}`, where entry n is the set of the first n removed blocks,
sorted by layer. What is removed from n - 1 to n is the difference of two entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fusemega.errors import UserError, choose, nearest
from fusemega.files.json_files import read_json
from fusemega.files.output import write_output
from fusemega.models.architecture import Architecture

Kind = Literal["mha", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OrderType = Literal["mix", "mha", "mlp"]
_FORMAT = "order of removed blocks, 1"
_KEYS = ("fusemega", "model", "type", "measure", "settings", "dense_perplexity", "steps")


@dataclass(frozen=True, order=True)
class ResidualBlock:
    """Half of a decoder layer: a module with its norms, added to the residual stream.

    Attributes:
        kind: "mha" is the attention block, "mlp" the feed-forward block.
        layer: counted from 0 over the whole, unpruned model.

    Example:
        >>> str(ResidualBlock("mha", 5))
        'mha 5'
    """

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"

    @property
    def words(self) -> list[str | int]:
        """As files have it: ["mha", 5]."""
        return [self.kind, self.layer]

    @property
    def place(self) -> int:
        """Its place among the blocks of a complete model, in the order in which a token passes through them."""
        return 2 * self.layer + KINDS.index(self.kind)


Removal = tuple[ResidualBlock, ...]
"""What a search removes at once: a block, or two neighbours, in the order of the stream."""


def blocks_of(architecture: Architecture) -> tuple[ResidualBlock, ...]:
    """The blocks that a model has, in the order in which a token passes through them.

    A layer of which `block_configs` leaves a block out has the other one only.
    """
    return tuple(
        ResidualBlock(kind, number)
        for number, layer in enumerate(architecture.layers)
        for kind, part in zip(KINDS, (layer.attention, layer.mlp), strict=True)
        if part is not None
    )


@dataclass(frozen=True)
class ModelIdentity:
    """The model that an order belongs to.

    Attributes:
        layers: how many it has.
        family: `model_type` of its config.json.
        weights: hash of its configuration and weights (`HFFolder.content_hash`, `ModelSource.weights_hash`).
    """

    layers: int
    family: str
    weights: str

    @classmethod
    def of(cls, architecture: Architecture, weights: str) -> ModelIdentity:
        """The identity of a model with this configuration and hash."""
        return cls(len(architecture.layers), str(architecture.hf_config["model_type"]), weights)


@dataclass(frozen=True)
class Step:
    """One removal.

    Attributes:
        block: the block.
        perplexity: of the model on the calibration data after the removal; None: not measured.
    """

    block: ResidualBlock
    perplexity: float | None = None


@dataclass(frozen=True)
class Order:
    """Blocks in the order in which they are removed.

    Attributes:
        steps: the removals.
        type: which kinds of blocks could be removed: both (mix), attention (mha) or feed-forward blocks (mlp).
        dense_perplexity: of the whole model on the calibration data; None: not measured.
        measure: what the order was found with ("perplexity"); None: the file does not say.
        settings: what the search was run with, by name.
        model: the model it belongs to; None: the file does not say.
        source: the file it was read from, for messages.
    """

    steps: tuple[Step, ...]
    type: OrderType
    dense_perplexity: float | None = None
    measure: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: ModelIdentity | None = None
    source: str = "order"

    def __post_init__(self) -> None:
        """Refuses a block that is removed twice, or one of a kind that `type` excludes.

        Raises:
            UserError: names the block.
        """
        seen: set[ResidualBlock] = set()
        for number, block in enumerate(self.blocks, start=1):
            if block in seen:
                raise UserError(f"{self.source}: step {number}: {block} is removed twice")
            if self.type not in ("mix", block.kind):
                raise UserError(f"{self.source}: step {number}: removes {block}, and the order's type is {self.type}")
            seen.add(block)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def blocks(self) -> tuple[ResidualBlock, ...]:
        """All blocks, in the order of their removal."""
        return tuple(step.block for step in self.steps)

    def removed(self, k: int) -> tuple[ResidualBlock, ...]:
        """The first `k` blocks, in the order of their removal.

        Raises:
            UserError: k is negative, or larger than the order.
        """
        if not 0 <= k <= len(self):
            raise UserError(f"{self.source}: asked for {k} removed blocks, and the order has {len(self)}")
        return self.blocks[:k]

    def check_model(self, architecture: Architecture, weights: str | None, where: str) -> None:
        """Refuses another model than the one that the order was found for. An order that names no model fits any model
        that has its blocks.

        Args:
            architecture: the model's opened configuration.
            weights: its hash; None: it is not compared.
            where: the model's folder, for the message.

        Raises:
            UserError: names what differs, or the first block that the model does not have.
        """
        if self.model is not None:
            found = ModelIdentity.of(architecture, self.model.weights if weights is None else weights)
            for name in ("family", "layers", "weights"):
                said, has = getattr(self.model, name), getattr(found, name)
                if said != has:
                    raise UserError(
                        f"{self.source}: an order for another model: its {name} {'are' if name[-1] == 's' else 'is'} "
                        f"{said}, and {where} has {has}"
                    )
        present = set(blocks_of(architecture))
        for block in self.blocks:
            if block not in present:
                layers = len(architecture.layers)
                has = f"layers 0 to {layers - 1}" if block.layer >= layers else "that layer without this block"
                raise UserError(f"{self.source}: removes {block}, and {where} has {has}")

    def to_json(self) -> str:
        """Our form, as the text of a JSON file."""
        model = self.model
        content = {
            "fusemega": _FORMAT,
            "model": None
            if model is None
            else {"layers": model.layers, "family": model.family, "weights": model.weights},
            "type": self.type,
            "measure": self.measure,
            "settings": dict(self.settings),
            "dense_perplexity": self.dense_perplexity,
            "steps": [{"block": s.block.words, "perplexity": s.perplexity} for s in self.steps],
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def to_authors_json(self) -> str:
        """The authors' form, as the text of a JSON file."""
        entries = {
            str(n): [block.words for block in sorted(self.blocks[:n], key=lambda block: block.layer)]
            for n in range(1, len(self) + 1)
        }
        return json.dumps(entries) + "\n"

    def write(self, path: Path) -> None:
        """Writes our form to `path`, in place of an older file, on disk before the function returns."""
        write_output(path, self.to_json())

    def write_authors(self, path: Path) -> None:
        """Writes the authors' form to `path`, as `write`."""
        write_output(path, self.to_authors_json())


def read_order(path: str | Path) -> Order:
    """The order in a file of our form or of the authors'.

    Raises:
        UserError: no such file, malformed, of neither form, an unknown kind of block, a block that is removed twice,
            or an entry that does not continue the one before it. Names the place.
    """
    content = read_json(path)
    if "fusemega" in content:
        return _read_ours(content, str(path))
    if content and all(key.isascii() and key.isdecimal() for key in content):
        return _read_authors(content, str(path))
    found = ", ".join(list(content)[:5]) or "nothing"
    raise UserError(
        f'{path}: not an order of removed blocks: found the keys {found}; expected "fusemega" with '
        f'"steps", or the authors\' form {{"1": [["mha", 25]], "2": ...}}'
    )


def is_order(path: Path) -> bool:
    """Whether the file is an order of our form."""
    try:
        return read_json(path).get("fusemega") == _FORMAT
    except UserError:
        return False


def _read_ours(content: Mapping[str, Any], source: str) -> Order:
    if content["fusemega"] != _FORMAT:
        raise UserError(f"{source}: fusemega: found {content['fusemega']!r}, expected {_FORMAT!r}")
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{source}: unknown key {key!r}{nearest(key, _KEYS)}; allowed: {', '.join(_KEYS)}")
    steps = content.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(f'{source}: steps: expected a list of {{"block": [kind, layer], "perplexity": number}}')
    settings = content.get("settings") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{source}: settings: expected a mapping, found {settings!r}")
    measure = content.get("measure")
    if not isinstance(measure, str | None):
        raise UserError(f"{source}: measure: expected a name, found {measure!r}")
    return Order(
        steps=tuple(
            Step(
                _block(step.get("block"), f"{source}: step {number}"),
                _perplexity(step.get("perplexity"), f"{source}: step {number}: perplexity"),
            )
            for number, step in enumerate(steps, start=1)
        ),
        type=_type(content.get("type"), source),
        dense_perplexity=_perplexity(content.get("dense_perplexity"), f"{source}: dense_perplexity"),
        measure=measure,
        settings=settings,
        model=_model(content.get("model"), source),
        source=source,
    )


def _read_authors(content: Mapping[str, Any], source: str) -> Order:
    if set(content) != (wanted := {str(n) for n in range(1, len(content) + 1)}):
        strange = min(set(content) - wanted, key=int)
        raise UserError(f"{source}: found the entry {strange!r}; expected the entries 1 to {len(content)}")
    order: list[ResidualBlock] = []
    for n in range(1, len(content) + 1):
        where = f"{source}: entry {n}"
        entry = content[str(n)]
        if not isinstance(entry, list):
            raise UserError(f"{where}: expected a list of [kind, layer], found {entry!r}")
        blocks = [_block(pair, where) for pair in entry]
        if twice := [block for block in blocks if blocks.count(block) > 1]:
            raise UserError(f"{where}: {twice[0]} is in it twice")
        if len(blocks) != n:
            raise UserError(f"{where}: has {len(blocks)} blocks; expected {n}")
        if lost := sorted(set(order) - set(blocks)):
            raise UserError(f"{where}: lacks {lost[0]}, which entry {n - 1} removes")
        order += set(blocks) - set(order)
    return Order(tuple(Step(block) for block in order), type_of(order), source=source)


def type_of(blocks: Iterable[ResidualBlock]) -> OrderType:
    """The narrowest type that allows these blocks."""
    kinds = sorted({block.kind for block in blocks})
    return kinds[0] if len(kinds) == 1 else "mix"


def _block(value: Any, where: str) -> ResidualBlock:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f'{where}: expected a block as ["mha", 25], found {value!r}')
    kind, layer = value
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise UserError(f"{where}: layer: expected a number from 0, found {layer!r}")
    choose(f"{where}: kind of block", str(kind), KINDS)
    return ResidualBlock(kind, layer)


def _type(value: Any, source: str) -> OrderType:
    choose(f"{source}: type", str(value), get_args(OrderType))
    found: OrderType = value
    return found


def _perplexity(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise UserError(f"{where}: expected a positive number or null, found {value!r}")
    return float(value)


def _model(value: Any, source: str) -> ModelIdentity | None:
    if value is None:
        return None
    kinds: dict[str, type] = {"layers": int, "family": str, "weights": str}
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise UserError(f"{source}: model: expected a mapping with {', '.join(kinds)}, found {value!r}")
    for name, kind in kinds.items():
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise UserError(f"{source}: model.{name}: expected {kind.__name__}, found {value[name]!r}")
    return ModelIdentity(**value)
