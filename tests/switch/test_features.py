"""Hidden states of prompts: those of transformers to 1e-4, at TP 1 and 2 and PP 2; the store that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fusemega.errors import UserError
from fusemega.sampling.prompts import PromptsConfig, read_prompts
from fusemega.store import Row, Store
from fusemega.store.inspect import describe
from fusemega.store.verify import verify_rows
from fusemega.switch.features import features, read_features
from fusemega.switch.modes import Modes, ModesConfig
from tests.distributed.launch import run_ranks
from tests.switch.conftest import switch_run, write_questions

KINDS = [("final", "last"), ("final", "mean"), (1, "last"), (2, "mean")]
LAYOUTS = {"TP2": [0], "TP2SP": [1], "PP2": [0, 2], "CP2": [0, 1], "DP2": [0]}  # -> places in KINDS


def reference(model: Path, prompts: Path, layer: object, pooling: str) -> dict[str, np.ndarray]:
    """By transformers, prompt by prompt."""
    modes, loaded = Modes(ModesConfig(), model), AutoModel.from_pretrained(model, dtype=torch.float32)
    found = {}
    for key, prompt in read_prompts(PromptsConfig(path=str(prompts))).by_key.items():
        with torch.no_grad():
            out = loaded(torch.tensor([modes.prefill(prompt.messages, "here")]), output_hidden_states=True)
        hidden = out.last_hidden_state[0] if layer == "final" else out.hidden_states[int(layer) + 1][0]  # type: ignore
        found[key] = (hidden[-1] if pooling == "last" else hidden.mean(0)).numpy()
    return found


@pytest.mark.parametrize(("layer", "pooling"), KINDS)
def test_equal_transformers(switch_model: Path, tmp_path: Path, layer: object, pooling: str) -> None:
    prompts = write_questions(tmp_path / "train.jsonl", 20)
    run = switch_run(tmp_path, switch_model, features={"layer": layer, "pooling": pooling})
    found, _ = features(run)
    assert (found.prompts, found.new, found.size) == (20, 20, 64)
    expected = reference(switch_model, prompts, layer, pooling)
    vectors, manifest = read_features(run.features_store, list(expected), tmp_path)
    np.testing.assert_allclose(vectors, np.stack(list(expected.values())), rtol=1e-4, atol=1e-4)
    assert manifest.hidden is not None and manifest.hidden.layer == str(layer)
    assert features(run)[0].new == 0, "nothing is read twice"
    write_questions(tmp_path / "train.jsonl", 23)
    assert features(run)[0].new == 3


def test_equal_transformers_in_every_layout(switch_model: Path, tmp_path: Path) -> None:
    prompts = write_questions(tmp_path / "train.jsonl", 20)
    (tmp_path / "kinds.json").write_text(json.dumps({name: [KINDS[n] for n in of] for name, of in LAYOUTS.items()}))
    run_ranks(Path(__file__).parent / "worker_features.py", 2, str(tmp_path), str(switch_model))
    expect = [reference(switch_model, prompts, layer, pooling) for layer, pooling in KINDS[:3]]
    for layout, kinds in LAYOUTS.items():
        for number, kind in enumerate(kinds):
            expected, store = expect[kind], tmp_path / f"{layout}-{number}" / "features"
            vectors, _ = read_features(store, list(expected), tmp_path)
            np.testing.assert_allclose(vectors, np.stack(list(expected.values())), rtol=1e-4, atol=1e-4, err_msg=layout)
            assert len(Store.open(store)) == 20


def test_the_store(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 5)
    run = switch_run(tmp_path, switch_model)
    features(run)
    store = Store.open(run.features_store)
    assert verify_rows(store) == 5
    told = describe(run.features_store)
    assert told["rows"] == "hidden" and told["hidden"]["size"] == 64 and told["cross_entropy_per_token"] is None
    with pytest.raises(UserError, match="rows: hidden, the vectors of `fusemega switch features`"):
        store.manifest.require_rows(run.features_store)
    other = switch_run(tmp_path, switch_model, features={"pooling": "mean"})
    with pytest.raises(UserError, match="hidden"):
        features(other)
    row = Row.of_hidden(bytes(8), np.arange(3))
    assert row.hidden_H is not None and row.hidden_H.dtype == np.float32 and row.num_tokens == 1


def test_what_is_refused(switch_model: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "train.jsonl", 2)
    with pytest.raises(
        UserError, match=r"train.jsonl:1: the prompt has \d+ tokens, more than features.seq_length \(16\)"
    ):
        features(switch_run(tmp_path, switch_model, features={"seq_length": 16}))
    with pytest.raises(UserError, match="features.layer: 3 is the last layer; give final"):
        features(switch_run(tmp_path, switch_model, features={"layer": 3}))
    with pytest.raises(UserError, match="features.layer: 7; the model has 4 layers"):
        features(switch_run(tmp_path, switch_model, features={"layer": 7}))
    with pytest.raises(UserError, match="features.short_answers: .* run `fusemega switch label` first"):
        features(switch_run(tmp_path, switch_model, features={"short_answers": True}))
