"""A trained switcher on disk: a folder with `switcher.safetensors`, `switcher.json` and the list of its files.

switcher.json says for which model, template and modes it is, how its features are read, how it was trained, and the
threshold. A switcher is refused where any of the first three is another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import INSIDE, publish, scratch
from fusemega.files.owned import check_replaceable, remove_listed, write_list
from fusemega.store import Manifest
from fusemega.switch.families import LONG, SHORT
from fusemega.switch.modes import Modes, ModesConfig
from fusemega.switch.network import SwitcherNetwork

WEIGHTS, CONFIG, KIND = "switcher.safetensors", "switcher.json", "switcher"
_FORMAT = 1


class SwitcherConfig(Section):
    """switcher.json.

    Attributes:
        format: of this file.
        weights, tokenizer, template: hashes of the model, as in the features' manifest.
        modes: how the modes are chosen.
        family: the family that this came to.
        size, layer, pooling, prompt, dtype: of the features, as in their manifest.
        hidden_sizes: of the network.
        threshold: the long mode is chosen where its score is at least so much higher.
        chosen: how the threshold was chosen; None: it is the default.
        training: what the training was and found.
    """

    format: int = _FORMAT
    weights: str
    tokenizer: str
    template: str
    modes: ModesConfig
    family: str
    size: int = Field(ge=1)
    layer: str
    pooling: str
    prompt: str
    dtype: str
    hidden_sizes: list[int]
    threshold: float = Field(0.05, ge=-1, le=1)
    chosen: dict[str, Any] | None = None
    training: dict[str, Any] = {}


@dataclass(frozen=True)
class Switcher:
    """A trained switcher.

    Attributes:
        config: what it is.
        network: in evaluation mode, on the CPU, fp32.
        path: its folder, for messages.
    """

    config: SwitcherConfig
    network: SwitcherNetwork
    path: str = "the switcher"

    @classmethod
    def load(cls, folder: str | Path) -> Switcher:
        """Reads a folder.

        Raises:
            UserError: no switcher there, or a damaged one.
        """
        path = Path(folder)
        if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
            raise UserError(f"{folder}: no switcher ({CONFIG} and {WEIGHTS}); run `fusemega switch train` first")
        content = read_json(path / CONFIG)
        if content.get("format") != _FORMAT:
            raise UserError(f"{path / CONFIG}: format {content.get('format')!r}; this version reads {_FORMAT}")
        try:
            config = SwitcherConfig.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path / CONFIG}: damaged: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
        network = SwitcherNetwork(config.size, config.hidden_sizes)
        try:
            network.load_state_dict(load_file(path / WEIGHTS))
        except Exception as error:  # safetensors and torch raise anything
            raise UserError(f"{path / WEIGHTS}: damaged: {str(error).splitlines()[0]}") from None
        return cls(config, network.eval(), str(folder))

    @torch.no_grad()
    def scores(self, features_NH: np.ndarray | torch.Tensor) -> np.ndarray:
        """float64 [N, M]: the expected pass rates of the short and the long mode."""
        found: np.ndarray = self.network(torch.as_tensor(features_NH, dtype=torch.float32)).double().numpy()
        return found

    def mode(self, scores_M: np.ndarray, threshold: float | None = None) -> str:
        """The mode that one prompt's scores choose."""
        limit = self.config.threshold if threshold is None else threshold
        return LONG if scores_M[1] - scores_M[0] >= limit else SHORT

    def with_threshold(self, threshold: float, chosen: Mapping[str, Any]) -> Switcher:
        """The same with another threshold."""
        return replace(self, config=self.config.model_copy(update={"threshold": threshold, "chosen": dict(chosen)}))

    def check_modes(self, modes: Modes, what: str) -> None:
        """Refuses a model whose tokenizer, template or modes are not those that the switcher was trained for.

        Args:
            what: the model, for the message.

        Raises:
            UserError: names what differs.
        """
        found = {
            "tokenizer": modes.tokenizer.content_hash,
            "template": modes.tokenizer.template_hash,
            "family": modes.name,
        }
        for name, value in found.items():
            if (expected := getattr(self.config, name)) != value:
                raise UserError(
                    f"{self.path}: the switcher was trained for another {'chat ' * (name == 'template')}{name} than "
                    "that "
                    f"of {what} ({expected} and {value}); train one for this model"
                )

    def check_weights(self, found: str, what: str) -> None:
        """Refuses another model than the one whose hidden states the switcher was trained on.

        Raises:
            UserError: names both.
        """
        if found != self.config.weights:
            raise UserError(
                f"{self.path}: the switcher was trained for another model than {what} (weights {self.config.weights} "
                "and "
                f"{found}); train one for this model"
            )

    def check_features(self, manifest: Manifest, store: Path) -> None:
        """Refuses features of another model, template or layer.

        Raises:
            UserError: names what differs.
        """
        assert manifest.hidden is not None
        found = {name: getattr(manifest, name) for name in ("weights", "tokenizer", "template")}
        found |= {name: getattr(manifest.hidden, name) for name in ("size", "layer", "pooling", "prompt", "dtype")}
        for name, value in found.items():
            if (expected := getattr(self.config, name)) != value:
                raise UserError(
                    f"{store}: its {name} is {value!r}, and the switcher in {self.path} was trained with {expected!r}"
                )

    def write(self, folder: Path) -> None:
        """Writes the folder, complete or not at all; an older switcher there is replaced.

        Raises:
            UserError: `folder` holds something else, or cannot be written.
        """
        check_replaceable(folder, KIND)
        with scratch(folder) as place:
            check_replaceable(folder, KIND)
            made = place / INSIDE
            made.mkdir()
            state = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
            save_file(state, made / WEIGHTS, {"format": "pt"})
            (made / CONFIG).write_text(self.config.model_dump_json(indent=1) + "\n", encoding="utf-8")
            write_list(made, KIND)
            real = Path(os.path.realpath(folder))
            if real.is_dir():
                remove_listed(real)  # a rename cannot replace a folder that is not empty
            publish(made, real)

    def as_json(self) -> str:
        """The configuration in one line."""
        return json.dumps(self.config.model_dump(mode="json"))
