"""Whole training steps on a GPU, as far as they can be seen without one (tests/pretended_gpu.py)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tiny
from fusemega.config import validate
from fusemega.losses.registry import objective_names
from fusemega.runtime import shared_prompts
from fusemega.runtime.segments import Segments
from fusemega.scoring.teach import TeachRun, teach
from fusemega.training.assembly import open_trainer
from fusemega.training.callbacks import Callback
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer
from tests.losses.preferences import write_sources
from tests.pretended_gpu import GPU, Place, Watch, pretended_gpu

MakeRun = Callable[..., TrainRun]

IN_EVERY_STEP = Counter[Place](
    {
        ("fusemega/training/trainer.py", "_update"): 1,  # loss, terms and counts together
        ("core/optimizer/clip_grads.py", "get_grad_norm_fp32"): 1,
    }
)
"""Where the host waits for the device in a step, whatever the model, the objective and the number of micro-batches."""
BESIDES = {
    # In each chunk of the head: whether equal logits lie across the border of the most probable ones.
    "merge": Counter[Place]({("fusemega/logits/topk.py", "_local_largest"): 2}),
}
"""And in two micro-batches of an objective."""


@pytest.fixture(scope="module")
def folder(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, two stores of it, and rows of several responses."""
    place = tmp_path_factory.mktemp("gpu")
    few = (work / "chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    (place / "few.jsonl").write_text("".join(few), encoding="utf-8")
    write_sources(place / "sources.jsonl", work / "chat.jsonl")
    tiny.write_model(place / "model", work / "chat.jsonl", num_hidden_layers=2)
    for name in ("store", "other"):
        run = {
            "model": {"load": str(place / "model"), "dtype": "fp32"},
            "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
            "store": str(place / name),
            "top_k": 4,
        }
        teach(validate(TeachRun, run, "teach"))
    return place


@pytest.fixture
def watch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    with pretended_gpu(monkeypatch) as watch:
        yield watch


class Steps(Callback):
    """Notes where the host waits in each step and in the callbacks before this one: `waits`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.waits: list[Counter[Place]] = []

    def on_start(self, trainer: Trainer) -> None:
        self._watch.collectives.clear()

    def on_step_begin(self, trainer: Trainer) -> None:
        self.waits.append(Counter(self._watch.waits))
        self._watch.waits.clear()

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.on_step_begin(trainer)


def fitted(run: TrainRun, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, Counter[Place]]:
    """The trainer after two steps of two micro-batches, without a checkpoint; and the waits of the second.

    In the first step a few tables are copied to the device.
    """
    trainer, _ = open_trainer(run)
    assert trainer.world.device == GPU
    seen = Steps(watch)
    trainer.callbacks.append(seen)
    monkeypatch.setattr(trainer, "save", lambda last: None)
    assert len(trainer.data.step(1).micro_batches) == 2
    assert trainer.fit() == 0
    return trainer, seen.waits[-1]


def objective(name: str, folder: Path) -> dict[str, Any]:
    """A section for each name; those that can take a second model in the job have one."""
    store, model = str(folder / "store"), {"load": str(folder / "model"), "dtype": "bf16"}
    sections: dict[str, dict[str, Any]] = {
        "sft": {},
        "distill": {"store": store},
        "fuse": {"teachers": [{"store": store}, {"store": str(folder / "other")}], "fusion": {"function": "avg_ce"}},
        "online_distill": {"teacher": model},
        "chunk": {"store": store},
        "merge": {"store": store},
        "project_student": {"store": store, "tokenizer": str(folder / "model")},
        "dpo": {"reference": {"in_job": model}, "rpo_alpha": 0.5, "ld_alpha": 0.5},
        "simpo": {},
        "orpo": {},
        "rloo": {"reference": {"in_job": model}},
        "wrpo": {"reference": {"in_job": model}, "target": "target"},
        "fuse_sft": {},
        "fuse_po": {"reference": {"in_job": model}, "beta": 0.5},
        "reward": {"center_rewards_coefficient": 0.01},
    }
    return {"name": name, **sections[name]}


@pytest.fixture
def run_of(make_run: MakeRun, folder: Path) -> MakeRun:
    """`make_run` for an objective by name, in bf16."""

    def make(name: str, **sections: Any) -> TrainRun:
        section = objective(name, folder)
        is_text = "store" in section or name in ("sft", "fuse", "online_distill")
        data = {} if is_text else {"path": str(folder / "sources.jsonl"), "seq_length": 512}
        training = {"train_iters": 2, "global_batch_size": 2, "packing": False} | sections.pop("training", {})
        model = {"load": str(folder / "model"), "dtype": "bf16"}
        return make_run(objective=section, model=model, data=data, training=training, **sections)

    return make


@pytest.mark.parametrize("name", objective_names())
def test_a_step_of_each_objective(name: str, run_of: MakeRun, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that meets a tensor of the device is there too, and the host waits no more often than it must."""
    trainer, waits = fitted(run_of(name), watch, monkeypatch)
    assert watch.mixed == []
    assert waits == IN_EVERY_STEP + BESIDES.get(name, Counter())
    assert watch.collectives and {kind for _, kinds in watch.collectives for kind in kinds} == {"meta"}
    (inner,) = trainer.optimizer.chained_optimizers
    state = [each for held in inner.optimizer.state.values() for each in held.values()]
    assert state and all(each.device == GPU for each in (*trainer.gpt.parameters(), *state))


@pytest.mark.parametrize(
    ("name", "file", "place"), [("sft", "few", "evaluation.py"), ("simpo", "sources", "preferences.py")]
)
def test_held_out_data(
    name: str, file: str, place: str, run_of: MakeRun, folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation waits once, for its result; recomputed layers never."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    held_out = {"data": {"path": str(folder / f"{file}.jsonl"), "seq_length": 512}, "interval": 1}
    _, waits = fitted(run_of(name, training=recompute, evaluation=held_out), watch, monkeypatch)
    assert watch.mixed == []
    function = {"sft": "evaluate_model", "simpo": "evaluate_groups"}[name]
    assert waits == IN_EVERY_STEP + Counter({(f"fusemega/scoring/{place}", function): 1})


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (0, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "context": (0, {"context_parallel_size": 2}),
    "pipeline": (1, {"pipeline_model_parallel_size": 2}),
}
"""A rank of two, and the layout."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_of_two(layout: str, run_of: MakeRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of each collective are on the device."""
    rank, parallel = LAYOUTS[layout]
    run = run_of("dpo", parallel=parallel)
    with pretended_gpu(monkeypatch, rank, ranks=2) as watch:
        _, waits = fitted(run, watch, monkeypatch)
    assert watch.mixed == []
    assert waits == IN_EVERY_STEP
    assert watch.collectives and {kind for _, kinds in watch.collectives for kind in kinds} == {"meta"}


def test_the_mask_of_a_row_with_shared_prompts(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "_compiled", lambda function: function)
    segments = Segments([0, 4, 6, 8, 9], [(0, 0), (0, 4), (0, 4), (0, 0)])
    mask = shared_prompts._block_mask(segments, 3, GPU)
    assert mask.kv_num_blocks.device == GPU and not watch.waits and not watch.mixed


def test_what_is_seen(watch: Watch) -> None:
    """The tests above see nothing of their own: each of these is noticed once, and what needs no wait is not."""
    x, mask = torch.zeros(3, device="cuda"), torch.zeros(3, dtype=torch.bool, device=GPU)
    host = torch.zeros(3)
    assert x.is_cuda and x.device == GPU and not host.is_cuda and x.type() == "torch.cuda.FloatTensor"
    waits: list[Callable[[], object]] = [
        lambda: x[0].item(),
        lambda: float(x[0]),
        lambda: bool(mask.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.to("cpu", non_blocking=True),
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: x.masked_select(mask),
        lambda: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda")),
        lambda: torch.equal(x, x),
        lambda: host.cuda(),
        lambda: host.to(GPU, non_blocking=True),
        lambda: host.pin_memory().to(GPU),
        lambda: x.copy_(host),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: x.new_tensor([1.0]),
        lambda: torch.cuda.synchronize(),
    ]
    for number, wait in enumerate(waits):
        watch.waits.clear()
        wait()
        assert watch.waits.total() == 1, number
    watch.waits.clear()
    host.pin_memory().to(GPU, non_blocking=True)
    x[mask] = 1.0
    torch.full((), 2.0, device="cuda").add_(x.sum() * 3.0)
    x.new_full((1,), 2.0)
    x.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda"), output_size=3)
    assert not watch.waits and not watch.mixed
    for number, mix in enumerate(
        (lambda: torch.stack([x[0], host[0]]), lambda: x[torch.zeros(1, dtype=torch.int64)], lambda: x + host)
    ):
        with contextlib.suppress(RuntimeError):
            mix()
        assert len(watch.mixed) == number + 1
