"""Deltas at the level of rounding: counted as a slow oracle counts them, and said in the report and once on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fusemega.hf.rounding import steps
from fusemega.merge.merge import Options
from tests.merge.conftest import base_tensors, entries, read_all, run_merge, tuned, write_folder

Family = Callable[..., tuple[Path, list[Path]]]


def _counted(base: torch.Tensor, model: torch.Tensor) -> tuple[int, int]:
    """The oracle: places of both in the list of all numbers of that type and sign."""
    every = torch.from_numpy(np.arange(1 << 16).astype(np.uint16).view(np.int16)).view(model.dtype)
    finite = every[torch.isfinite(every)].double().unique().tolist()  # sorted; 0 once
    place = {value: at for at, value in enumerate(finite)}
    pairs = list(zip(base.to(model.dtype).double().tolist(), model.double().tolist(), strict=True))
    apart = [abs(place[a] - place[b]) for a, b in pairs if a * b > 0 or a == b]
    return apart.count(0), apart.count(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_steps(dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(3000, generator=generator) * 0.1).to(base_dtype)
    base[:4] = torch.tensor([1.0, 0.0, 2.0, -1.0])  # at 1 and 2 a step down is half of a step up
    model = (base.float() + torch.randn(3000, generator=generator) * 3e-4).to(dtype)
    model[:4] = torch.tensor([1.0 - torch.finfo(dtype).eps / 2, 0.0, 2.0 - torch.finfo(dtype).eps, 1.0])
    found = steps(base, model)
    assert found == _counted(base, model)
    assert min(found) > 100 and sum(found) < 2990
    assert steps(base[:4].clone(), model[:4]) == (1, 2)


@pytest.mark.parametrize(("rms", "told"), [(1e-4, True), (3e-3, False)])
def test_the_report_says_it(rms: float, told: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first model is of fp32 and the second of bf16; what neither trained does not count."""
    base = base_tensors(dtype=torch.bfloat16)
    frozen = {name: value for name, value in base.items() if "embed" in name}
    models = [tuned({k: v.float() for k, v in base.items()}, 0, rms), tuned(base, 1, rms) | frozen]
    folders = [write_folder(tmp_path / f"m{j}", model) for j, model in enumerate(models)]
    run = {"merge_method": "varm", "base_model": str(write_folder(tmp_path / "base", base)), "dtype": "bfloat16"}
    out = run_merge(tmp_path / "out", Options(workers=1), **run, models=entries(folders))
    report = json.loads((out / "merge_report.json").read_text())
    trained = [name for name in base if name not in frozen]
    flat = [torch.cat([tensors[name].flatten() for name in trained]) for tensors in (base, read_all(folders[1]))]
    zero, one = _counted(*flat)
    (said,) = report["rounding"]
    assert said["model"] == str(folders[1]) and said["at_rounding_level"] is told
    assert said["unchanged"] == pytest.approx(zero / len(flat[0]), abs=1e-12)
    assert said["within_one_step"] == pytest.approx((zero + one) / len(flat[0]), abs=1e-12)
    row = next(row for row in report["tensors"] if row["tensor"] in frozen)
    assert row["unchanged"] == row["within_one_step"] == [None, 1.0]
    lines = [line for line in capfd.readouterr().err.splitlines() if "level of rounding" in line]
    assert len(lines) == sum("level of rounding" in note for note in report["notes"]) == told
    assert all(f"warning: {folders[1]}: " in line and "training.export_dtype: fp32" in line for line in lines)
    assert "Deltas near rounding" in (out / "merge_report.html").read_text()
    again = run_merge(tmp_path / "again", Options(workers=1, block_elements=1), **run, models=entries(folders))
    assert (again / "merge_report.json").read_bytes() == (out / "merge_report.json").read_bytes()


def test_fp32_models_are_not_counted(family: Family, tmp_path: Path) -> None:
    base, models = family(rms=(1e-6,))
    out = run_merge(tmp_path / "out", merge_method="linear", base_model=str(base), models=entries(models, weight=[1.0]))
    report = json.loads((out / "merge_report.json").read_text())
    assert report["rounding"] == [] and "unchanged" not in report["tensors"][0]
