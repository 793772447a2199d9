"""Hidden states of layers over a data set: those of transformers, for each sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.passes.batches import RowShape
from fusemega.passes.layers import Point
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.score import layer_states
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.sample import Sample


def test_states_of_every_sample(work: Path, tmp_path: Path) -> None:
    source = ModelSource(ModelConfig(load=str(work / "model"), dtype="fp32"), ParallelConfig(), 1)
    world = initialize(ParallelConfig())
    data = DataConfig(path=str(work / "chat.jsonl"), seq_length=96)
    dataset = prepare(data, source.tokenizer, tmp_path / "cache", vocab_size=source.vocab_size)
    gpt = source.build(world)
    shape = RowShape(96, 1, True, source.pad_id, 1)

    def see(point: Point, hidden_TH: Tensor, batch: MicroBatch, samples: list[Sample]) -> list[tuple[bytes, Tensor]]:
        parts = zip(samples, batch.bounds, strict=False)
        return [(sample.key, hidden_TH[start : start + len(sample.ids)].clone()) for sample, start in parts]

    points = [Point(0), Point(1, "input")]
    found: dict[Point, dict[bytes, Tensor]] = {point: {} for point in points}
    count = 0
    for count, seen in layer_states(gpt, dataset, range(len(dataset)), shape, points, see, world):  # noqa: B007
        for point, collected in seen.items():
            found[point].update(pair for pairs in collected for pair in pairs)
    assert count == len(dataset) > 20
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    for sample in dataset:
        with torch.no_grad():
            reference = model(torch.tensor(sample.ids[None].astype("int64")), output_hidden_states=True)
        for point in points:
            torch.testing.assert_close(found[point][sample.key], reference.hidden_states[1][0], rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="the model has 4 layers, counted from 0"):
        list(layer_states(gpt, dataset, [0], shape, [Point(4)], see, world))
    assert not gpt.chunks[0].decoder.layers[0]._forward_hooks, "hooks go with the pass"
