"""Fusion across tokenizers: a real teacher into a target that has another vocabulary, on a machine without a GPU.

    python -m fusemega.recipes.quickstart_xtok [--smoke | --full] [--teacher NAME=HF ...] [--out FOLDER] ...

The target is SmolLM2-135M-Instruct without eight of its sixty blocks, moved onto the vocabulary of Mistral v3
(32,768 SentencePiece tokens; SmolLM2 has 49,152 byte-level ones). The teachers are SmolLM2 itself and whatever
`--teacher` adds; each reads the text with its own tokenizer. Two copies of the target are trained on the same tokens:
`control` on the labels alone, `fused` on labels and the teachers' rows brought onto the target's tokens. All are
measured in bits per byte, in which models of different vocabularies compare, and in their distance from SmolLM2, over
cells of tokens that both vocabularies can state, on held-out chat and on three kinds of text that neither arm was
trained on; a sentence says what was seen, whichever way it came out.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from fusemega.runtime.console import quiet_megatron

quiet_megatron()

from fusemega.errors import UserError  # noqa: E402
from fusemega.fixtures import data as assets  # noqa: E402  (after the filters are set)
from fusemega.fixtures.tokenizers import tokenizer  # noqa: E402
from fusemega.recipes.arms import Arms, Scale, link, parser, run_quickstart  # noqa: E402


def quickstart_xtok(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what summary.json holds.

    Raises:
        UserError: a model or data file that does not fit; names it.
    """
    started = time.monotonic()
    smollm2 = str(assets.smollm2())
    teachers = {"smollm2": smollm2} | dict(map(_named, options.teacher))
    arms = Arms(options, scale)
    folder, steps = arms.folder, arms.steps
    for name, load in teachers.items():
        link(folder / "teachers" / name, load)
    pruned, vocabulary = arms.prune(smollm2, folder / "pruned"), str(tokenizer("mistral_v3"))
    target = steps.transplant(pruned, str(folder / "target"), vocabulary)
    arms.choose_data([target, *teachers.values()])
    maps = {name: steps.align(name, load, vocabulary) for name, load in teachers.items()}
    sources = [{"store": arms.teach(name, load), "map": maps[name]} for name, load in teachers.items()]
    first = next(iter(teachers))  # distances are measured to this one
    measured = {"store": arms.teach_measured("measured", teachers[first]), "map": maps[first]}
    objectives: dict[str, dict[str, Any]] = {
        "control": {"name": "sft"},
        "fused": {"name": "fuse", "teachers": sources, "lambda": options.lambda_},
    }
    arms.train(target, objectives)
    title = "fusemega quickstart across tokenizers"
    return arms.finish(target, list(objectives), teachers, title, started, teachers[first], measured)


def _named(argument: str) -> tuple[str, str]:
    name, equals, load = argument.partition("=")
    if not (equals and load and name.isidentifier()):
        raise UserError(f"--teacher {argument}: expected NAME=FOLDER, such as qwen=models/Qwen2.5-0.5B-Instruct")
    if name in ("smollm2", "target", "control", "fused"):
        raise UserError(f"--teacher {argument}: the name {name!r} is taken")
    return name, load


def main() -> None:
    """The command line."""
    arguments = parser("fusemega.recipes.quickstart_xtok", __doc__, "runs/quickstart-xtok", lr=3e-4, lambda_=0.1)
    arguments.add_argument(
        "--teacher", action="append", default=[], metavar="NAME=HF", help="a further teacher: HF folder or hub id"
    )
    run_quickstart(arguments, quickstart_xtok)


if __name__ == "__main__":
    main()
