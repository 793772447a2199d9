"""The `fusemega` command. Each command is one small file, imported only when it is the one asked for.

A command's module has a function `command`, whose signature and docstring are its help text (and, where its arguments
need one, a click class `parser`); a group of verbs has a `typer.Typer` named `app` instead.

    run_options.py    what commands that read a run file share
    many_values.py    options that take several values
    reference.py      the reference pages, made from the models and the command line themselves
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Sequence

import typer

from fusemega.errors import Retryable, UserError, of_the_system
from fusemega.runtime import lifeline, meeting
from fusemega.runtime.console import logger, quiet_megatron

# Shown by `fusemega --help`, which therefore imports none of the modules (torch alone takes seconds).
COMMANDS = {
    "train": "Train a model with the settings of a run file.",
    "teach": "Store a teacher's top-k distributions for a data set.",
    "align": "Make a vocabulary map from one tokenizer's ids to another's.",
    "project": "Map a store to another vocabulary with FuseLLM's and FuseChat's rules.",
    "run": "Run a recipe: several commands in order, each only when it must.",
    "launch": "Submit a training run, or a recipe as a chain of jobs, to Slurm.",
    "status": "Show how far a run or a recipe is, with its jobs and what is stuck.",
    "merge": "Merge fine-tuned variants of one model without loading them into memory.",
    "transplant": "Move a model onto another tokenizer's vocabulary.",
    "split": "Split long dialogues and texts so that they fit several tokenizers' windows.",
    "eval": "Measure perplexity and bits per byte of a model on a data set.",
    "score": "Score responses with a reward model, and write the rows with their rewards.",
    "sample": "Sample one source's responses to prompts, from a model here or behind a server.",
    "collect": "Collect the responses of several sources as rows of a prompt and its responses.",
    "verify": "Check responses: maths answers, and code with test cases in a sandbox.",
    "judge": "Compare responses pairwise with a model as the judge, and write the rows with their rewards.",
    "rules": "Score responses by simple rules, and write the rows with their rewards.",
    "select": "Make training sets of scored responses by a published protocol.",
    "published": "Convert FuseChat-3.0's published sets to rows that train reads, and count them.",
    "tasks": "Measure a model on tasks: maths answers, programs, pairs; write outputs for other judges.",
    "report": "Write a page about one or several training runs, with their curves.",
    "preflight": "Check the nodes of a job from inside it: versions, GPUs, folders, an all-reduce.",
    "env": "Show what this machine has, what is missing, and what that costs.",
}
GROUPS = {
    "prune": "Pruning: attention and MLP blocks removed from a trained model.",
    "switch": "Short or long reasoning for each query: labels, a switcher, its threshold, and a proxy that uses it.",
    "convert": "Convert between Hugging Face folders and Megatron checkpoints: import, export, verify.",
    "store": "Sample stores: inspect, merge, verify.",
    "show": "A look inside what a run file names: data, layout, teachers' rows, keys, stages.",
}


def build_app(asked: str | None) -> typer.Typer:
    """The command line with the command `asked` for in full; the others by name and summary."""
    app = typer.Typer(
        name="fusemega",
        help="Turn several trained language models into one better, or smaller, model, on Megatron-core.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"fusemega.cli.{name}") if name == asked else None
        parser = getattr(module, "parser", None)
        app.command(name, short_help=summary, cls=parser)(module.command if module else lambda: None)
    for name, summary in GROUPS.items():
        group = importlib.import_module(f"fusemega.cli.{name}").app if name == asked else typer.Typer()
        if name != asked:
            group.callback()(lambda: None)
        app.add_typer(group, name=name, short_help=summary)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process.

    The status is 0; with one line on stderr, 2 for a mistake of the user, or 1 for what may go well if tried again.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    had_world = _has_world()  # of a caller in Python, whose it stays
    atexit.register(gc.freeze)  # else the process's last act is to look for cycles in all that torch has made: 0.2 s
    quiet_megatron()
    lifeline.follow_starter()
    lifeline.keep_children()
    meeting.join()
    try:
        logger()  # refuses an unknown level before anything is done
        build_app(arguments[0] if arguments else None)(args=arguments, prog_name="fusemega")
    except SystemExit as end:
        if not end.code and not had_world and _has_world():
            _leave_world()
        raise
    except Exception as error:
        line = error if isinstance(error, UserError) else of_the_system(error)
        if line is None:
            if meeting.record_traceback(error):
                sys.exit(1)  # the launcher knows whether this is what began it
            if (echo := meeting.lost_peer(error)) is None:
                raise
            print(f"error: {echo}", file=sys.stderr)
            sys.exit(1)
        meeting.note_refusal(line)
        if not meeting.record_error(line):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1 if isinstance(line, Retryable) else 2)


def _has_world() -> bool:
    """Whether this process is in a process group, without importing anything."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _leave_world() -> None:
    """Ends the process group of a command that has ended well.

    Else gloo's threads may still hold the last tensors, and abort the process if Python is gone when they let go: one
    in ten ranks that had done all their work counted as crashed.
    """
    from fusemega.runtime.parallel import shutdown

    shutdown()
