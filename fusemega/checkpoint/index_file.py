"""Reads `.metadata` of a distributed checkpoint, which is a pickle, without running anything that it names.

A pickle can make its reader call any function of any module. Here every name must be on a list. Classes of
torch.distributed.checkpoint become inert records, which also saves the second that importing them takes. A file that
passes may be read by torch, whose reader (`FileSystemReader.read_metadata`,
torch/distributed/checkpoint/filesystem.py:930) follows any name.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

from fusemega.errors import UserError
from fusemega.files.opening import is_inside
from fusemega.files.pickles import Record, read_pickle

_RECORDS = {
    f"torch.distributed.checkpoint.{module}": names
    for module, names in {
        "metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
        "filesystem": {"_StorageInfo", "_StoragePrefix"},
    }.items()
}
_FUNCTIONS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


def read_index(path: Path) -> Any:
    """The index `path`, as records with the attributes of torch's classes.

    Every piece lies in a file of the folder, at bytes that a file can have.

    Raises:
        UserError: it cannot be read, is no index, or names something else; nothing was called then.
    """
    index = read_pickle(path, _name, "an index of a torch_dist checkpoint")
    tensors, storage = (getattr(index, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise UserError(f"{path}: not an index of a torch_dist checkpoint: it has no tables of tensors and pieces")
    for piece, where in storage.items():
        name, file = (_attribute(of, key, str) for of, key in ((piece, "fqn"), (where, "relative_path")))
        numbers = [_attribute(where, key, int) for key in ("offset", "length")]
        if name is None or file is None or not is_inside(file) or not all(n is not None and n >= 0 for n in numbers):
            raise UserError(f"{path}: damaged: no file of the folder, or no place in it, for {name!r} (file {file!r})")
    return index


def _attribute(record: Any, name: str, kind: type) -> Any:
    value = getattr(record, name, None)
    return value if type(value) is kind else None


def _name(module: str, name: str) -> Any:
    if name in _RECORDS.get(module, ()):
        return Record
    if (module, name) in _FUNCTIONS:
        return getattr(importlib.import_module(module), name)
    dtype = getattr(torch, name, None) if module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
    return dtype
