"""`.metadata` of a distributed checkpoint, which is a pickle, read without running anything that it names.

A pickle may name any function of any module, to be called while it is read. Here every name stands on a list; classes
of torch.distributed.checkpoint become records that hold what the pickle says and can do nothing, which also spares
the second that their import takes. What passes here may be read by torch, whose reader (`FileSystemReader.
read_metadata`, torch/distributed/checkpoint/filesystem.py:930) follows any name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from fusemega.errors import UserError

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


class _Record:
    """Stands for a class of torch.distributed.checkpoint."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if (module, name) in _FUNCTIONS:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
        return dtype


def read_index(path: Path) -> Any:
    """The index `path`, as records with the attributes of torch's classes.

    Raises:
        UserError: it cannot be read, is no index, or names something else; nothing was called then.
    """
    try:
        with open(path, "rb") as file:
            return _IndexUnpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index of a torch_dist checkpoint: {error}") from None
