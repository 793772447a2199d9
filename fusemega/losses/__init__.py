"""Objectives: what a run is trained on, one file each. Importing the package registers all of them.

* `registry.py`: the contract, and objectives by name
* `apply.py`: an objective applied to what a model gives for a micro-batch
* `reference.py`: the reference of a preference loss, stored or in the job
* `responses.py`: which responses to a prompt are compared, by reward and source
* `preference.py`: what losses over such comparisons share, and their metrics
* `weighted.py`: weights over the sources
* `dpo.py`, `simpo.py`, `orpo.py`, `rloo.py`, `wrpo.py`, `fuse_sft.py`, `fuse_po.py`: such losses, one a file
* `reward.py`: a reward model from pairs
* `label_probability.py`: metrics of distillation
* `sft.py`, `distill.py`, `fuse.py`, `online_distill.py`: one objective a file
* `chunk.py`, `merge.py`, `project_student.py`: others' methods across tokenizers, as published
"""

from fusemega.losses import (
    chunk,
    distill,
    dpo,
    fuse,
    fuse_po,
    fuse_sft,
    merge,
    online_distill,
    orpo,
    project_student,
    reward,
    rloo,
    sft,
    simpo,
    wrpo,
)

__all__ = [
    "chunk",
    "distill",
    "dpo",
    "fuse",
    "fuse_po",
    "fuse_sft",
    "merge",
    "online_distill",
    "orpo",
    "project_student",
    "reward",
    "rloo",
    "sft",
    "simpo",
    "wrpo",
]
