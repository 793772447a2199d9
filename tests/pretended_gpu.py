"""A GPU that is not there: the meta device in its place, so that a whole training step can be watched without one.

torch's own fake CUDA tensors do not do here: in a CPU build (2.13) autograd ends the process at the first one that
requires a gradient. The meta device has autograd and shapes. `SaysCuda` makes it answer to the name of a GPU, so that
the code takes its paths for GPUs, and `Watch` sees every operation: what mixes host and device, also where the meta
device (like torch's fake tensors) would let it pass, as in a `stack` of tensors without dimensions; and what makes the
host wait. A number that is read from the device is 1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fusemega
from fusemega.runtime import cpu_backend
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World, initialize, shutdown

GPU = torch.device("cuda", 0)
META = torch.device("meta")
_PACKAGES = tuple(Path(str(package.__path__[0])) for package in (fusemega, megatron.core))
_PINNED = "pretended_pinned"
Place = tuple[str, str]
"""A file of fusemega or megatron-core, and a function in it."""


class Watch(TorchDispatchMode):
    """Sees every operation.

    Attributes:
        mixed: names of operations on both host and device. Scalars of the host in front of a tensor of the device are
            arguments, not copies.
        waits: for each place how often the host waited there for the device.
        products: dtypes of operands and result of each matrix product.
        collectives: for each collective the devices of its tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.waits: Counter[Place] = Counter()
        self.products: list[tuple[torch.dtype, torch.dtype]] = []
        self.collectives: list[tuple[str, set[str]]] = []

    def wait(self) -> None:
        """Notes that the host waits here."""
        self.waits[_place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._seen(func, args, kwargs or {})

    def _seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(_tensors((*args, *kwargs.values())))
        kinds = {tensor.device.type for tensor in tensors}
        name = func._schema.name
        if name.startswith("c10d::"):
            return self._collective(func, args, kwargs, kinds)
        if name in ("aten::_to_copy", "aten::copy_"):
            return self._copied(func, args, kwargs)
        if len(kinds) > 1 and not _fills_a_mask(name, args):
            self.mixed.append(f"{name} at {_place()}")
        if "meta" not in kinds:
            return func(*args, **kwargs)
        if (found := self._read(func, name, args, kwargs)) is not NotImplemented:
            return found
        out = func(*args, **kwargs)
        if "mm" in name.split("::")[1]:
            self.products.append((list(_tensors(args))[-1].dtype, out.dtype))
        return out

    def _collective(self, func: Any, args: Any, kwargs: Any, kinds: set[str]) -> Any:
        """Runs it on tensors of the host, for its handle."""
        self.collectives.append((func._schema.name, kinds))
        out = func(*tree_map(_stand_in, args), **tree_map(_stand_in, kwargs))
        return (args[0], out[1]) if isinstance(out, (tuple, list)) and len(out) == 2 else out

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy needs no wait if it is asked for without one and the host's memory is pinned."""
        if func._schema.name == "aten::_to_copy":
            source = args[0]
            target = kwargs.get("device") or source.device
            without = kwargs.get("non_blocking", False)
        else:
            target, source = args[0].device, args[1]
            without = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if source.device.type == target.type:
            return func(*args, **kwargs)
        host = source if target.type == "meta" else args[0]
        if not (without and hasattr(host, _PINNED)):
            self.wait()
        if target.type == "meta":
            return func(*args, **kwargs)
        if func._schema.name == "aten::copy_":
            return args[0].fill_(1)
        return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device="cpu")

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Operations whose result, or its size, the host must know."""
        if name == "aten::_fused_adam_":  # has no form for the meta device
            return None
        if name == "aten::_local_scalar_dense":
            self.wait()
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "aten::equal":
            self.wait()
            return True
        if name == "aten::nonzero":
            self.wait()
            return torch.empty(1, args[0].dim(), dtype=torch.int64, device=META)
        if name == "aten::masked_select":
            self.wait()
            return torch.empty(1, dtype=args[0].dtype, device=META)
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.wait()
            return torch.empty(1, dtype=torch.int64, device=META)
        if name in ("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"):
            raise AssertionError(f"{name} on the device at {_place()}: the host must know its size")
        if name.startswith(("aten::index", "aten::_index_put")) and isinstance(args[1], (list, tuple)):
            places = [each for at in args[1] for each in _found(at)]
            if len(places) > len(args[1]) or any(a is not b for a, b in zip(places, args[1], strict=True)):
                if _fills_a_mask(name, args):
                    return args[0]
                self.wait()
                return func(args[0], places, *args[2:], **kwargs)
        return NotImplemented


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _fills_a_mask(name: str, args: Any) -> bool:
    """`x[mask] = number`, which torch does without reading the mask."""
    if not name.startswith(("aten::index_put", "aten::_index_put")):
        return False
    value = args[2]
    return bool(value.numel() == 1 and value.dim() == 0 and all(at is None or at.dtype == torch.bool for at in args[1]))


def _found(at: Any) -> list[Any]:
    """An index as it is; a mask as the indices of one place that it might have."""
    if not isinstance(at, Tensor) or at.dtype not in (torch.bool, torch.uint8):
        return [at]
    return [torch.empty(1, dtype=torch.int64, device=META) for _ in range(at.dim())]


def _stand_in(value: Any) -> Any:
    return torch.empty_like(value, device="cpu") if isinstance(value, Tensor) and value.is_meta else value


def _place() -> Place:
    """Where in fusemega or megatron-core the operation that is being watched was asked for."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        for package in _PACKAGES:
            if file.is_relative_to(package) and file.name != "cpu_backend.py":
                return str(file.relative_to(package.parent)), frame.f_code.co_name
        frame = frame.f_back
    return "elsewhere", ""


class SaysCuda(TorchFunctionMode):
    """`device="cuda"` becomes the meta device, which says that it is the first GPU."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to(META)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            with torch._C.DisableTorchFunction():
                on_device, dtype = args[0].is_meta, args[0].dtype
            plain: str = torch.empty(0, dtype=dtype, device="cpu").type()
            return plain.replace("torch.", "torch.cuda.", 1) if on_device else plain
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = GPU
        on_gpu = _is_cuda(kwargs.get("device"))
        args = tuple(map(_to_meta, args))
        kwargs = {key: _to_meta(value) for key, value in kwargs.items()}
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        if on_gpu and func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            self._watch.wait()  # values of the host, copied there
        if func is torch.Tensor.new_tensor and args[0].is_meta:
            self._watch.wait()
        return func(*args, **kwargs)

    @staticmethod
    def _attribute(func: Any, args: Any, kwargs: Any) -> Any:
        if func == torch.Tensor.device.__get__:
            found = func(*args, **kwargs)
            return GPU if found.type == "meta" else found
        if func == torch.Tensor.is_cuda.__get__:
            return torch.Tensor.is_meta.__get__(*args)
        if func == torch.Tensor.is_meta.__get__:
            with torch._C.DisableTorchFunction():
                return args[0].is_meta
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


def _to_meta(value: Any) -> Any:
    return META if _is_cuda(value) else value


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    setattr(copy, _PINNED, True)
    return copy


class _Event:
    """An event that has always been passed."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, rank: int = 0, ranks: int = 1) -> Iterator[Watch]:
    """Inside, this process has one GPU, and is one of `ranks`. Models are built on it.

    A fake process group answers for other ranks: with nothing, so only shapes and devices are right. What ranks tell
    each other on the host is what this one says.
    """
    from fusemega.checkpoint import open_model

    if ranks > 1:
        shutdown()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        monkeypatch.setenv("RANK", str(rank))  # as a launcher would have set them
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        # Megatron adds gloo twins of some groups, which only a real group can have.
        make = parallel_state.create_group
        monkeypatch.setattr(parallel_state, "create_group", lambda *a, **k: make(*a, **(k | {"backend": None})))
        monkeypatch.setattr(World, "is_main", property(lambda self: True))
        monkeypatch.setattr(World, "barrier", lambda self: None)
        monkeypatch.setattr(World, "from_main", lambda self, value: value)
        monkeypatch.setattr(World, "from_all", lambda self, value: [value] * ranks)
        monkeypatch.setattr(World, "largest", lambda self, value: value)
        monkeypatch.setattr(World, "numbers_of_all", lambda self, values: [list(values)] * ranks)
    elif not dist.is_initialized():
        initialize(ParallelConfig())  # over gloo, before there is a GPU
    watch = Watch()
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: watch.wait(),
        "max_memory_allocated": lambda device=None: 0,
        "get_device_properties": lambda device=None: SimpleNamespace(uuid="0"),
        "Event": _Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", _pinned)
    # What stands in for kernels of a GPU on a CPU, and would undo the pretence inside backward.
    monkeypatch.setattr(cpu_backend, "_mode", None)
    engine = torch.autograd.graph._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with SaysCuda(watch):
            return engine(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    build = open_model.build_model

    def build_there(*args: Any, **kwargs: Any) -> Any:
        # Not moved there, because a move from the host makes other parameters, without Megatron's marks.
        with torch.device("meta"):
            return build(*args, **kwargs)

    monkeypatch.setattr(open_model, "build_model", build_there)
    try:
        with SaysCuda(watch), watch:
            yield watch
    finally:
        if ranks > 1:
            shutdown()
