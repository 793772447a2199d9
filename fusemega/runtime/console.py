"""What a run says to the person who watches it: one rank speaks, on stderr, without Megatron's known noise."""

from __future__ import annotations

import functools
import os
import warnings

from rich.console import Console

from fusemega.errors import printable

# Message beginnings (regular expressions) of what megatron-core 0.16.1 and torch 2.13 say on every run without TE and
# apex, as `fusemega env` tells once and better, or about their own insides. Anything else stays visible.
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
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=global_rank() != 0)


def tell(text: str) -> None:
    """Prints a result on stdout; control characters of names that it holds are escaped."""
    print(printable(text))


def say(text: str) -> None:
    """Prints `text` as it is, from rank 0; control characters of names that it holds are escaped."""
    console().print(printable(text), markup=False)
