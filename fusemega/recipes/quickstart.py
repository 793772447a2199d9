"""Is fusion worth it? A real teacher into a real target, on a machine without a GPU, beside training on labels alone.

    python -m fusemega.recipes.quickstart [--smoke | --full] [--teacher HF] [--target HF] [--out FOLDER] ...

The teacher is SmolLM2-135M-Instruct; the target is the same model without four of its thirty layers. The teacher's
ten most probable tokens at every supervised position of real chat text are stored; then copies of the target are
trained several times over the same tokens: `control` on the labels alone, `fused` on labels and the teacher's rows.

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

from fusemega.fixtures import data as assets  # noqa: E402  (after the filters are set)
from fusemega.recipes.arms import Arms, Scale, link, parser, run_quickstart  # noqa: E402


def quickstart(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what summary.json holds.

    Raises:
        UserError: a model or data file that does not fit; names it.
    """
    started = time.monotonic()
    teacher = options.teacher or str(assets.smollm2())
    link(Path(options.out) / "teacher", teacher)
    arms = Arms(options, scale)
    arms.choose_data([teacher])
    target = options.target or arms.cut(teacher, arms.folder / "target")
    store = arms.teach("teacher", teacher)
    objectives: dict[str, dict[str, Any]] = {
        "control": {"name": "sft"},
        "fused": {"name": "distill", "store": store, "lambda": options.lambda_},
    }
    arms.train(target, objectives)
    return arms.finish(target, list(objectives), {"teacher": teacher}, "fusemega quickstart", started, teacher)


def main() -> None:
    """The command line."""
    arguments = parser("fusemega.recipes.quickstart", __doc__, "runs/quickstart", lr=1e-4, lambda_=0.1)
    arguments.add_argument("--teacher", help="HF folder or hub id (default: SmolLM2-135M-Instruct)")
    arguments.add_argument("--target", help="HF folder or hub id with the teacher's tokenizer (default: teacher, cut)")
    run_quickstart(arguments, quickstart)


if __name__ == "__main__":
    main()
