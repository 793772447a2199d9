"""The files of a Hugging Face folder beside its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusemega.files.json_files import read_json
from fusemega.files.opening import read_text
from fusemega.models.registry import auto_map_of
from fusemega.models.travelling_code import CODE, code_files

TEMPLATE = "chat_template.jinja"
# What a user of the folder needs beside the weights. Never Python code that came with a folder.
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
)
_SIDE_FOLDERS = ("additional_chat_templates",)


def write_config(folder: Path, hf_config: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Write config.json, and the code that belongs to its `model_type` if transformers has no class for it.

    Code that published folders bring is not copied. `auto_map` names it only if transformers has no class.
    """
    names = auto_map_of(hf_config)
    if names is not None:
        given = hf_config.get("auto_map")
        hf_config = {key: value for key, value in hf_config.items() if key != "auto_map"}
        ours = code_files(names) == [CODE.name]
        if ours:
            shutil.copyfile(CODE, folder / CODE.name)
        if names:
            hf_config["auto_map"] = dict(names) if ours or not given else given
    text = json.dumps(dict(hf_config), indent=2, sort_keys=sort_keys)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_side_files(source: Path, out: Path) -> None:
    """Copy the generation settings, tokenizer and chat templates that `source` has."""
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for name in _SIDE_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)


def side_files(folder: Path) -> list[str]:
    """The side files that `folder` has, and config.json, as relative paths."""
    below = [path for name in _SIDE_FOLDERS for path in (folder / name).rglob("*")]
    files = [*(folder / name for name in ("config.json", *_SIDE_FILES)), *below]
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


def is_side_file(name: str) -> bool:
    """Whether `side_files` would name this relative path."""
    return name in ("config.json", *_SIDE_FILES) or name.split("/")[0] in _SIDE_FOLDERS


def read_template(folder: Path) -> str | None:
    """The default chat template that transformers finds in a folder; None without one."""
    if (folder / TEMPLATE).is_file():
        return read_text(folder / TEMPLATE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        for entry in found if isinstance(found, list) else []:
            if isinstance(entry, dict) and entry.get("name") == "default":
                found = entry.get("template")
        if isinstance(found, str):
            return found
    return None


def write_template(folder: Path, template: str) -> None:
    """Makes `template` the folder's only default chat template."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        config.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / TEMPLATE).write_text(template, encoding="utf-8")


def exported_config(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration with `dtype` as transformers 5 writes it: that of the first tensor, the embedding."""
    config = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype")}
    return config | {"dtype": str(dtype).removeprefix("torch.")}
