"""Every method against a dense float64 oracle, under every block size and worker count; and what must always hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusemega.merge import select
from fusemega.merge.merge import Options
from fusemega.merge.method import Block, Job, PartialPass, TensorSpec, find_method, method_names
from fusemega.merge.methods.dare import uniform
from fusemega.merge.methods.della import keep_probabilities
from tests.merge import oracles
from tests.merge.conftest import base_tensors, entries, read_all, run_merge, tuned, write_folder

Family = Callable[..., tuple[Path, list[Path]]]
Oracle = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]
WEIGHTS = [0.5, 0.3125, 0.4375]  # exact in binary: a tied election is tied in every precision
DENSITY = [0.6, 0.3, 0.9]

# name -> (method, parameters of the run, of each model, oracle)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Sequence[Any]], Oracle]] = {
    "linear": ("linear", {}, {"weight": WEIGHTS}, lambda b, m: oracles.linear(b, m, WEIGHTS)),
    "linear-sum": (
        "linear",
        {"normalize": False},
        {"weight": [0.5, 0.7, -0.2]},
        lambda b, m: oracles.linear(b, m, [0.5, 0.7, -0.2], False),
    ),
    "task_arithmetic": (
        "task_arithmetic",
        {"lambda": 1.5},
        {"weight": WEIGHTS},
        lambda b, m: oracles.task_arithmetic(b, m, WEIGHTS, scale=1.5),
    ),
    "task_arithmetic-normalized": (
        "task_arithmetic",
        {"normalize": True},
        {"weight": WEIGHTS},
        lambda b, m: oracles.task_arithmetic(b, m, WEIGHTS, True),
    ),
    "ties": (
        "ties",
        {},
        {"weight": WEIGHTS, "density": DENSITY},
        lambda b, m: oracles.ties(b, m, WEIGHTS, DENSITY),
    ),
    "ties-sum": (
        "ties",
        {"normalize": False, "density": 0.5},
        {"weight": [0.5, -0.3125, 0.4375]},
        lambda b, m: oracles.ties(b, m, [0.5, -0.3125, 0.4375], [0.5] * 3, False),
    ),
    "varm": ("varm", {}, {}, oracles.varm),
    "varm-parameter": ("varm", {"granularity": "parameter"}, {}, oracles.varm_parameter),
    **{
        f"{variant}-{tau}": (
            variant,
            {"select_topk": tau},
            {},
            lambda b, m, tau=tau, variant=variant: oracles.sce(b, m, tau, variant)[0],  # type: ignore[misc]
        )
        for variant in ("sce", "sce_paper", "sce_mergekit")
        for tau in (0.0, 0.1, 1.0)
    },
}


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@pytest.mark.parametrize("real", [False, True], ids=["random", "real"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_float64_oracle(
    case: str, dtype: torch.dtype, real: bool, family: Family, real_family: Family, tmp_path: Path
) -> None:
    method, parameters, each, oracle = CASES[case]
    # bf16 keeps 8 bits of weights around 0.3: smaller changes than this would leave most of them as they were.
    rms = (1e-5, 1e-3, 1e-2) if dtype == torch.float32 else (2e-3, 5e-3, 1e-2)
    config = {"dtype": dtype, "num_hidden_layers": 1}
    base, models = real_family(**config) if real else family(rms=rms, **config)
    out = run_merge(
        tmp_path / "out",
        Options(workers=2, block_elements=1),
        merge_method=method,
        base_model=str(base),
        models=entries(models, **each),
        parameters=parameters,
    )
    merged, parts, before = read_all(out), [read_all(model) for model in models], read_all(base)
    assert merged.keys() == before.keys()
    for name, value in merged.items():
        expected = torch.from_numpy(np.asarray(oracle(_wide(before[name]), [_wide(part[name]) for part in parts])))
        assert value.dtype == dtype
        if dtype == torch.float32:
            assert (value.double() - expected).abs().max() <= 1e-6, name
        else:
            # Within one rounding: fp32 sums, then bf16, may fall on the other side of a midpoint than float64 does.
            error = (value.double() - expected).abs()
            assert (error <= expected.abs() * 2**-8 * (1 + 1e-4) + 1e-7).all(), name
            assert (value == expected.to(dtype)).float().mean() > 0.95, name


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rms", [1e-3, 0.5], ids=["parallel", "apart"])
def test_slerp(t: float, rms: float, family: Family, tmp_path: Path) -> None:
    base, models = family(rms=(rms,))
    run: dict[str, Any] = {"merge_method": "slerp", "base_model": str(base), "models": entries(models)}
    out = run_merge(tmp_path / "out", **run, parameters={"t": t})
    merged, before, other = read_all(out), read_all(base), read_all(models[0])
    for name, value in merged.items():
        expected = oracles.slerp(_wide(before[name]), [_wide(other[name])], t)
        assert np.abs(_wide(value) - expected).max() <= 1e-6, name
    report = json.loads((out / "merge_report.json").read_text())
    assert (min(row["cosine"] for row in report["tensors"]) > 0.9995) == (rms == 1e-3)


def test_varm_over_layers_and_the_model(family: Family, tmp_path: Path) -> None:
    base, models = family()
    before, parts = read_all(base), [read_all(model) for model in models]
    for granularity in ("layer", "model"):
        out = run_merge(
            tmp_path / granularity,
            merge_method="varm",
            base_model=str(base),
            models=entries(models),
            parameters={"granularity": granularity},
        )
        units: dict[str, list[str]] = {}
        for name in before:
            layer = name.split(".")[2] if ".layers." in name else name
            units.setdefault(layer if granularity == "layer" else "all", []).append(name)
        merged = read_all(out)
        for names in units.values():
            squares = [sum(float(((_wide(p[n]) - _wide(before[n])) ** 2).sum()) for n in names) for p in parts]
            for name in names:
                expected = sum(s / sum(squares) * _wide(p[name]) for s, p in zip(squares, parts, strict=True))
                assert np.abs(_wide(merged[name]) - expected).max() <= 1e-6, (granularity, name)


def _drop_oracle(method: str, base: np.ndarray, models: list[np.ndarray], name: str, seed: int) -> np.ndarray:
    """DARE and DELLA given the same random numbers, drawn at once for the whole tensor."""
    deltas = []
    for number, (model, density) in enumerate(zip(models, DENSITY, strict=True)):
        delta = model - base
        keep = np.full(delta.shape, density)
        if method == "della":
            for row in np.ndindex(delta.shape[:-1]):
                order = sorted(range(delta.shape[-1]), key=lambda i: (abs(delta[row][i]), i))
                for rank, i in enumerate(order):
                    keep[(*row, i)] = density - 0.1 + 0.2 * rank / (len(order) - 1)
        spec = TensorSpec(name, delta.shape)
        random = uniform(seed, spec, number, 0, delta.size).numpy().reshape(delta.shape)
        deltas.append(np.where(random < keep.astype(np.float32), delta / keep, 0.0))
    if method == "dare_linear":
        return base + sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
    return oracles.by_sign(base, deltas, WEIGHTS, normalize=method == "della")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_random_masks(method: str, family: Family, tmp_path: Path) -> None:
    base, models = family(num_hidden_layers=1)
    each: dict[str, Sequence[Any]] = {"weight": WEIGHTS, "density": DENSITY}
    if method == "della":
        each["epsilon"] = [0.1] * 3
    run = {"merge_method": method, "base_model": str(base), "models": entries(models, **each), "seed": 7}
    merged = read_all(run_merge(tmp_path / "out", Options(block_elements=1), **run))
    before, parts = read_all(base), [read_all(model) for model in models]
    for name, value in merged.items():
        expected = _drop_oracle(method, _wide(before[name]), [_wide(part[name]) for part in parts], name, 7)
        assert np.abs(_wide(value) - expected).max() <= 1e-6, name
    other = read_all(run_merge(tmp_path / "other", **{**run, "seed": 8}))
    assert any(not torch.equal(merged[name], other[name]) for name in merged)


def test_random_numbers_belong_to_places() -> None:
    spec = TensorSpec("a", (4, 1000))
    whole = uniform(3, spec, 1, 0, 4000)
    assert torch.equal(uniform(3, spec, 1, 1024, 512), whole[1024:1536])
    for other in (uniform(4, spec, 1, 0, 4000), uniform(3, spec, 2, 0, 4000)):
        assert not torch.equal(other, whole)
    assert not torch.equal(uniform(3, TensorSpec("b", (4, 1000)), 1, 0, 4000), whole)
    assert abs(float(whole.mean()) - 0.5) < 0.02 and float(whole.min()) >= 0 and float(whole.max()) < 1


def test_della_keeps_the_large_more_often() -> None:
    keep = keep_probabilities(torch.tensor([[0.1, -3.0, 2.0], [0.0, 0.0, 0.0]]), 0.5, 0.2)
    assert torch.allclose(keep, torch.tensor([[0.3, 0.7, 0.5], [0.3, 0.5, 0.7]]))


def _settings(method: str, count: int) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Settings under which each method says something of its own, for `count` models."""
    keys = {info.alias or name for name, info in find_method(method).ModelSettings.model_fields.items()}
    values: dict[str, Any] = {"weight": [0.2 + 0.1 * j for j in range(count)], "density": [0.6] * count}
    shared = {"slerp": {"t": 0.4}}.get(method, {"select_topk": 0.2} if method.startswith("sce") else {})
    return shared, {key: value for key, value in values.items() if key in keys}


@pytest.mark.parametrize("method", method_names())
def test_no_block_size_nor_worker_count_changes_a_bit(method: str, family: Family, tmp_path: Path) -> None:
    base, models = family(rms=(1e-3,) if method == "slerp" else (1e-3, 2e-3, 4e-3), dtype=torch.bfloat16)
    shared, each = _settings(method, len(models))
    run: dict[str, Any] = {"merge_method": method, "base_model": str(base), "models": entries(models, **each)}
    first = None
    for number, (workers, block) in enumerate(((1, None), (1, 1), (4, 1), (3, 20_000), (2, 1 << 22))):
        out = run_merge(tmp_path / str(number), Options(workers, block), **run, parameters=shared)
        content = {file.name: file.read_bytes() for file in sorted(out.iterdir())}
        first = first or content
        assert content == first, (workers, block)


@pytest.mark.parametrize("method", [name for name in method_names() if not name.startswith(("dare", "della"))])
def test_equal_models_give_the_model(method: str, tmp_path: Path) -> None:
    base = base_tensors(num_hidden_layers=1)
    model = tuned(base, 1, 3e-3)
    count = 1 if method == "slerp" else 3
    folders = [write_folder(tmp_path / str(j), model, num_hidden_layers=1) for j in range(count)]
    base_folder = write_folder(tmp_path / "base", base, num_hidden_layers=1)
    parameters: dict[str, Any] = {"slerp": {"t": 1.0}, "task_arithmetic": {"normalize": True}}.get(method, {})
    each = {"weight": [1.0] * 3} if "weight" in find_method(method).ModelSettings.model_fields else {}
    out = run_merge(
        tmp_path / "out",
        merge_method=method,
        base_model=str(base_folder),
        models=entries(folders, **each),
        parameters=parameters,
    )
    for name, value in read_all(out).items():
        assert (value - model[name]).abs().max() <= 3e-7, name


@pytest.mark.parametrize("method", ["varm", "sce", "sce_paper", "sce_mergekit"])
def test_elements_on_which_the_models_agree_count_too(method: str, tmp_path: Path) -> None:
    base = base_tensors(num_hidden_layers=1)
    models = []
    for second in (2.0, 0.0):  # deltas (1, 1) in one half of each tensor, and (2, 0) in the other
        change = {name: torch.ones_like(value) for name, value in base.items()}
        for value in change.values():
            value.view(-1)[: value.numel() // 2] = second
        model = {name: value + change[name] for name, value in base.items()}
        models.append(write_folder(tmp_path / f"m{second}", model, num_hidden_layers=1))
    folder = write_folder(tmp_path / "base", base, num_hidden_layers=1)
    out = run_merge(tmp_path / "out", merge_method=method, base_model=str(folder), models=entries(models))
    even = [r for r in json.loads((out / "merge_report.json").read_text())["tensors"] if math.prod(r["shape"]) % 2 == 0]
    for row in even:
        assert np.allclose(row["coefficients"], [5 / 6, 1 / 6], atol=1e-6), row["name"]
    merged = read_all(out)["model.norm.weight"] - base["model.norm.weight"]
    high = {"varm": 10 / 6, "sce": 2.0, "sce_paper": 10 / 6, "sce_mergekit": 2.0}[method]  # the others renormalise
    assert torch.allclose(merged, torch.tensor([high] * 48 + [1.0] * 48), atol=1e-6)


def test_a_density_of_one_keeps_everything(family: Family, tmp_path: Path) -> None:
    base, models = family(num_hidden_layers=1)
    merged = {}
    for method in ("ties", "dare_ties", "della"):
        run = {"merge_method": method, "base_model": str(base), "parameters": {"normalize": True}}
        merged[method] = read_all(run_merge(tmp_path / method, **run, models=entries(models, weight=WEIGHTS)))
    for name, value in merged["ties"].items():
        assert torch.equal(value, merged["dare_ties"][name]) and torch.equal(value, merged["della"][name]), name


@pytest.mark.parametrize("method", ["varm", "sce", "sce_paper", "sce_mergekit"])
def test_coefficients_sum_to_one_and_follow_the_models(method: str, family: Family, tmp_path: Path) -> None:
    base, models = family(rms=(1e-3, 4e-3, 2e-3))
    order = [2, 0, 1]
    reports = []
    for name, chosen in (("a", models), ("b", [models[j] for j in order])):
        out = run_merge(tmp_path / name, merge_method=method, base_model=str(base), models=entries(chosen))
        reports.append((json.loads((out / "merge_report.json").read_text())["tensors"], read_all(out)))
    for row, permuted in zip(reports[0][0], reports[1][0], strict=True):
        assert abs(sum(row["coefficients"]) - 1) < 1e-12
        assert [row["coefficients"][j] for j in order] == permuted["coefficients"]
        assert len(set(row["coefficients"])) == 3
    for name, value in reports[0][1].items():
        assert (value - reports[1][1][name]).abs().max() <= 2e-7


@pytest.mark.parametrize("method", method_names())
def test_zero_deltas_give_the_base(method: str, family: Family, tmp_path: Path) -> None:
    base, _ = family(rms=())
    copies = [base] if method == "slerp" else [base, base]
    models = [write_folder(tmp_path / f"copy{j}", read_all(folder)) for j, folder in enumerate(copies)]
    shared, each = _settings(method, len(models))
    out = run_merge(
        tmp_path / "out",
        merge_method=method,
        base_model=str(base),
        models=entries(models, **each),
        parameters=shared,
    )
    before = read_all(base)
    for name, value in read_all(out).items():
        assert (value - before[name]).abs().max() <= 3e-7, name


# name -> (MAX_MEMBERS, the parts that are sampled or None for all, slack of the rough keys)
SELECTIONS: dict[str, tuple[int, list[tuple[int, int]] | None, float]] = {
    "all sampled": (1 << 22, None, 0.0),
    "sampled": (1 << 22, [(start, 1024) for start in range(0, 100_000, 12_800)], 0.0),
    "sampled, rough": (1 << 22, [(start, 1024) for start in range(0, 100_000, 12_800)], 1e-3),
    "misleading sample": (1 << 22, [(0, 4096)], 0.0),
    "misleading sample, rough": (1 << 22, [(0, 4096)], 1e-3),
    "too many within": (0, None, 0.0),
    "too many within, rough": (0, None, 1e-3),
}


@pytest.mark.parametrize("case", SELECTIONS)
@pytest.mark.parametrize("quanta", [3, 50, 10**6])
def test_selection_equals_the_stable_sort(case: str, quanta: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, pieces, slack = SELECTIONS[case]
    monkeypatch.setattr(select, "MAX_MEMBERS", limit)
    if pieces is not None:
        monkeypatch.setattr(select, "_pieces", lambda elements: pieces)
    generator = torch.Generator().manual_seed(quanta)
    keys = [
        torch.randint(0, quanta, (100_000,), generator=generator).float() / quanta * scale for scale in (1.0, 1e-12)
    ]
    for key in keys:
        key[:4096] *= 1e-3 if "misleading" in case else 1.0
    rough = [key * (1 + slack * (torch.rand(key.shape, generator=generator) * 1.8 - 0.9)) for key in keys]
    edges = [0, 16384, 32768, 90112, 100_000]
    spec = TensorSpec("x", (100_000,))

    def block(index: int, start: int, end: int) -> Block:
        return Block(spec, index, start, None, [key[start:end] for key in rough])

    def exact(block: Block, stream: int, places: np.ndarray) -> np.ndarray:
        return keys[stream].numpy()[block.start + places]

    ranked = select.Keys(Block.models, exact if slack else None, slack)
    blocks = [block(i, a, b) for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))]
    most = 0
    most_k = min(int(key.count_nonzero()) for key in keys) if slack else 100_000
    for k in (0, 1, 777, 50_000, min(99_999, most_k), most_k):
        steps = select.select_largest(Job([spec], None, [], 0), ranked, lambda nonzero, k=k: [k, k])  # type: ignore[misc]
        passes, answer = 0, None
        while True:
            try:
                step = steps.send(answer)  # type: ignore[arg-type]
            except StopIteration as end:
                selections = end.value
                break
            passes += 1
            if isinstance(step, PartialPass):
                answer = [step.measure(block(0, start, start + count)) for start, count in step.pieces]
            else:
                answer = [step(block) for block in blocks]
        most = max(most, passes)
        for key, selection in zip(keys, selections, strict=True):
            expected = key.argsort(descending=True, stable=True)[:k]
            if slack:
                for _ in range(2):  # found, then remembered
                    places = np.concatenate([selection.places(b) + b.start for b in blocks])
                    assert np.array_equal(places, np.sort(expected.numpy())), k
                continue
            for wide in (key, key.double()):
                trimmed = torch.cat([selection.trim(b, wide[b.start :][: len(b.stored[0])].clone()) for b in blocks])
                assert torch.equal(trimmed, torch.zeros_like(wide).index_copy_(0, expected, wide[expected])), k
    assert most == (2 if case.startswith(("all", "sampled")) else 4)
