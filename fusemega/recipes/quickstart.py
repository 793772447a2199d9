"""Is fusion worth it? A real teacher into a real target, on a machine without a GPU, beside training on labels alone.

    python -m fusemega.recipes.quickstart [--smoke | --full] [--teacher HF] [--target HF | --order FILE] ...

The teacher is SmolLM2-135M-Instruct; the target is the same model without eight of its sixty blocks (four attention and
four MLP blocks, found by `fusemega prune search`). The teacher's ten most probable tokens at every supervised position
of real chat text are stored; then copies of the target are trained several times over the same tokens: `control` on the
labels alone, `fused` on labels and the teacher's rows.

All four models are measured on held-out chat and on three kinds of text that neither arm was trained on (code, school
maths, an encyclopedia): bits per byte, and how far each is from the teacher. They answer one question beside each
other, and a sentence says what was seen, whichever way it came out. Table, picture, page and run files are left in the
folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fusemega.runtime.console import quiet_megatron

quiet_megatron()

from fusemega.errors import UserError  # noqa: E402
from fusemega.fixtures import data as assets  # noqa: E402  (after the filters are set)
from fusemega.recipes.arms import ORDER, Arms, Scale, link, parser, run_quickstart  # noqa: E402


def quickstart(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what summary.json holds.

    Raises:
        UserError: a model or data file that does not fit; names it.
    """
    started = time.monotonic()
    if options.teacher and not (options.target or options.order):
        raise UserError("--teacher: give --target or --order too; the order that comes with fusemega is SmolLM2's")
    teacher = options.teacher or str(assets.smollm2())
    link(Path(options.out) / "teacher", teacher)
    arms = Arms(options, scale)
    arms.choose_data([teacher])
    target = options.target or arms.prune(teacher, arms.folder / "target", Path(options.order or ORDER))
    store = arms.teach("teacher", teacher)
    objectives: dict[str, dict[str, Any]] = {
        "control": {"name": "sft"},
        "fused": {"name": "distill", "store": store, "lambda": options.lambda_},
    }
    arms.train(target, objectives)
    return arms.finish(target, list(objectives), {"teacher": teacher}, "fusemega quickstart", started, teacher)


def main() -> None:
    """The command line."""
    arguments = parser("fusemega.recipes.quickstart", __doc__, "runs/quickstart", lr=1e-4, lambda_=0.5)
    arguments.add_argument("--teacher", help="HF folder or hub id (default: SmolLM2-135M-Instruct)")
    target = arguments.add_mutually_exclusive_group()
    target.add_argument("--target", help="HF folder or hub id with the teacher's tokenizer (default: teacher, pruned)")
    target.add_argument("--order", help="order of `fusemega prune search` whose blocks leave the teacher")
    run_quickstart(arguments, quickstart)


if __name__ == "__main__":
    main()
