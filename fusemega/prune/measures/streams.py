"""What blocks read and give, block by block, in one pass of the whole model.

Shape suffixes: N supervised positions of a row, S sequences of it, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from fusemega.passes.forward import supervised_hidden
from fusemega.prune.order import ResidualBlock
from fusemega.prune.stage import CalibrationRow, StageBlocks

# (before_NH, after_NH) -> [N], the importance of what lies between, at each position
Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def mean_between(
    stage: StageBlocks, rows: Sequence[CalibrationRow], spans: Sequence[Sequence[ResidualBlock]], compare: Compare
) -> dict[Sequence[ResidualBlock], float]:
    """For each span of neighbouring blocks the mean of `compare` over the positions whose next token counts.

    The spans are of single layers, which lie on one stage. Collective; every rank gets the result.

    Args:
        spans: of blocks in the order of the stream; tuples.
        compare: gets what the span's first block reads and its last one gives, in fp32.
    """
    world = stage.world
    begins = {span[0]: number for number, span in enumerate(spans)}
    ends = {span[-1]: number for number, span in enumerate(spans)}
    sums = torch.zeros(len(spans) + 1, dtype=torch.float64, device=world.device)  # the last one counts positions
    for row in rows:
        hidden = stage.begin(row)
        for block in stage.own:
            if block in begins:
                before_NH = supervised_hidden(hidden, row.batch.positions, world).float()
            hidden = stage.run(block, hidden, row)
            if block in ends:
                after_NH = supervised_hidden(hidden, row.batch.positions, world).float()
                sums[ends[block]] += compare(before_NH, after_NH).double().sum()
        if world.is_last_stage:
            sums[-1] += len(row.batch.positions)
        else:
            stage.hand_on(hidden)
    dist.all_reduce(sums, group=world.cp_group)
    dist.all_reduce(sums, group=world.pp_group)  # a span, like the count, is one stage's
    # The main rank decides: the last bit of a sum may differ between ranks.
    *totals, count = world.from_main(sums.tolist())
    return {span: total / count for span, total in zip(spans, totals, strict=True)}


@torch.no_grad()
def last_states(stage: StageBlocks, rows: Sequence[CalibrationRow]) -> Mapping[int, torch.Tensor]:
    """What each layer reads at the last token of each sequence: layer -> fp32 [S of all rows, H], in host memory.

    The number of layers has what the last layer gives. Collective; every rank gets the result.
    """
    world = stage.world
    own: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        here = (row.batch.last_tokens >= 0)[:, None]

        def keep(layer: int, hidden: torch.Tensor, row: CalibrationRow = row, here: torch.Tensor = here) -> None:
            state_SH = supervised_hidden(hidden, row.batch.last_tokens.clamp(min=0), world).float() * here
            dist.all_reduce(state_SH, group=world.cp_group)  # every other rank has 0
            own.setdefault(layer, []).append(state_SH.cpu())

        hidden = stage.begin(row)
        seen: set[int] = set()
        for block in stage.own:
            if block.layer not in seen:
                seen.add(block.layer)
                keep(block.layer, hidden)
            hidden = stage.run(block, hidden, row)
        if world.is_last_stage:
            keep(len(stage.gpt.architecture.layers), hidden)
        else:
            stage.hand_on(hidden)
    joined = {layer: torch.cat(parts) for layer, parts in own.items()}
    found = world.from_all(joined if world.tp_rank == 0 and world.cp_rank == 0 and world.dp_rank == 0 else {})
    return {layer: states for part in found for layer, states in part.items()}
