"""Who scored a store, and how: what must agree before its rows may be used or added to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fusemega.config import Section
from fusemega.errors import UserError, choose

_NAME = "manifest.json"
_FORMAT = 1


class Manifest(Section):
    """The manifest of a store.

    Attributes:
        weights: hash of the scorer's HF folder.
        tokenizer, template: hashes of the scorer's tokenizer and chat template (template None for plain text).
        mask_policy: which tokens are supervised, by name.
        truncation: tokens of the windows that documents were cut into.
        temperature: temperature at which log-probs and residuals are stored.
        top_k: log-probs a position.
        vocab_size: of the scorer; ids are below it.
        versions: of the packages that wrote it; informative, never compared.
        format: of the shards.
    """

    weights: str
    tokenizer: str
    template: str | None
    mask_policy: str
    truncation: int = Field(ge=1)
    temperature: float = Field(gt=0)
    top_k: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    versions: dict[str, str] = {}
    format: int = _FORMAT

    def check(self, expected: Mapping[str, Any], path: Path) -> None:
        """Raises UserError naming the first field of `expected` that has another value here."""
        for name, value in expected.items():
            found = getattr(self, choose("store manifest", name, type(self).model_fields))
            if found != value:
                raise UserError(f"{path}: the store's {name} is {found!r}, expected {value!r}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; UserError if there is none or it is damaged."""
    path = folder / _NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: not a sample store (no {_NAME})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: damaged: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
    if manifest.format != _FORMAT:
        raise UserError(f"{path}: the store's format is {manifest.format}, and this version reads {_FORMAT}")
    return manifest


def check_claim(folder: Path, manifest: Manifest) -> None:
    """Whether `folder` may be this scorer's store. Writes nothing.

    Raises:
        UserError: it is a store of another manifest (names the field), or holds something else.
    """
    if (folder / _NAME).exists():
        read_manifest(folder).check(manifest.model_dump(exclude={"versions"}), folder / _NAME)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: exists and is no sample store; choose another folder")


def claim_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest if `folder` has none, else checks that they agree in all but `versions`.

    Safe when several writers start at once: exactly one creates the file, the others compare.
    """
    check_claim(folder, manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _NAME).exists():
            handle, name = tempfile.mkstemp(prefix=f".{_NAME}.", dir=folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(manifest.model_dump_json(indent=1) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.link(name, folder / _NAME)  # fails if another writer was first, unlike a rename
            except FileExistsError:
                pass
            finally:
                os.unlink(name)
    except OSError as error:
        raise UserError(f"{folder}: cannot create the store: {error.strerror or error}") from None
    read_manifest(folder).check(manifest.model_dump(exclude={"versions"}), folder / _NAME)
