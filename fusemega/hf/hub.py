"""Finds a model folder by path or by hub id."""

from __future__ import annotations

import re
from pathlib import Path

from fusemega.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What a model needs: never Python code, never pickles.
_ALLOWED_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt"]


def resolve(name_or_path: str | Path) -> Path:
    """A local folder: the one given, or the hub's snapshot of a hub id (downloaded once, into the hub's cache).

    Raises:
        UserError: neither a folder nor a hub id, or the hub cannot be reached and the cache does not have it.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise UserError(f"{name_or_path}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=_ALLOWED_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name_or_path}: no such folder here, and not available as a hub id ({type(error).__name__}: {reason})"
        ) from None
