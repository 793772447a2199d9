"""The protocols, one file each; importing this package registers them.

fusechat3.py   FuseChat-3.0: the best over all sources, pairs within one source, by domain
wrpo.py        WRPO: a third to SFT, then triples of source and target
fuserl.py      FuseRL: groups for FuseSFT and FusePO
simpo.py       SimPO's on-policy pairs: the best and the worst of one model's samples
one_source.py  what those of one model's samples have in common
mutual_taught.py   Mutual-Taught's: the shortest one above the mean reward, and the worst
"""

from __future__ import annotations

from fusemega.selection.protocols import fusechat3, fuserl, mutual_taught, simpo, wrpo

__all__ = ["fusechat3", "fuserl", "mutual_taught", "simpo", "wrpo"]
