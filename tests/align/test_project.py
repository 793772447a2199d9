"""`fusemega project`: a store in another vocabulary, row by row what `reference_row` makes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega.align.dtw import decoded_strings
from fusemega.align.make_map import exact_map
from fusemega.align.project import ProjectRun, project
from fusemega.align.reference_rows import Aligner, reference_row
from fusemega.align.vocabulary import Vocabulary
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.losses.distill import Distill
from fusemega.store import Manifest, Row, Store, StoreWriter
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import CORPUS, byte_level, sentencepiece

ROWS = [
    {"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[i : i + 60]}]}
    for text in CORPUS[:4]
    for i in (0, 3, 11)
]
K = {"source": 5, "target": 4}
# Rows of the model beyond the ids of its tokenizer, as every Qwen2.5 has.
SPARE = {"source": 30, "target": 0}


class Place:
    """A folder with both tokenizers, their stores, a map and the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        self.run: dict[str, Any] = {
            "data": {"path": str(folder / "data.jsonl"), "seq_length": 96},
            "map": str(folder / "map"),
            "store": str(folder / "new"),
            "workers": 1,
        }
        self.tokenizers: dict[str, Tokenizer] = {}
        self.datasets: dict[str, TokenizedDataset] = {}
        for seed, (name, toy) in enumerate((("source", sentencepiece("chatml")), ("target", byte_level("llama3")))):
            toy.hf.save_pretrained(folder / name)
            self.tokenizers[name] = Tokenizer.load(folder / name)
            self.datasets[name] = prepare(DataConfig(**self.run["data"]), self.tokenizers[name], folder / "cache")
            self.run[name] = {"tokenizer": str(folder / name), "store": str(folder / f"{name}-store")}
            self.write_store(name, seed)
        self.vocabularies = {name: Vocabulary.of(tokenizer) for name, tokenizer in self.tokenizers.items()}
        self.map = exact_map(self.vocabularies["source"], self.vocabularies["target"])
        self.map.save(self.folder / "map")

    def write_store(self, name: str, seed: int, folder: str = "", skip: int = 0, **manifest: Any) -> None:
        rng, tokenizer = np.random.default_rng(seed), self.tokenizers[name]
        fields = {
            "weights": f"weights of {name}",
            "tokenizer": tokenizer.content_hash,
            "template": tokenizer.template_hash,
            "mask_policy": MASK_POLICY,
            "truncation": 96,
            "temperature": 1.0,
            "top_k": K[name],
            "vocab_size": tokenizer.num_ids + SPARE[name],
        }
        with StoreWriter(self.folder / (folder or f"{name}-store"), Manifest(**{**fields, **manifest})) as writer:
            for sample in list(self.datasets[name])[skip:]:
                positions = sample.positions
                ids_PK = np.stack([rng.permutation(np.unique(sample.ids))[: K[name]] for _ in positions])
                ids_PK[::2, -1] += SPARE[name] and tokenizer.num_ids  # an id that no token has, at every other position
                ids_PK[::2, -1] = np.minimum(ids_PK[::2, -1], tokenizer.num_ids + SPARE[name] - 1)
                logits_PK = -np.sort(rng.exponential(2.0, ids_PK.shape), axis=1)
                total_P = np.log(np.exp(logits_PK).sum(axis=1) + 0.1)
                logp_PK, residual_P = logits_PK - total_P[:, None], np.log(0.1) - total_P
                ends = sample.end_bytes[positions]
                row = Row(sample.ids_hash, ends, ids_PK.astype(np.int32), logp_PK, residual_P, -9.0, sample.num_bytes)
                writer.add(sample.key, row)

    def project(self, **changes: Any) -> dict[str, int]:
        return project(validate(ProjectRun, {**self.run, **changes}, "run.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("pad", [False, True])
def test_every_row_is_what_the_reference_makes(place: Place, pad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEMEGA_CACHE", str(place.folder / "assets"))
    new = str(place.folder / f"new-{pad}")
    first = place.project(store=new, pad=pad, data={**place.run["data"], "limit": 5})
    rest = place.project(store=new, pad=pad)  # goes on where the first stopped
    store = Store.open(new)
    assert len(store) == len(ROWS) and place.project(store=new, pad=pad) == {}
    manifest = store.manifest
    assert manifest.tokenizer == place.tokenizers["target"].content_hash and manifest.weights == "weights of source"
    assert manifest.top_k == 5 and manifest.projected is not None
    assert manifest.projected["target_weights"] == "weights of target"
    stores = [Store.open(place.run[name]["store"]) for name in ("source", "target")]
    words = [(w, decoded_strings(place.tokenizers[v], w.marker)) for v, w in place.vocabularies.items()]
    aligner = Aligner.of(*words[0], *words[1], place.map, 96 if pad else 0, stores[0].manifest.vocab_size)
    distill = Distill.build(Distill.Settings(store=new), place.tokenizers["target"], place.vocabularies["target"].size)
    total = 0
    for s, t in zip(place.datasets["source"], place.datasets["target"], strict=True):
        expected, _ = reference_row(
            aligner, s, t, *(store.get(sample.key) for store, sample in zip(stores, (s, t), strict=True))
        )
        got = store.get(t.key)
        np.testing.assert_array_equal(got.ids_PK, expected.ids_PK)
        np.testing.assert_allclose(np.exp(got.logp_PK), np.exp(expected.logp_PK), atol=2e-2)  # as stores code them
        assert got.cross_entropy == pytest.approx(9.0 / len(s.positions))  # a token of the source's own
        total += len(t.positions)
        distill.position_fields(t)
    counts = {name: first.get(name, 0) + rest.get(name, 0) for name in ("row", "label", "own")}
    assert sum(counts.values()) == total and counts["row"] > 0 and counts["label"] > 0


def refused(place: Place, words: str, **changes: Any) -> None:
    with pytest.raises(UserError) as error:
        place.project(**{"store": str(place.folder / "none"), **changes})
    assert words in str(error.value)
    assert not (place.folder / "none").exists()


def test_what_it_refuses(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEMEGA_CACHE", str(place.folder / "assets"))
    run = place.run
    swapped = {"source": run["target"], "target": run["source"]}
    refused(place, "the map's source is not the tokenizer of", **swapped)
    refused(place, "the store's tokenizer is", source={**run["source"], "store": run["target"]["store"]})
    refused(place, "the store's truncation is 96, expected 64", data={**run["data"], "seq_length": 64})
    place.write_store("source", 5, "warm", temperature=2.0)
    refused(place, "stored at temperature 2.0", source={**run["source"], "store": str(place.folder / "warm")})
    place.write_store("source", 5, "short", skip=2)
    short = {**run["source"], "store": str(place.folder / "short")}
    refused(place, "of 12 samples 2 cannot be projected (allowed with on_missing: skip)", source=short)
    place.project(source=short, on_missing="skip", store=str(place.folder / "skipped"))
    assert len(Store.open(place.folder / "skipped")) == len(ROWS) - 2
    refused(place, "cannot read the vocabulary map", map=str(place.folder / "nowhere"))
    rows = [{**row, "messages": row["messages"][1:]} for row in ROWS]
    (place.folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refused(
        place, "of 12 samples 12 cannot be projected", data={**run["data"], "path": str(place.folder / "other.jsonl")}
    )
