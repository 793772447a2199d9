"""A real model, cut to two layers, and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from fusemega.models.family import keep_layers

LAYERS = 2


@pytest.fixture(scope="session")
def small_model(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with its first two layers. It also stops at " and", which such a model writes often."""
    out = tmp_path_factory.mktemp("sampling") / "small"
    out.mkdir()
    for file in smollm2_folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((smollm2_folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(keep_layers(config, range(LAYERS)) | {"max_position_embeddings": 256}))
    with safe_open(smollm2_folder / "model.safetensors", framework="pt") as weights:
        names = [name for name in weights.keys() if not _layer(name) >= LAYERS]  # noqa: SIM118  (not a mapping)
        save_file({name: weights.get_tensor(name) for name in names}, out / "model.safetensors", {"format": "pt"})
    generation = json.loads((smollm2_folder / "generation_config.json").read_text())
    # Sampling settings of a folder are not used: these would change every response.
    generation |= {"eos_token_id": [2, 284], "do_sample": True, "repetition_penalty": 5.0, "top_k": 1}
    (out / "generation_config.json").write_text(json.dumps(generation))
    return out


def _layer(name: str) -> int:
    parts = name.split(".layers.")
    return int(parts[1].split(".")[0]) if len(parts) == 2 else -1


def write_prompts(path: Path, rows: Sequence[str | dict[str, Any]]) -> Path:
    """A prompts file; a text stands for a row with that prompt."""
    given = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path
