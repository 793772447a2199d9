"""`fusemega score`."""

from __future__ import annotations

from fusemega.cli.run_options import NPROC, OVERRIDES, RUN_FILE, launch_or_continue


def command(run_file: RUN_FILE, overrides: OVERRIDES = None, nproc: NPROC = None) -> None:
    """Score every response of a data set with a reward model, and write the rows again with their `rewards`.

    The model is one with a scalar head (LlamaForSequenceClassification and the like), or ArmoRM
    (LlamaForRewardModelWithGating), whose code is not needed. The rows may be messages, prompt with completion, pairs,
    or prompt with responses. Prints one JSON object on stdout; of pairs it has the accuracy and the mean margin. Run
    the same command again to resume after an interruption. The output appears complete or not at all.
    """
    from fusemega.config import load
    from fusemega.scoring.rewards import ScoreRun, score

    run = load(ScoreRun, run_file, overrides or [])
    if not launch_or_continue(nproc, run.parallel):
        result, world = score(run)
        if world.is_main:
            print(result.model_dump_json())
