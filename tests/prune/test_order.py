"""Files that say which blocks are removed: both forms come back as they were written; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.models.registry import architecture_of
from fusemega.prune.order import ModelIdentity, Order, ResidualBlock, Step, blocks_of, read_order

# How an order begins that the authors publish, as sets that grow.
AUTHORS = {"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], "3": [["mha", 24], ["mha", 25], ["mha", 27]]}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def _order(**changes: Any) -> Order:
    steps = (
        Step(ResidualBlock("mha", 2), 10.5),
        Step(ResidualBlock("mlp", 0), None),
        Step(ResidualBlock("mha", 0), 12.25),
    )
    given: dict[str, Any] = {
        "type": "mix",
        "dense_perplexity": 9.75,
        "measure": "perplexity",
        "settings": {"ce": "fp32", "windows": 3},
        "model": ModelIdentity(3, "llama", "ab12"),
    }
    return Order(steps, **given | changes)


def _written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_our_form_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "in" / "order.json"
    _order(source=str(path)).write(path)
    assert read_order(path) == _order(source=str(path))
    assert [str(block) for block in read_order(path).removed(2)] == ["mha 2", "mlp 0"]


def test_the_authors_form_is_a_set_for_each_count(tmp_path: Path) -> None:
    order = read_order(_written(tmp_path / "order.json", AUTHORS))
    assert [str(block) for block in order.blocks] == ["mha 25", "mha 27", "mha 24"]
    assert (order.type, order.model, order.dense_perplexity) == ("mha", None, None)
    assert json.loads(order.to_authors_json()) == AUTHORS
    order.write_authors(tmp_path / "again.json")
    assert read_order(tmp_path / "again.json").blocks == order.blocks


def test_two_blocks_of_one_layer_in_the_authors_form() -> None:
    entries = json.loads(_order().to_authors_json())
    assert entries["3"] == [["mlp", 0], ["mha", 0], ["mha", 2]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"1": [["mah", 2]]}, "entry 1: kind of block: unknown name 'mah' (did you mean 'mha'?); allowed: mha, mlp"),
        ({"1": [["mha", -1]]}, "entry 1: layer: expected a number from 0, found -1"),
        ({"1": [["mha", True]]}, "layer: expected a number from 0, found True"),
        ({"1": ["mha"]}, "expected a block as [\"mha\", 25], found 'mha'"),
        ({"1": "mha"}, "entry 1: expected a list"),
        ({"1": [["mha", 1], ["mha", 2]]}, "entry 1: has 2 blocks; expected 1"),
        ({"1": [["mha", 1]], "2": [["mha", 2], ["mha", 2]]}, "entry 2: mha 2 is in it twice"),
        ({"1": [["mha", 1]], "2": [["mha", 2], ["mlp", 2]]}, "entry 2: lacks mha 1, which entry 1 removes"),
        ({"1": [["mha", 1]], "3": [["mha", 2]]}, "found the entry '3'; expected the entries 1 to 2"),
        ({"order": []}, "not an order of removed blocks: found the keys order"),
        ({}, "found the keys nothing"),
    ],
)
def test_bad_files_of_the_authors_form(tmp_path: Path, content: object, said: str) -> None:
    path = _written(tmp_path / "order.json", content)
    with pytest.raises(UserError) as caught:
        read_order(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fusemega": "x"}, "fusemega: found 'x'"),
        ({"typ": "mix"}, "unknown key 'typ' (did you mean 'type'?)"),
        ({"type": "all"}, "type: unknown name 'all'; allowed: mha, mix, mlp"),
        ({"type": "mha"}, "step 2: removes mlp 0, and the order's type is mha"),
        ({"steps": {}}, "steps: expected a list"),
        ({"steps": [{"block": ["mha", 1]}, {"block": ["mha", 1]}]}, "step 2: mha 1 is removed twice"),
        ({"steps": [{"block": ["mha", 1], "perplexity": -1}]}, "step 1: perplexity: expected a positive number"),
        ({"dense_perplexity": "9"}, "dense_perplexity: expected a positive number or null, found '9'"),
        ({"settings": []}, None),
        ({"settings": [1]}, "settings: expected a mapping, found [1]"),
        ({"measure": 1}, "measure: expected a name, found 1"),
        ({"model": {"layers": 3}}, "model: expected a mapping with layers, family, weights"),
        ({"model": {"layers": "3", "family": "llama", "weights": "a"}}, "model.layers: expected int, found '3'"),
    ],
)
def test_bad_files_of_our_form(tmp_path: Path, change: dict[str, Any], said: str | None) -> None:
    path = _written(tmp_path / "order.json", json.loads(_order().to_json()) | change)
    if said is None:
        assert read_order(path).settings == {}
        return
    with pytest.raises(UserError) as caught:
        read_order(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_more_blocks_than_the_order_has() -> None:
    with pytest.raises(UserError, match="asked for 4 removed blocks, and the order has 3"):
        _order().removed(4)


def test_the_model_of_an_order() -> None:
    architecture = architecture_of(CONFIG)
    assert [str(block) for block in blocks_of(architecture)[:3]] == ["mha 0", "mlp 0", "mha 1"]
    _order().check_model(architecture, "ab12", "models/a")
    _order().check_model(architecture, None, "models/a")
    with pytest.raises(UserError, match="its weights are ab12, and models/a has ab13"):
        _order().check_model(architecture, "ab13", "models/a")
    with pytest.raises(UserError, match="its layers are 4, and models/a has 3"):
        _order(model=ModelIdentity(4, "llama", "ab12")).check_model(architecture, "ab12", "models/a")
    with pytest.raises(UserError, match="its family is qwen2, and models/a has llama"):
        _order(model=ModelIdentity(3, "qwen2", "ab12")).check_model(architecture, None, "models/a")
    beyond = Order((Step(ResidualBlock("mlp", 3)),), "mix")
    with pytest.raises(UserError, match="removes mlp 3, and models/a has layers 0 to 2"):
        beyond.check_model(architecture, None, "models/a")
    gone = architecture_of(CONFIG | {"block_configs": [{}, {"ffn": {"no_op": True}}, {}]})
    assert ResidualBlock("mlp", 1) not in blocks_of(gone)
    with pytest.raises(UserError, match="removes mlp 1, and models/a has that layer without this block"):
        Order((Step(ResidualBlock("mlp", 1)),), "mlp").check_model(gone, None, "models/a")
