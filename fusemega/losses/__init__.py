"""Losses over one vocabulary-parallel kernel. Importing the package registers every objective.

_head.py      one chunk of tokens: logits, sums, gradient
vocab.py      the kernel's two entry points
topk.py       a teacher's rows
registry.py   objectives by name
sft.py, distill.py, fuse.py    one objective a file
"""

from fusemega.losses import distill, fuse, sft

__all__ = ["distill", "fuse", "sft"]
