"""The network's loss and calibration against plain float64; what a folder keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fusemega.errors import UserError
from fusemega.switch.modes import ModesConfig
from fusemega.switch.network import SwitcherNetwork, calibration_error, fit_calibration, switch_loss
from fusemega.switch.switcher import Switcher, SwitcherConfig

RANDOM = np.random.default_rng(5)


def plain_scores(network: SwitcherNetwork, x: np.ndarray) -> np.ndarray:
    """The network in numpy, float64."""
    from math import erf, sqrt

    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    x = (x - state["mean_H"]) / state["std_H"]
    places = sorted({int(name.split(".")[1]) for name in state if name.startswith("layers.")})
    for place in places:
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
        if place != places[-1]:
            x = x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2)))
    return 1 / (1 + np.exp(-(state["scale_M"] * x + state["shift_M"])))


def plain_loss(s: np.ndarray, y: np.ndarray, weight: float) -> float:
    total = 0.0
    for (s0, s1), (y0, y1) in zip(s, y, strict=True):
        total += (s0 - y0) ** 2 + (s1 - y1) ** 2 + weight * ((s1 - s0) - (y1 - y0)) ** 2
    return total / len(s)


def test_scores_and_loss_are_those_of_plain_numbers() -> None:
    torch.manual_seed(0)
    network = SwitcherNetwork(6, [5, 3]).double().eval()
    x, y = RANDOM.normal(size=(7, 6)), RANDOM.random((7, 2))
    network.standardize(torch.from_numpy(x))
    network.scale_M.copy_(torch.tensor([0.5, 2.0]))
    network.shift_M.copy_(torch.tensor([0.1, -0.3]))
    found = network(torch.from_numpy(x))
    np.testing.assert_allclose(found.detach().numpy(), plain_scores(network, x), rtol=1e-12)
    for weight in (0.0, 1.0, 2.5):
        loss = switch_loss(found, torch.from_numpy(y), weight)
        assert float(loss) == pytest.approx(plain_loss(found.detach().numpy(), y, weight), rel=1e-12)


def test_the_gradient_of_the_loss() -> None:
    scores = torch.from_numpy(RANDOM.random((4, 2))).requires_grad_()
    rates = torch.from_numpy(RANDOM.random((4, 2)))
    assert torch.autograd.gradcheck(lambda s: switch_loss(s, rates, 1.5), [scores])


def test_a_feature_that_never_varies() -> None:
    network = SwitcherNetwork(2, [])
    network.standardize(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))
    assert network.std_H.tolist() == [1.0, 0.5] and network.mean_H.tolist() == [3.0, 1.5]


def test_calibration_finds_scale_and_shift() -> None:
    logits = torch.from_numpy(RANDOM.normal(scale=2.0, size=(4000, 2)))
    rates = torch.sigmoid(torch.tensor([0.5, 1.5]) * logits + torch.tensor([-0.4, 0.2]))
    scale, shift = fit_calibration(logits, rates)
    np.testing.assert_allclose(scale, [0.5, 1.5], atol=0.02)
    np.testing.assert_allclose(shift, [-0.4, 0.2], atol=0.02)
    before = calibration_error(torch.sigmoid(logits[:, 0]), rates[:, 0])
    after = calibration_error(torch.sigmoid(scale[0] * logits[:, 0] + shift[0]), rates[:, 0])
    assert after < 0.01 < before
    scale, shift = fit_calibration(torch.tensor([[-9.0, -9.0], [9.0, 9.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert (scale < 3).all(), "perfectly separated prompts do not send the scale to infinity"


def switcher(size: int = 4, **changes: object) -> Switcher:
    torch.manual_seed(1)
    config = {
        "weights": "w",
        "tokenizer": "t",
        "template": "c",
        "modes": ModesConfig(),
        "family": "enable_thinking",
        "size": size,
        "layer": "final",
        "pooling": "last",
        "prompt": "p",
        "dtype": "fp32",
        "hidden_sizes": [3],
    }
    return Switcher(SwitcherConfig.model_validate(config | changes), SwitcherNetwork(size, [3]).eval())


def test_a_folder_keeps_everything(tmp_path: Path) -> None:
    made, x = switcher(), RANDOM.normal(size=(3, 4))
    made.write(tmp_path / "s")
    read = Switcher.load(tmp_path / "s")
    assert read.config == made.config and (read.scores(x) == made.scores(x)).all()
    read.with_threshold(0.2, {"token_budget": 3}).write(tmp_path / "s")
    again = Switcher.load(tmp_path / "s")
    assert again.config.threshold == 0.2 and again.config.chosen == {"token_budget": 3}
    assert again.mode(np.array([0.1, 0.31])) == "long" and again.mode(np.array([0.1, 0.29])) == "short"
    assert again.mode(np.array([0.1, 0.29]), 0.1) == "long"
    (tmp_path / "s" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not a file of the switcher"):
        made.write(tmp_path / "s")


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no switcher"):
        Switcher.load(tmp_path)
    switcher().write(tmp_path / "s")
    config = json.loads((tmp_path / "s" / "switcher.json").read_text())
    (tmp_path / "s" / "switcher.json").write_text(json.dumps(config | {"hidden_sizes": [7]}))
    with pytest.raises(UserError, match="switcher.safetensors: damaged"):
        Switcher.load(tmp_path / "s")
    (tmp_path / "s" / "switcher.json").write_text(json.dumps(config | {"threshold": 3}))
    with pytest.raises(UserError, match="damaged: threshold"):
        Switcher.load(tmp_path / "s")
    (tmp_path / "s" / "switcher.json").write_text(json.dumps(config | {"format": 9}))
    with pytest.raises(UserError, match="format 9; this version reads 1"):
        Switcher.load(tmp_path / "s")
