"""`fusemega switch`: a switcher between short and long reasoning."""

from __future__ import annotations

from typing import Annotated

import typer

from fusemega.cli.run_options import NPROC, OVERRIDES, RUN_FILE, launch_or_continue

app = typer.Typer(
    no_args_is_help=True,
    help="Short or long reasoning for each query: labels, a switcher, its threshold, and a proxy that uses it.",
)


@app.command("label")
def label(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Sample responses to all prompts in the short and the long mode, and verify them.

    Each response is recorded as soon as it is there; run the same command again to go on after an interruption, or with
    more prompts or responses. Writes output_dir/labels, and prints one JSON object: for each set of prompts the pass
    rates, tokens, and what could not be decided.
    """
    import json

    from fusemega.config import load
    from fusemega.switch.label import label as run_label
    from fusemega.switch.run_file import SwitchRun

    found = run_label(load(SwitchRun, run_file, overrides or []))
    print(json.dumps({name: each.model_dump(mode="json") for name, each in found.items()}))


@app.command("features")
def features(run_file: RUN_FILE, overrides: OVERRIDES = None, nproc: NPROC = None) -> None:
    """Read the model's hidden state of each prompt, with one forward pass, in any layout.

    Goes on where an earlier call stopped. Writes the sample store output_dir/features, which `fusemega store` can
    inspect and verify, and prints one JSON object.
    """
    from fusemega.config import load
    from fusemega.switch.features import features as run_features
    from fusemega.switch.run_file import SwitchRun

    run = load(SwitchRun, run_file, overrides or [])
    if not launch_or_continue(nproc, run.parallel):
        found, world = run_features(run)
        if world.is_main:
            print(found.model_dump_json())


@app.command("train")
def train(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Train the switcher on labels and features.

    Takes seconds to minutes on a CPU. Writes output_dir/switcher (weights in safetensors, and what they are for), with
    the default threshold, and prints one JSON object.
    """
    from fusemega.config import load
    from fusemega.switch.run_file import SwitchRun
    from fusemega.switch.train import train as run_train

    print(run_train(load(SwitchRun, run_file, overrides or [])).model_dump_json())


@app.command("calibrate")
def calibrate(
    run_file: RUN_FILE,
    overrides: OVERRIDES = None,
    token_budget: Annotated[
        float | None, typer.Option(help="Most tokens of a response, in the mean: takes the most accurate threshold.")
    ] = None,
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(
            help="Most accuracy lost against the long mode alone, such as 0.01: takes the cheapest threshold."
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Take this threshold.")] = None,
) -> None:
    """Pick the threshold for a budget of tokens or a loss of accuracy.

    Give one of the three options. Writes the threshold into output_dir/switcher, and prints one JSON object with what
    it gives, with 95 % bands. If no threshold meets the budget, the nearest is told and nothing is changed.
    """
    from fusemega.config import load
    from fusemega.switch.calibrate import calibrate as run_calibrate
    from fusemega.switch.run_file import SwitchRun

    run = load(SwitchRun, run_file, overrides or [])
    print(run_calibrate(run, token_budget, max_accuracy_loss, threshold).model_dump_json())


@app.command("eval")
def evaluate(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Compare the switcher with other choices on prompts that it has not seen.

    With one mode alone, choosing at random at the same cost, a classifier of the text, the perplexity of the short
    answer, and an oracle that knows the labels. Prints a table, and writes output_dir/eval with eval.json and
    report.html.
    """
    from fusemega.config import load
    from fusemega.runtime.console import tell
    from fusemega.switch.evaluate import evaluate_switch, table
    from fusemega.switch.run_file import SwitchRun

    tell(table(evaluate_switch(load(SwitchRun, run_file, overrides or []))))


@app.command("serve")
def serve(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Serve a proxy that chooses short or long reasoning for each request, in front of an OpenAI-compatible server.

    Takes /v1/chat/completions and passes the answers byte for byte, streams included; also /v1/models, /health and
    /metrics. A client that chooses the mode itself gets it; `MODEL:tau=0.1`, `MODEL:short` and `MODEL:long` choose for
    one request. Answers carry the headers x-fusemega-mode, -score and -threshold. If the switcher fails, the long mode
    is taken. Refuses to start if the upstream lacks the model or ignores the switch. Ends with Ctrl-C.
    """
    from fusemega.config import load
    from fusemega.switch.serve import SwitchServeRun
    from fusemega.switch.serve import serve as run_serve

    run_serve(load(SwitchServeRun, run_file, overrides or []))
