"""Layers of experts: a router sends each token through a few of many MLPs.

megatron-core's layer, router and dispatchers, over experts that are computed one after the other. No token is dropped.

Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

MLPKind = Literal["mlp", "experts"]


class LocalExperts(SequentialMLP):
    """The experts of one layer on this rank, of any MLP; names, checkpoints and products are megatron-core's."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: type[MLP],
        pg_collection: ProcessGroupCollection,
    ) -> None:
        own = copy(config)
        own.ffn_hidden_size = config.moe_ffn_hidden_size  # which an MLP reads from there
        MegatronModule.__init__(self, config=own)  # SequentialMLP's makes experts of megatron-core's MLP
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        kind: Any = submodules
        self.local_experts = torch.nn.ModuleList(
            kind(own, ffn_hidden_size=own.ffn_hidden_size, is_expert=True, tp_group=self.tp_group)
            for _ in range(num_local_experts)
        )


def experts_spec(mlp: type[MLP]) -> ModuleSpec:
    """The block of a layer with experts.

    Args:
        mlp: an expert's class; called with a configuration, `ffn_hidden_size`, `is_expert` and `tp_group`, and in
            forward with tokens [T, H] and the router's weight of each [T].
    """
    experts = ModuleSpec(module=LocalExperts, submodules=mlp)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
