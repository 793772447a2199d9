"""Messages of a run to the user: rank 0 writes them to stderr, without Megatron's known warnings.

Everything goes through the logger "fusemega" of Python's logging. `FUSEMEGA_LOG` says how much is shown: debug, info
(the default), warning or error, from rank 0; or with `:all` from every rank, each line with its rank in front.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from fusemega.errors import UserError, nearest, printable
from fusemega.runtime.activity import doing

SETTING = "FUSEMEGA_LOG"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# How messages begin (regular expressions) that megatron-core 0.16.1 and torch 2.13 print on every run: that TE and apex
# are missing, which `fusemega env` tells better, or about their own code. Anything else stays visible.
_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    (r"Apex is not installed\. Falling back to Torch Norm", UserWarning),
    (r"Transformer Engine and Apex are not installed\. Falling back to", UserWarning),
    (r"full scope is deprecated\. Use empty cuda_graph_scope", UserWarning),
    (r"Warning: tp_group is None, using default tp group", DeprecationWarning),
    (r"MLP requires ffn_hidden_size, but it was not provided", DeprecationWarning),
    (r"\s*The 'megatron\.core\.transformer\.custom_layers\.transformer_engine'", DeprecationWarning),
    (r"The following imports from `dynamic_context\.py` will be removed", DeprecationWarning),
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    (r"`load_state_dict` is deprecated and will be removed", FutureWarning),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    (r"`torch\.jit\.script(_method)?` is deprecated", DeprecationWarning),
)


def quiet_megatron() -> None:
    """Hides the warnings that come with every run; call it before megatron-core is imported."""
    for message, category in _NOISE:
        warnings.filterwarnings("ignore", message=message, category=category)


def global_rank() -> int:
    """This process's rank as torchrun or srun set it, 0 without a launcher; needs no process group."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


@functools.cache
def console() -> Console:
    """The run's console on stderr (stdout is for results); silent on every rank but 0."""
    return _on_stderr(quiet=global_rank() != 0)


def tell(text: str) -> None:
    """Prints a result on stdout; control characters of names that it holds are escaped."""
    print(printable(text))


def say(text: str) -> None:
    """Prints `text` as it is, from rank 0; control characters of names that it holds are escaped."""
    logger().info(text)


def warn(text: str) -> None:
    """Prints a warning: what the user should look at, but does not stop the run."""
    logger().warning(f"warning: {text}")


def warn_from_here(text: str) -> None:
    """Prints a warning from whichever rank this is, where warnings are shown: only this rank can know of it."""
    if logger().isEnabledFor(logging.WARNING):
        _on_stderr().print(printable(f"warning: {text}"), markup=False)


def debug(text: str) -> None:
    """Prints what only helps to find out what is going on: which layout, what is read, what a cache had."""
    logger().debug(f"debug: {text}")


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Says, at level debug, how long the block took, even if it fails; and that this process is in it (`activity`).

    Example:
        >>> with phase("weights are read"):
        ...     pass
    """
    started = time.monotonic()
    try:
        with doing(what, is_phase=False):
            yield
    finally:
        debug(f"{what}: {time.monotonic() - started:.2f} s")


def logger() -> logging.Logger:
    """The logger "fusemega", which shows what FUSEMEGA_LOG asks for.

    Raises:
        UserError: FUSEMEGA_LOG names no level.
    """
    return _configured(os.environ.get(SETTING) or "info", global_rank())


@functools.cache
def _configured(setting: str, rank: int) -> logging.Logger:
    level, _, ranks = setting.partition(":")
    if level not in _LEVELS or setting not in (level, f"{level}:all"):
        hint = nearest(level, list(_LEVELS))
        raise UserError(
            f"{SETTING}: unknown level {setting!r}{hint}; allowed: {', '.join(_LEVELS)}, alone (rank 0 speaks) or with "
            ":all (every rank does)"
        )
    found = logging.getLogger("fusemega")
    found.setLevel(_LEVELS[level])
    found.propagate = False
    found.handlers = [handler for handler in found.handlers if not isinstance(handler, _OnConsole)]
    if ranks:
        found.addHandler(_OnConsole(_on_stderr(), f"[rank {rank}] "))
    else:
        found.addHandler(_OnConsole(console(), ""))
    return found


class _OnConsole(logging.Handler):
    """Prints each message as it is, behind a prefix."""

    def __init__(self, shown_on: Console, prefix: str) -> None:
        super().__init__()
        self._console, self._prefix = shown_on, prefix

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self._prefix + printable(record.getMessage()), markup=False)


def _on_stderr(quiet: bool = False) -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
