"""`fusemega eval`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fusemega.cli.run_options import NPROC, OVERRIDES, RUN_FILE, launch_or_continue


def command(run_file: RUN_FILE, overrides: OVERRIDES = None, nproc: NPROC = None) -> None:
    """Measure perplexity and bits per byte of a model over the supervised tokens of a data set.

    Prints one JSON object on stdout, and writes it to the run file's `output` if that is set. Bits per byte are
    comparable between models with different tokenizers; perplexities are not. With a `reference` model of the same
    tokenizer, the result also has KL(reference || model) in nats a token, and the share of tokens at which both models
    have the same most probable token. If the rows are pairs (chosen and rejected), it has the share of pairs whose
    chosen response has the higher log-probability: by the sum over its tokens, and by the mean.
    """
    from fusemega.config import load
    from fusemega.files.output import write_output
    from fusemega.scoring.evaluate import EvalRun, check_output, evaluate

    run = load(EvalRun, run_file, overrides or [])
    if run.output is not None:
        check_output(Path(run.output))
    if launch_or_continue(nproc, run.parallel):
        return
    with ExitStack() as held:
        result, world = evaluate(run, held)
        if world.is_main:
            if run.output is not None:
                write_output(Path(run.output), result.model_dump_json(indent=1) + "\n")
            print(result.model_dump_json())
