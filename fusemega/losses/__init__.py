"""Objectives: what a run is trained on, one file each. Importing the package registers all of them.

* `registry.py`: the contract, and objectives by name
* `apply.py`: an objective applied to what a model gives for a micro-batch
* `reference.py`: the reference of a preference loss, stored or in the job
* `label_probability.py`: metrics of distillation
* `sft.py`, `distill.py`, `fuse.py`, `online_distill.py`: one objective a file
* `chunk.py`, `merge.py`, `project_student.py`: others' methods across tokenizers, as published
"""

from fusemega.losses import chunk, distill, fuse, merge, online_distill, project_student, sft

__all__ = ["chunk", "distill", "fuse", "merge", "online_distill", "project_student", "sft"]
