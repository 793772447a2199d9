"""Training runs of the parts: a run file's sections, a trainer that takes steps, its gradients and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fusemega.config import validate
from fusemega.files.cache import cache_folder
from fusemega.files.json_files import read_json
from fusemega.models.build import placements
from fusemega.scoring.teach import TeachRun, teach
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from gpu.models import SEED


def run_file(
    output: Path,
    model: Path,
    data: Path | list[str],
    objective: Mapping[str, Any],
    *,
    dtype: str,
    seq_length: int,
    training: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    **model_settings: Any,
) -> TrainRun:
    """A run of these settings: constant learning rate, no clipping, no export."""
    sections = {
        "output_dir": str(output),
        "model": {"load": str(model), "dtype": dtype, **model_settings},
        "data": {"path": data if isinstance(data, list) else str(data), "seq_length": seq_length},
        "objective": dict(objective),
        "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "clip_grad": 0.0, **(optimizer or {})},
        "training": {"seed": SEED, "export_hf": False, **training},
    }
    return validate(TrainRun, sections, output.name)


@contextmanager
def opened(run: TrainRun) -> Iterator[Trainer]:
    """A trainer before its first step."""
    trainer, _ = open_trainer(run)
    with trainer.batches:
        yield trainer


def loss_of(values: Mapping[str, float]) -> float:
    """The loss of a step, from its metrics: their sum where there are several terms."""
    if "loss" in values:
        return values["loss"]
    (found,) = [value for name, value in values.items() if name.endswith(" loss")]
    return found


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Name of the Hugging Face tensor, or of the first that a parameter is made of -> copy on the CPU, float64."""
    return {
        next(iter(placement.rule.hf_shapes())): placement.parameter.detach().cpu().double()
        for placement in placements(trainer.gpt, trainer.world)
    }


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The same of the gradients of the step just done."""
    found = {}
    for placement in placements(trainer.gpt, trainer.world):
        parameter: Any = placement.parameter
        found[next(iter(placement.rule.hf_shapes()))] = parameter.main_grad.detach().cpu().double()
    return found


def store_rows(
    store: Path, model: Path, data: Path | list[str], *, dtype: str, seq_length: int, **settings: Any
) -> Path:
    """`fusemega teach`: the model's rows of the data. Returns `store`."""
    sections = {
        "model": {"load": str(model), "dtype": dtype},
        "data": {"path": data if isinstance(data, list) else str(data), "seq_length": seq_length},
        "store": str(store),
        **settings,
    }
    teach(validate(TeachRun, sections, store.name))
    return store


def samples(model: Path, data: Path, seq_length: int) -> TokenizedDataset:
    """The samples that a run on that data has."""
    config = DataConfig(path=str(data), seq_length=seq_length)
    vocab_size = read_json(model / "config.json")["vocab_size"]
    return prepare(config, Tokenizer.load(model), cache_folder() / "data", vocab_size=vocab_size)
