"""What a quickstart reports of its models: measures on several kinds of text, answers to one question, and a verdict.

Every figure of an arm is a list with one value for each seed; the target and the teachers have one value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from fusemega.files.output import write_durably
from fusemega.pipeline.functions import stage_function
from fusemega.report.plots import Panel

# For one model: kind of text -> measure -> one value for each seed.
Found = dict[str, dict[str, list[float]]]


class Measure(NamedTuple):
    """A quantity: its key, how it is written, and whether less of it is better."""

    key: str
    title: str
    form: str
    lower: bool


MEASURES = (
    Measure("bits_per_byte", "bits per byte", "{:.4f}", True),
    Measure("kl", "KL(teacher, model), nats a token", "{:.3f}", True),
    Measure("same_top_1", "same most probable token as the teacher", "{:.1%}", False),
)


@stage_function
def measure(evaluation: dict[str, Any], texts: Mapping[str, str], run_file: str) -> dict[str, dict[str, Any]]:
    """Kind of text -> the result of `fusemega eval` on it, run in this process: a model of this size needs no launch.

    Args:
        evaluation: content of the run file; `data.path` is each of the texts in turn.
        texts: kind -> JSONL.
        run_file: where the run file is written, so that the evaluation can be repeated by hand.
    """
    from fusemega.config import validate
    from fusemega.scoring.evaluate import EvalRun, Scorer

    write_durably(Path(run_file), f"# fusemega eval {run_file}\n{yaml.safe_dump(evaluation, sort_keys=False)}")
    run = validate(EvalRun, evaluation, "eval")
    scorer = Scorer(run)
    return {kind: scorer.score(run.data.model_copy(update={"path": path})).model_dump() for kind, path in texts.items()}


def evaluate_here(evaluation: dict[str, Any]) -> dict[str, Any]:
    """`fusemega eval` in this process: one model of this size needs no launch."""
    from fusemega.config import validate
    from fusemega.scoring.evaluate import EvalRun, evaluate

    return evaluate(validate(EvalRun, evaluation, "eval"))[0].model_dump()


@stage_function
def answer(folder: str, prompt: str, tokens: int) -> str:
    """The greedy answer of the folder's model, run by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def panels(summary: Mapping[str, Any], reference: str | None) -> list[Panel]:
    """The measures that were taken of the target and of what became of it, with the teachers that have them.

    Args:
        summary: as in summary.json.
        reference: the name of the model from which distances are measured; its own is zero by definition.
    """
    found: dict[str, Found] = summary["measures"]
    made = []
    for one in MEASURES:
        having = [name for name, of in found.items() if all(one.key in of[kind] for kind in summary["kinds"])]
        if {"target", "control", "fused"} <= {*having}:
            kinds = {kind: {name: found[name][kind][one.key] for name in having} for kind in summary["kinds"]}
            fixed = None if one.key == MEASURES[0].key else reference
            made.append(Panel(one.title, one.form, one.lower, kinds, fixed))
    return made


def seen(found: Mapping[str, Found], trained: str) -> str:
    """One sentence on whether `fused` is better than `control`, from the figures alone.

    Args:
        found: the figures of "target", "control" and "fused".
        trained: the kind of text that the arms were trained on; they saw none of the others.
    """
    others = [kind for kind in found["fused"] if kind != trained]
    counts = [(f"bits per byte on held-out {trained}", "bits_per_byte", [trained])]
    counts += [(f"on kinds of text never trained on ({', '.join(others)})", "bits_per_byte", others)]
    named = (("distance from the teacher, nats a token", "kl"), ("same most probable token", "same_top_1"))
    counts += [(what, key, [trained, *others]) for what, key in named if key in found["fused"][trained]]
    said, better, clear = [], 0, 0
    for what, key, kinds in counts:
        one = next(m for m in MEASURES if m.key == key)
        by_seed = {name: _means(found[name], kinds, key) for name in ("target", "control", "fused")}
        mean = {name: fmean(values) for name, values in by_seed.items()}
        sign = 1 if one.lower else -1
        better += sign * mean["fused"] < sign * mean["control"]
        worst, best = max(sign * x for x in by_seed["fused"]), min(sign * x for x in by_seed["control"])
        clear += worst < best
        figures = {name: one.form.format(value) for name, value in mean.items()}
        said.append(f"{what} {figures['fused']} against {figures['control']} (before: {figures['target']})")
    seeds = len(found["fused"][trained]["bits_per_byte"])
    if better == len(counts):
        verdict = f"fused is better than control on all {better} counts"
    else:
        verdict = f"fused is better than control on {better or 'none'} of {len(counts)} counts"
    spread = f"{seeds} seeds; on {clear} beyond their spread" if seeds > 1 else "one seed"
    return f"{verdict} ({spread}): {'; '.join(said)}."


def _means(found: Found, kinds: Sequence[str], key: str) -> list[float]:
    """The mean over the kinds, one value for each seed."""
    return [fmean(values) for values in zip(*(found[kind][key] for kind in kinds), strict=True)]


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text for a terminal."""
    names, kinds = list(summary["measures"]), summary["kinds"]
    lines = []
    for panel in panels(summary, None):
        cells = [["", *names]]
        for kind in kinds:
            what = "held out" if kind == summary["trained_kind"] else "never trained on"
            cells.append([f"{kind}, {what}", *(panel.cell(kind, name) for name in names)])
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines += ["", panel.heading]
        for row in cells:
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    texts = ", ".join(f"{kind} {of['samples']} samples, {of['bytes']} bytes" for kind, of in kinds.items())
    tokens = ", ".join(f"{count:.0f} ({arm})" for arm, count in summary["train_tokens"].items())
    lines += ["", f"measured on: {texts}", f"trained on tokens: {tokens}"]
    lines += ["", f"{summary['prompt']!r}, answered greedily by transformers:"]
    width = max(map(len, names))
    lines += [f"  {name:<{width}}  {text!r}" for name, text in summary["answers"].items()]
    return "\n".join([*lines, "", summary["seen"]])
