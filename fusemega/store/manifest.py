"""The manifest: the scorer and its settings, which must agree before rows may be read or added."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from fusemega.config import Section
from fusemega.errors import UserError, choose
from fusemega.files.json_files import read_json
from fusemega.files.output import sync

_NAME = "manifest.json"
_FORMAT = 3
_READABLE = (2, _FORMAT)  # rows of format 2 have no labels


class HiddenRows(Section):
    """What the vectors of a store of `rows: hidden` are.

    Attributes:
        size: numbers of a vector.
        layer: `final`: after the final norm; a number: the stream after that layer, counted from 0.
        pooling: `last`: at the prompt's last token; `mean`: the mean over its tokens.
        prompt: how the prompt was rendered, in words of the command that wrote it.
        dtype: in which the model ran.
    """

    size: int = Field(ge=1, le=1 << 20)
    layer: str
    pooling: Literal["last", "mean"]
    prompt: str
    dtype: str


class Manifest(Section):
    """The manifest of a store.

    Attributes:
        weights: hash of the scorer's HF folder.
        tokenizer, template: hashes of the scorer's tokenizer and chat template (template None for plain text).
        mask_policy: which tokens are supervised, by name.
        truncation: length in tokens of the windows that documents were cut into.
        temperature: temperature at which log-probs and residuals are stored, or of the distribution drawn from.
        rows: `top_k`: the most probable ids of each position; `sampled`: ids drawn from its distribution; `none`: only
            each sample's summed log-probability and number of positions (`Row.of_sum`); `hidden`: a vector of each
            prompt (`Row.of_hidden`).
        top_k: for `top_k` rows: ids at each position.
        hidden: for `hidden` rows: what the vectors are.
        num_samples, seed: for `sampled` rows: draws at each position, with replacement, and their seed.
        vocab_size: size of the scorer's vocabulary; ids are below it.
        projected: for a store that `fusemega project` brought into another vocabulary: how it was made. Then
            `tokenizer`, `template` and `vocab_size` are those of the new vocabulary.
        versions: versions of the packages that wrote the store; informative, never compared.
        format: format version of the shards; rows of format 2 never have labels (`Row.label_ids_P`).
    """

    weights: str
    tokenizer: str
    template: str | None
    mask_policy: str
    truncation: int = Field(ge=1)
    temperature: float = Field(gt=0)
    rows: Literal["top_k", "sampled", "none", "hidden"] = "top_k"
    top_k: int | None = Field(None, ge=1)
    num_samples: int | None = Field(None, ge=1, le=1 << 25)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    vocab_size: int = Field(ge=1, le=1 << 25)  # the most that the coding of ids allows
    projected: dict[str, str] | None = None
    hidden: HiddenRows | None = None
    versions: dict[str, str] = {}
    format: int = _FORMAT

    @model_validator(mode="after")
    def _of_one_kind(self) -> Manifest:
        """Checks that the keys of this kind of rows are there, and those of the other kind are not."""
        kinds = (("top_k", "top_k"), ("num_samples", "sampled"), ("seed", "sampled"), ("hidden", "hidden"))
        for name, kind in kinds:
            if (getattr(self, name) is not None) != (kind == self.rows):
                raise ValueError(f"{name}: {'missing' if kind == self.rows else 'not'} with rows: {self.rows}")
        if self.top_k is not None and self.top_k > self.vocab_size:
            raise ValueError(f"top_k: {self.top_k} is more than the vocabulary of {self.vocab_size}")
        if self.rows in ("none", "hidden") and self.temperature != 1.0:
            raise ValueError(f"temperature: found {self.temperature}; with rows: {self.rows} it is 1")
        return self

    @property
    def entries(self) -> int:
        """K, the number of entries at each position; 0 in a store of rows: none or hidden."""
        return self.top_k or self.num_samples or 0

    def require_rows(self, path: Path) -> None:
        """Raises UserError for a store of rows: none or hidden, where positions are read."""
        if self.rows == "hidden":
            raise UserError(
                f"{path}: the store has rows: hidden, the vectors of `fusemega switch features`; allowed here: rows: "
                "top_k or sampled; run `fusemega teach` into another store"
            )
        if self.rows == "none":
            raise UserError(
                f"{path}: the store has rows: none, only a summed log-probability of each sample, for the reference of "
                "a preference loss; allowed here: rows: top_k or sampled; run `fusemega teach` into another store"
            )

    @property
    def hash(self) -> bytes:
        """Hash, 8 bytes, of everything but `versions`; each shard records it."""
        # Stores of before there were hidden rows keep their hash.
        left_out = {"versions"} | ({"hidden"} if self.hidden is None else set())
        text = json.dumps(self.model_dump(exclude=left_out), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    def check(self, expected: Mapping[str, Any], path: Path) -> None:
        """Raises UserError naming the first field of `expected` that has another value here."""
        for name, value in expected.items():
            found = getattr(self, choose("store manifest", name, type(self).model_fields))
            found = found.model_dump() if isinstance(found, Section) else found
            if found != value:
                raise UserError(f"{path}: the store's {name} is {found!r}, expected {value!r}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; UserError if there is none or it is damaged."""
    path = folder / _NAME
    if not path.exists():
        raise UserError(f"{folder}: not a sample store (no {_NAME})")
    content = read_json(path)
    _check_format(path, content.get("format"))
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: damaged: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def _check_format(path: Path, found: Any) -> None:
    """Refuses another format; called before the other fields are checked, because they depend on the format."""
    if found is not None and found not in _READABLE:
        raise UserError(
            f"{path}: the store's format is {found}, and this version reads 2 and {_FORMAT}: the encoding of rows "
            "has changed; run `fusemega teach` again, into a new folder"
        )


def check_claim(folder: Path, manifest: Manifest) -> None:
    """Checks that `folder` may be this scorer's store. Writes nothing.

    Raises:
        UserError: it is a store of another manifest (names the field), or holds something else.
    """
    if (folder / _NAME).exists():
        found = read_manifest(folder)
        if found.format < manifest.format:
            raise UserError(
                f"{folder}: a store of format {found.format}, whose rows have no labels, and this version writes "
                f"{manifest.format}; it can be read and merged; for more rows run `fusemega teach` into a new folder"
            )
        found.check(manifest.model_dump(exclude={"versions"}), folder / _NAME)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: exists and is not a sample store; choose another folder")


def claim_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest if `folder` has none, else checks that they agree in all but `versions`.

    Safe when several writers start at once: exactly one creates the file, the others compare.
    """
    check_claim(folder, manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _NAME).exists():
            # A hidden name: `check_claim` in another writer does not take it for something else's file.
            handle, name = tempfile.mkstemp(prefix=f".{_NAME}.", dir=folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(manifest.model_dump_json(indent=1) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.link(name, folder / _NAME)  # fails if another writer was first, unlike a rename
                sync(folder)
            except FileExistsError:
                pass
            finally:
                os.unlink(name)
    except OSError as error:
        raise UserError(f"{folder}: cannot create the store: {error.strerror or error}") from None
    read_manifest(folder).check(manifest.model_dump(exclude={"versions"}), folder / _NAME)
