"""What a model folder holds beside its weights, and how large a weight file may grow."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fusemega.errors import UserError

MAX_SHARD_SIZE = 5_000_000_000
# Beside the weights, what a user of the folder needs. Never Python code.
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SIDE_FOLDERS = ("additional_chat_templates",)


def copy_side_files(source: Path, out: Path) -> None:
    """Copy the generation settings, tokenizer and chat templates that `source` has."""
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for name in _SIDE_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name)


def parse_size(what: str, text: str) -> int:
    """Bytes of a size such as 500MB or 5GB (decimal units, as transformers reads them).

    Raises:
        UserError: not such a size; it names `what`.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UserError(f"{what}: found {text!r}; expected a number of KB, MB or GB, such as 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()]
