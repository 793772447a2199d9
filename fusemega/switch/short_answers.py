"""The log-probability of the first short answer to each prompt, for the baseline that routes by its perplexity (CAR).

Rows go into a store of `rows: none`, by the key of the prompt. The answer's tokens are those of its text: where a
tokenizer would cut the text differently than the model wrote it, they are the tokenizer's.

Shape suffixes: N supervised positions of a micro-batch, H hidden size, S prompts of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from fusemega import __version__
from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.models.build import GPT
from fusemega.passes.batches import RowShape
from fusemega.passes.forward import hidden_states, sequence_log_probs
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.progress import progress
from fusemega.passes.score import score_samples
from fusemega.runtime.console import say
from fusemega.runtime.parallel import World
from fusemega.sampling.prompts import Prompt
from fusemega.sampling.responses import read_made, read_responses
from fusemega.store import Manifest, Row, StoreWriter, check_store
from fusemega.switch.families import SHORT
from fusemega.switch.modes import Modes
from fusemega.switch.prompt_samples import PromptSamples
from fusemega.switch.run_file import SwitchRun
from fusemega.text.sample import Sample


def first_answers(run: SwitchRun) -> dict[str, str]:
    """Prompt's key -> the text of its first response in the short mode; empty ones are left out.

    Raises:
        UserError: there are no responses yet.
    """
    found = {}
    for name in run.sets:
        path = run.out / "labels" / name / f"{SHORT}.jsonl"
        if not path.is_file():
            raise UserError(f"features.short_answers: {path} is not there; run `fusemega switch label` first")
        for row in read_responses(path, read_made(path)):
            if row["sample"] == 0 and row["text"]:
                found[row["key"]] = row["text"]
    return found


def score_short_answers(
    run: SwitchRun,
    source: ModelSource,
    gpt: GPT,
    modes: Modes,
    prompts: Mapping[str, Prompt],
    weights: str,
    shape: RowShape,
    world: World,
) -> int:
    """Stores what is missing. Collective. Returns how many prompts have a row."""
    texts = {key: text for key, text in first_answers(run).items() if key in prompts}
    ids = [(key, modes.ids(prompts[key].messages, SHORT, prompts[key].source), prompts[key].source) for key in texts]
    answers = [encoding.ids.tolist() for encoding in modes.tokenizer.encode(list(texts.values()))]
    samples = PromptSamples.of(ids, run.features.seq_length, answers)
    manifest = Manifest(
        weights=weights,
        tokenizer=modes.tokenizer.content_hash,
        template=modes.tokenizer.template_hash,
        mask_policy=f"first short answer, {modes.name}",
        truncation=run.features.seq_length,
        temperature=1.0,
        rows="none",
        vocab_size=source.vocab_size,
        versions={"fusemega": __version__, "torch": version("torch"), "megatron-core": version("megatron-core")},
    )
    folder = run.answers_store
    check_store(folder, manifest)
    writes = world.tp_rank == 0 and world.cp_rank == 0 and world.is_last_stage

    def score(hidden_NH: torch.Tensor, batch: MicroBatch, of: Sequence[Sample]) -> list[tuple[bytes, Row]]:
        logp_S = sequence_log_probs(hidden_states(gpt, hidden_NH, world), batch, world)
        if not writes:
            return []
        return [
            (sample.key, Row.of_sum(sample.ids_hash, len(sample.positions), logp, 0))
            for sample, logp in zip(of, logp_S.tolist(), strict=True)
        ]

    with StoreWriter(folder, manifest, writer_id=world.dp_rank) as writer:
        missing = [i for i, sample in enumerate(samples) if sample.key not in writer]
        world.barrier()
        if missing:
            if world.is_main:
                say(f"scoring {len(missing)} short answers")
            with progress("scoring short answers", int(samples.lengths[missing].sum())) as advance:
                for _, collected in score_samples(gpt, samples, missing, shape, score, world, advance):
                    for key, row in (pair for found in collected for pair in found):
                        writer.add(key, row)
    world.barrier()
    return len(samples)
