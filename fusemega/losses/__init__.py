"""Losses over one vocabulary-parallel kernel. Importing the package registers every objective.

_head.py      one chunk of tokens: logits, sums, gradient
_gradients.py what a call holds from forward to backward
vocab.py      the kernel's two entry points
divergence.py the whole distribution of a teacher in the same job
topk.py       a teacher's rows
registry.py   objectives by name
sft.py, distill.py, fuse.py, online_distill.py    one objective a file
"""

from fusemega.losses import distill, fuse, online_distill, sft

__all__ = ["distill", "fuse", "online_distill", "sft"]
