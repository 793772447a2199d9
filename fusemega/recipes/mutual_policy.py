"""The E step's own stages: the prompts' portions, the checkpoints compared with the policy before, and the choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fusemega.checkpoint.series import CHECKPOINTS, checkpoint_folder, checkpoint_named
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.mutual.splits import portion_sizes, split_keys
from fusemega.mutual.win_rate import choose, win_rate
from fusemega.pipeline.functions import stage_function
from fusemega.pipeline.run import run
from fusemega.pipeline.stage import Stop
from fusemega.recipes.mutual_steps import MutualSteps
from fusemega.sampling.engine import LENGTH, STOP
from fusemega.sampling.prompts import PromptsConfig, prompt_key, read_prompts
from fusemega.sampling.responses import read_made, read_responses
from fusemega.training.records import read_metrics

BEFORE = "before"
"""Source of the responses of the policy before."""


@stage_function
def split_prompts(
    prompts: Mapping[str, Any], seed: int, sizes: Mapping[str, int | None], files: Mapping[str, str], record: str
) -> dict[str, int]:
    """Divides the prompts, and writes down which portion each is in. Returns how many are in each, and in none.

    Args:
        prompts: where they come from, as `PromptsConfig`.
        seed: decides which are where.
        sizes: arguments of `portion_sizes`.
        files: portion -> JSONL to write.
        record: JSON to write: the seed, and the keys of each portion's prompts.

    Raises:
        UserError: too few prompts.
    """
    found = read_prompts(PromptsConfig.model_validate(dict(prompts))).by_key
    portions = split_keys(found, seed, portion_sizes(len(found), **sizes))  # type: ignore[arg-type]
    for name, keys in portions.items():
        rows = ({"prompt": found[key].messages, **found[key].about} for key in keys)
        write_durably(Path(files[name]), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_durably(Path(record), json.dumps({"seed": seed, "portions": portions}, indent=1) + "\n")
    counts = {name: len(keys) for name, keys in portions.items()}
    return {**counts, "in no portion": len(found) - sum(counts.values())}


def checkpoints_of(folder: Path, interval: int) -> dict[int, Path]:
    """Iteration -> folder, of the checkpoints of a finished run: every `interval` updates, and after the last.

    Raises:
        UserError: one of them is missing; names it.
    """
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder}: no update was recorded, so there is no checkpoint to choose")
    last = int(rows[-1]["iteration"])
    wanted = [*range(interval, last, interval), last]
    return {iteration: checkpoint_named(folder / CHECKPOINTS, iteration) for iteration in wanted}


@stage_function
def compare(
    iteration: int,
    trained: str,
    interval: int,
    before: str,
    prompts: str,
    engine: Mapping[str, Any],
    sampling: Mapping[str, Any],
    reward: Mapping[str, Any],
    dtype: str,
    nproc: int,
    folder: str,
    wins: str,
) -> dict[str, float]:
    """Compares every checkpoint with the policy before: one response of each to each prompt, the higher reward wins.

    How many checkpoints there are is known only after training, so these are stages of a graph of its own, in `folder`.

    Args:
        iteration: number of the E step.
        trained: the run's folder `hf`; its checkpoints lie beside it.
        interval: updates between them.
        before: the policy before.
        prompts: the prompts to answer.
        engine, sampling: sections of the run files of `sample`, without the policy.
        reward: `load` and sections `model`, `parallel`, `rows` and `micro_batch_size` of the run file of `score`.
        dtype: of the exported checkpoints.
        nproc: processes of `score`.
        folder: where everything is written.
        wins: JSON of the result.

    Returns:
        Checkpoint -> its win rate.

    Raises:
        UserError: a checkpoint is missing, or a stage failed.
    """
    steps = MutualSteps(Path(folder), nproc, {}, {})
    seed = int(sampling.get("seed", 0))
    # Not the same draws as the candidates': of two policies that are alike, nearly all responses would be equal.
    others = {**sampling, "seed": seed + 1}
    files = {BEFORE: steps.sample_policy(f"{iteration}-{BEFORE}", BEFORE, before, prompts, engine, others)}
    sources = {}
    for number, checkpoint in checkpoints_of(Path(trained).parent, interval).items():
        source = sources[number] = f"iter-{number}"
        policy = steps.export(f"{iteration}-{source}", checkpoint, dtype)
        files[source] = steps.sample_policy(f"{iteration}-{source}", source, policy, prompts, engine, sampling)
    groups = steps.collect(f"{iteration}", prompts, list(files.values()), "--min-responses", "1", "--keep-length")
    rewarded = steps.score(
        f"{iteration}",
        reward["load"],
        {"path": groups, **reward["rows"]},
        reward["model"],
        reward["parallel"],
        micro_batch_size=reward["micro_batch_size"],
    )
    run(steps.graph())
    rewards = rewards_by_source(rewarded)
    answers = {source: Answers.read(path, rewards.get(source, {})) for source, path in files.items()}
    candidates = [
        {
            "checkpoint": number,
            **answers[source].against(answers[BEFORE], f"{folder}: {source}"),
            **answers[source].facts(),
        }
        for number, source in sources.items()
    ]
    found = {"iteration": iteration, "before": answers[BEFORE].facts(), "candidates": candidates}
    write_durably(Path(wins), json.dumps(found, indent=1) + "\n")
    return {str(one["checkpoint"]): one["rate"] for one in candidates}


def rewards_by_source(path: str) -> dict[str, dict[str, float]]:
    """Source -> key of the prompt -> reward, of rows that `fusemega score` has written, one response a source."""
    found: dict[str, dict[str, float]] = {}
    for row in rows_of(path):
        key = prompt_key(row["prompt"])
        for response, reward in zip(row["responses"], row["rewards"], strict=True):
            found.setdefault(response["source"], {})[key] = reward
    return found


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that a stage has written. Rows end at newlines alone."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@dataclass(frozen=True)
class Answers:
    """One policy's responses to the prompts on which policies are compared.

    Attributes:
        rewards: key -> reward; None: the response is empty.
        tokens: lengths of the responses that are known.
        cut: responses that reached the most tokens.
    """

    rewards: Mapping[str, float | None]
    tokens: list[int]
    cut: int

    @classmethod
    def read(cls, path: str, rewards: Mapping[str, float]) -> Answers:
        """The responses of a file of `sample`; a prompt that got none, as one that is too long, is left out."""
        rows = [
            row for row in read_responses(Path(path), read_made(Path(path))) if row["finish_reason"] in (STOP, LENGTH)
        ]
        return cls(
            {row["key"]: rewards[row["key"]] if row["text"].strip() else None for row in rows},
            [row["tokens"] for row in rows if row["tokens"] is not None],
            sum(row["finish_reason"] == LENGTH for row in rows),
        )

    def against(self, before: Answers, name: str) -> dict[str, Any]:
        """The win rate over another policy, at the prompts that both have answered.

        Raises:
            UserError: there are none.
        """
        both = [key for key in self.rewards if key in before.rewards]
        if not both:
            raise UserError(f"{name}: no prompt has a response of both policies, so they cannot be compared")
        found = win_rate([self.rewards[key] for key in both], [before.rewards[key] for key in both])
        return found.as_dict()

    def facts(self) -> dict[str, Any]:
        """Means, and how many responses are empty or cut."""
        known = [reward for reward in self.rewards.values() if reward is not None]
        return {
            "mean_reward": fmean(known) if known else None,
            "mean_tokens": fmean(self.tokens) if self.tokens else None,
            "empty": len(self.rewards) - len(known),
            "cut": self.cut,
        }


@stage_function
def choose_policy(
    iteration: int, wins: str, trained: str, tau: float, dtype: str | None, policy: str, answers: str
) -> dict[str, Any]:
    """Makes the best checkpoint the next policy, or ends the work.

    Args:
        iteration: number of the E step.
        wins: what `compare` has written. Its folder has the responses.
        trained: the run's folder `hf`.
        tau: the least win rate.
        dtype: of the policy's weights, "float32" or others; None: that of the folder that was trained.
        policy: folder to write.
        answers: JSONL to write: its responses to the prompts on which it was compared, as `prompt` and `completion`.

    Raises:
        Stop: no checkpoint has that win rate; the policy before stays.
        UserError: the checkpoint is missing or damaged.
    """
    import torch

    from fusemega.convert.convert import export_megatron
    from fusemega.runtime.workers import default_workers

    rates = {one["checkpoint"]: one["rate"] for one in read_json(Path(wins))["candidates"]}
    choice = choose(rates, tau)
    if not choice.is_kept:
        raise Stop(choice.why_stopped(iteration))
    said = Path(wins).parent / "responses" / f"{iteration}-iter-{choice.checkpoint}.jsonl"
    rows = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["text"]}]}
        for row in rows_of(said)
        if row["finish_reason"] in (STOP, LENGTH) and row["text"].strip()
    ]
    if not rows:
        raise UserError(f"{said}: the policy of win rate {choice.win_rate:.4f} has answered no prompt")
    write_durably(Path(answers), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    run_folder = Path(trained).parent
    checkpoint = checkpoint_named(run_folder / CHECKPOINTS, choice.checkpoint)
    assert checkpoint == checkpoint_folder(run_folder / CHECKPOINTS, choice.checkpoint)
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    export_megatron(checkpoint, policy, dtype=torch_dtype, workers=default_workers())
    return {"checkpoint": choice.checkpoint, "win_rate": choice.win_rate, "tau": tau}
