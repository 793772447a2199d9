"""Layers of experts: a router sends each token through a few of many MLPs.

megatron-core's layer, router and dispatchers. `LocalExperts` are computed one after the other; Transformer Engine's
spec has megatron-core's TEGroupedMLP in their place (`specs.py`). No token is dropped.

The loss that balances experts is ours. megatron-core's is a function of all tokens of a micro-batch, so it depends on
how samples are packed. Here it is one of each segment of a row (`Balance`), so it is the same in every layout.

Shape suffixes: T tokens of this rank, H hidden, S segments of the whole row, E experts.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.device import sent
from fusemega.runtime.segments import Segments, segments_of

MLPKind = Literal["mlp", "experts"]


@dataclass(eq=False)
class Balance:
    """What the routers of a model share: how evenly they send the tokens of a step to their experts.

    Of one segment and one layer it is E * sum_e f_e * p_e, where f_e is the share of the segment's tokens that go to
    expert e (they add up to the number of experts of a token, k), and p_e the mean over them of the softmax of the
    router's logits; k where all are alike. Its gradient passes through p_e alone, as in Switch Transformers
    (arXiv:2101.03961) and in transformers' `load_balancing_loss_func`.

    Attributes:
        weight: what each value is multiplied by in the loss of this step, fp32 []; None: there is no such loss.
        total: fp32 [], this rank's part of the sum over the step's segments and layers; None: there was no token.
    """

    weight: torch.Tensor | None = None
    total: torch.Tensor | None = None

    def begin(self, weight: torch.Tensor) -> None:
        """A step begins."""
        self.weight, self.total = weight, None

    def add(self, value: torch.Tensor) -> None:
        """Counts a layer's part for a micro-batch."""
        value = value.detach()
        self.total = value if self.total is None else self.total + value


class Router(TopKRouter):
    """megatron-core's, with the loss that balances experts.

    Attributes:
        balance: shared by the model's routers; None: nothing is added to the loss.
        row: what the layer was told of the row that passes it.
    """

    balance: Balance | None = None
    row: PackedSeqParams | None = None

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, 1, E] -> the weights of a token's experts, 0 for the others, and which they are: both [T, E]."""
        probs_TE, chosen_TE = super().routing(logits, padding_mask)
        balance = self.balance
        # Activations that are computed again are counted once: the first time is without gradients.
        if balance is not None and balance.weight is not None and self.training and torch.is_grad_enabled():
            value = self._imbalance(logits.flatten(0, 1), chosen_TE)
            balance.add(value)
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, value * balance.weight)
        return probs_TE, chosen_TE

    def _imbalance(self, logits_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
        """This rank's tokens' part of the sum of `Balance` over the row's segments, fp32 []."""
        assert self.row is not None
        segments_T, tokens_S = self._segments(logits_TE.device)
        sums_SE = logits_TE.new_zeros(len(tokens_S) + 1, self.num_experts, dtype=torch.float32)  # the last: padding
        counts_SE = sums_SE.index_add(0, segments_T, chosen_TE.float())
        if self.tp_cp_group.size() > 1:  # which have the segments' other tokens
            torch.distributed.all_reduce(counts_SE, group=self.tp_cp_group)
        sums_SE = sums_SE.index_add(0, segments_T, logits_TE.softmax(1, dtype=torch.float32))
        weights_S = self.num_experts / tokens_S.clamp(min=1).square()
        return ((counts_SE[:-1] * sums_SE[:-1]).sum(1) * weights_S).sum()

    def _segments(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T], the segment of each token of this rank, S of padding; fp32 [S], tokens of each segment."""
        assert self.row is not None
        row = segments_of(self.row.cu_seqlens_q)
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        cp_rank, cp_size = self.cp_group.rank(), self.cp_group.size()

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            own = own_tokens(row)
            count = len(own)
            whole = torch.full((row.bounds[-1],), count, dtype=torch.int64, device="cpu")
            for number, (start, tokens) in enumerate(zip(row.bounds, own, strict=False)):
                whole[start : start + tokens] = number
            if cp_size > 1:
                whole = whole[zigzag(torch.tensor(row.bounds, dtype=torch.int32, device="cpu"), cp_rank, cp_size)]
            part = whole.chunk(tp_size)[tp_rank].contiguous()  # of sequence parallelism
            return sent(part, device), sent(torch.tensor(own, dtype=torch.float32, device="cpu"), device)

        return row.kept(("balance", device), make)


def own_tokens(row: Segments) -> list[int]:
    """Tokens of each segment of a row, without padding and without what it continues."""
    return [text - before for text, before in zip(row.texts, row.before, strict=True)]


class ExpertsLayer(TransformerLayer):
    """megatron-core's layer, whose router is told of the row."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        self.mlp.router.row = kwargs.get("packed_seq_params")
        return super().forward(*args, **kwargs)


def balance_of(model: torch.nn.Module) -> Balance:
    """Gives all routers of a model one `Balance`, and returns it."""
    balance = Balance()
    for module in model.modules():
        if isinstance(module, Router):
            module.balance = balance
    return balance


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
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
