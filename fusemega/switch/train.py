"""`fusemega switch train`: the network, trained on labels and features, with early stop, from several seeds.

Shape suffixes: N prompts, H features, M modes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError
from fusemega.files.owned import check_replaceable
from fusemega.runtime.console import say
from fusemega.switch.families import MODES
from fusemega.switch.features import read_features
from fusemega.switch.labels import Labels, read_labels
from fusemega.switch.network import SwitcherNetwork, calibration_error, fit_calibration, switch_loss
from fusemega.switch.run_file import TRAIN, SwitchRun, TrainSettings
from fusemega.switch.switcher import KIND, Switcher, SwitcherConfig

_CLASS = 0.05  # a gain of the long mode from which a prompt counts as one for it; the default threshold
_FEWEST = 8  # prompts in each part of the training set


class Trained(BaseModel):
    """What the training found.

    Attributes:
        prompts, validation_prompts: that were trained on, and that decided when to end.
        seed: of the training that is kept.
        losses: seed -> lowest validation loss.
        constant_loss: validation loss of the training prompts' mean pass rates; a switcher that has learned something
            is below it.
        epochs: of the training that is kept, up to its best.
        squared_error: mode -> mean squared error of the scores on validation, after calibration.
        calibration_error: mode -> before and after calibration, on the same validation prompts.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    validation_prompts: int
    seed: int
    losses: dict[int, float]
    constant_loss: float
    epochs: int
    squared_error: dict[str, float]
    calibration_error: dict[str, tuple[float, float]]


def train(run: SwitchRun) -> Trained:
    """Trains on the labels and features of `prompts`, and writes OUT/switcher.

    Raises:
        UserError: labels or features are missing or do not fit each other; labels of one class only; too few prompts.
    """
    labels = read_labels(run.labels_file(TRAIN))
    check_replaceable(run.switcher, KIND)
    check_classes(labels)
    features_NH, manifest = read_features(run.features_store, labels.keys, labels.path)
    assert manifest.hidden is not None
    for name, value in (("tokenizer", manifest.tokenizer), ("template", manifest.template)):
        if labels.modes.get(name) != value:
            raise UserError(f"{labels.path}: labelled with another {name} than {run.features_store} was made with")
    if not manifest.hidden.prompt.startswith(f"{labels.modes['family']},"):
        raise UserError(
            f"{labels.path}: labelled with the modes {labels.modes['family']}, and {run.features_store} was made with "
            f"{manifest.hidden.prompt}"
        )
    rest, held = split(labels, run.train.validation)
    network, found = fit(features_NH, labels, rest, held, run.train)
    config = SwitcherConfig(
        weights=manifest.weights,
        tokenizer=manifest.tokenizer,
        template=str(manifest.template),
        modes=run.modes,
        family=labels.modes["family"],
        size=manifest.hidden.size,
        layer=manifest.hidden.layer,
        pooling=manifest.hidden.pooling,
        prompt=manifest.hidden.prompt,
        dtype=manifest.hidden.dtype,
        hidden_sizes=run.train.hidden_sizes,
        training={
            "labels": labels.digest,
            "settings": run.train.model_dump(mode="json"),
            "found": found.model_dump(mode="json"),
        },
    )
    Switcher(config, network).write(run.switcher)
    best = found.losses[found.seed]
    say(f"validation loss {best:.4f}, {found.constant_loss:.4f} with constant scores; seed {found.seed} is kept")
    if best >= found.constant_loss:
        say("the switcher is no better on validation than constant scores: it has learned nothing about the prompts")
    return found


def check_classes(labels: Labels) -> None:
    """Refuses labels from which no choice can be learned.

    Raises:
        UserError: says which mode would always be chosen.
    """
    gain_N = labels.gain_N
    better = int((gain_N >= _CLASS).sum())
    if better in (0, len(labels)):
        one = "the long mode is right more often on none" if not better else "the long mode is right more often on each"
        always = MODES[0] if not better else MODES[1]
        raise UserError(
            f"{labels.path}: labels of one class only: {one} of the {len(labels)} prompts (by {_CLASS:g} or more of "
            "the "
            f"responses), so there is nothing to choose; use the {always} mode, or label other prompts"
        )


def split(labels: Labels, share: float) -> tuple[list[int], list[int]]:
    """Places of the prompts to train on, and of those for validation. The keys decide, so more prompts change little.

    Raises:
        UserError: one of the parts would be too small.
    """
    order = sorted(range(len(labels)), key=lambda i: labels.keys[i])
    count = round(share * len(labels))
    if count < _FEWEST or len(labels) - count < _FEWEST:
        raise UserError(
            f"{labels.path}: {len(labels)} prompts with train.validation {share:g} leave {len(labels) - count} for "
            "training "
            f"and {count} for validation; allowed: at least {_FEWEST} each"
        )
    return sorted(order[count:]), sorted(order[:count])


def fit(
    features_NH: np.ndarray, labels: Labels, rest: list[int], held: list[int], settings: TrainSettings
) -> tuple[SwitcherNetwork, Trained]:
    """The best network of all seeds, calibrated, in evaluation mode.

    Args:
        features_NH: of all prompts of `labels`.
        rest, held: places of those to train on, and for validation.
    """
    features = torch.from_numpy(np.ascontiguousarray(features_NH)).float()
    rates = torch.from_numpy(labels.rates_NM).float()
    runs = {seed: _fit_one(features, rates, rest, held, settings, seed) for seed in settings.seeds}
    seed = min(runs, key=lambda each: runs[each][1])
    network, _, epochs = runs[seed]
    with torch.no_grad():
        before = network(features[held])
        if settings.calibrate:
            scale_M, shift_M = fit_calibration(network.logits(features[held]), rates[held])
            network.scale_M.copy_(scale_M)
            network.shift_M.copy_(shift_M)
        after = network(features[held])
        constant = rates[rest].mean(0).expand(len(held), -1)
        found = Trained(
            prompts=len(rest),
            validation_prompts=len(held),
            seed=seed,
            losses={each: loss for each, (_, loss, _) in runs.items()},
            constant_loss=float(switch_loss(constant, rates[held], settings.margin_weight)),
            epochs=epochs,
            squared_error=_by_mode(lambda m: float((after[:, m] - rates[held][:, m]).square().mean())),
            calibration_error=_by_mode(
                lambda m: tuple(calibration_error(each[:, m], rates[held][:, m]) for each in (before, after))
            ),
        )
    return network, found


def _by_mode(value: Any) -> Mapping[str, Any]:
    return {mode: value(place) for place, mode in enumerate(MODES)}


def _fit_one(
    features_NH: torch.Tensor,
    rates_NM: torch.Tensor,
    rest: list[int],
    held: list[int],
    settings: TrainSettings,
    seed: int,
) -> tuple[SwitcherNetwork, float, int]:
    """The network at its lowest validation loss, that loss, and the epoch; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SwitcherNetwork(features_NH.size(1), settings.hidden_sizes, settings.dropout)
        if settings.standardize:
            network.standardize(features_NH[rest])
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        rest_N = torch.tensor(rest)
        best, best_epoch, state = float("inf"), 0, copy.deepcopy(network.state_dict())
        for epoch in range(1, settings.max_epochs + 1):
            network.train()
            for places in rest_N[torch.randperm(len(rest))].split(settings.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = switch_loss(network(features_NH[places]), rates_NM[places], settings.margin_weight)
                loss.backward()
                optimizer.step()
            network.eval()
            with torch.no_grad():
                found = float(switch_loss(network(features_NH[held]), rates_NM[held], settings.margin_weight))
            if not np.isfinite(found):
                raise UserError(f"train: the validation loss is {found} in epoch {epoch}; lower train.lr")
            if found < best:
                best, best_epoch, state = found, epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= settings.patience:
                break
    network.load_state_dict(state)
    return network.eval(), best, best_epoch
