"""`fusemega teach`: a teacher's distribution at every supervised position, as its k most probable tokens or as draws
from it, into a sample store; or only the log-probability of each sample's supervised tokens, summed.

Shape suffixes: N supervised positions of a micro-batch, M of this rank's under context parallelism, P of one sample,
H hidden size, K ids kept a position, S draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from fusemega import __version__
from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.lock import locked
from fusemega.logits.sampled import count_draws, sample_ids, uniforms
from fusemega.logits.topk import top_k_log_probs
from fusemega.models.build import GPT
from fusemega.passes.batches import prepare_together
from fusemega.passes.forward import head_settings, hidden_states, sequence_log_probs, whole_positions
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.progress import progress
from fusemega.passes.score import score_samples
from fusemega.runtime.console import say
from fusemega.runtime.parallel import World, initialize
from fusemega.runtime.together import on_main
from fusemega.scoring.run_file import PassRun
from fusemega.store import Manifest, Row, Store, StoreWriter, check_store
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample


class TeachRun(PassRun):
    """Run file of `fusemega teach`."""

    store: str = Field(description="folder of the sample store; an interrupted run resumes where it stopped")
    rows: Literal["top_k", "sampled", "none"] = Field(
        "top_k",
        description="top_k: store the most probable tokens; sampled: draw tokens, an unbiased target; none: only the "
        "summed log-probability of each sample, for the reference of a preference loss",
    )
    top_k: int = Field(10, ge=1, description="rows: top_k; log-probabilities stored for each position")
    num_samples: int = Field(50, ge=1, description="rows: sampled; draws for each position, with replacement")
    seed: int = Field(0, ge=0, description="rows: sampled; seed of the draws, which are the same in every layout")
    temperature: float = Field(1.0, gt=0, description="rows hold softmax(logits / temperature); not with rows: none")

    part: int = Field(0, ge=0, description="which of `parts` parts of the samples to teach, counted from 0")
    parts: int = Field(
        1,
        ge=1,
        le=1 << 16,
        description="1: all samples; N: each sample is in one of N parts, taught by N runs into N stores, which "
        "`fusemega store merge` joins to the store of one run",
    )

    @model_validator(mode="after")
    def _part_is_one_of_them(self) -> TeachRun:
        if self.part >= self.parts:
            raise ValueError(f"part: {self.part} is none of parts: {self.parts}; allowed: 0 to {self.parts - 1}")
        return self

    @model_validator(mode="after")
    def _settings_act(self) -> TeachRun:
        """Settings of other kinds of rows are refused, because they have no effect."""
        others = {"top_k": ("num_samples", "seed"), "sampled": ("top_k",)}
        for name in others.get(self.rows, ("top_k", "num_samples", "seed", "temperature")):
            if name in self.model_fields_set:
                raise ValueError(f"{name}: no effect with rows: {self.rows}")
        return self


def teach(run: TeachRun) -> Path:
    """Score `run.data` with `run.model` and store its rows. Returns the store's folder.

    Raises:
        UserError: bad input, or a store begun by another teacher, template or temperature, before anything is
            computed; a full disk; a row that is not a distribution.
    """
    source = run.open()
    if run.rows == "top_k" and run.top_k > source.vocab_size:
        raise UserError(f"top_k: {run.top_k} is more than the model's vocabulary of {source.vocab_size}")
    world = initialize(run.parallel)
    with ExitStack() as held:
        on_main(world, lambda: held.enter_context(locked(run.store)))
        return _teach(run, source, world)


def _teach(run: TeachRun, source: ModelSource, world: World) -> Path:
    manifest = Manifest(
        weights=world.from_main(source.weights_hash() if world.is_main else ""),
        tokenizer=source.tokenizer.content_hash,
        template=source.tokenizer.template_hash,
        mask_policy=MASK_POLICY,
        truncation=run.data.seq_length,
        temperature=run.temperature,
        rows=run.rows,
        top_k=run.top_k if run.rows == "top_k" else None,
        num_samples=run.num_samples if run.rows == "sampled" else None,
        seed=run.seed if run.rows == "sampled" else None,
        vocab_size=source.vocab_size,
        versions={"fusemega": __version__, "torch": version("torch"), "megatron-core": version("megatron-core")},
    )
    folder = Path(run.store)
    check_store(folder, manifest)
    dataset = prepare_together(run.data, source.tokenizer, cache_folder() / "data", source.vocab_size, world)
    gpt = source.build(world)
    # Opened on every rank: each must know what is durable already.
    with StoreWriter(folder, manifest, writer_id=world.dp_rank) as writer:
        # Only the first of equal samples: each data-parallel rank has its own writer, and would store its own copy.
        first = {key: i for i, key in reversed(list(enumerate(dataset.keys)))}
        distinct = len(first)
        first = dict(sorted(first.items(), key=lambda item: item[1])[run.part :: run.parts])
        missing = sorted(i for key, i in first.items() if key not in writer)
        world.barrier()  # no rank may write before every rank has looked
        if world.is_main:
            repeated = f", {len(dataset) - distinct} repeat others" if distinct < len(dataset) else ""
            whole = f" of part {run.part} of {run.parts}" if run.parts > 1 else ""
            say(
                f"teaching {len(missing)} samples{whole}; {len(first) - len(missing)} are in {folder} already{repeated}"
            )
        # The last stage's tensor- and context-parallel ranks all have the same rows, so one of them writes.
        writes = world.tp_rank == 0 and world.cp_rank == 0 and world.is_last_stage

        # Generators, so that rows are read from the device once all of a pass has been asked of it.
        def score(hidden_NH: torch.Tensor, batch: MicroBatch, samples: Sequence[Sample]) -> Iterable[tuple[bytes, Row]]:
            if run.rows == "none":
                # As the model in training computes it, which is compared with it before the first update.
                logp_S = sequence_log_probs(hidden_states(gpt, hidden_NH, world), batch, world)
                return _sums(samples, logp_S) if writes else ()
            rows = _top_k_rows if run.rows == "top_k" else _sampled_rows
            columns_N = rows(run, gpt, hidden_NH, batch, samples, world)
            whole = [whole_positions(column, batch, world) for column in columns_N]
            return _cut(samples, *whole) if writes else ()

        with progress("teaching", int(sum(dataset.lengths[i] for i in missing))) as advance:
            for _, collected in score_samples(gpt, dataset, missing, run.row_shape(source), score, world, advance):
                for rows in collected:
                    for key, row in rows:
                        writer.add(key, row)
        if world.is_main:
            say(f"taught {len(missing)} samples")
    world.barrier()
    if world.is_main:
        say(f"{folder}: {len(Store.open(folder))} samples")
    return folder


Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # as `top_k_log_probs` returns


def _top_k_rows(
    run: TeachRun, gpt: GPT, hidden_MH: torch.Tensor, batch: MicroBatch, samples: Sequence[Sample], world: World
) -> Columns:
    head, settings = gpt.head.weight, head_settings(gpt, world)
    return top_k_log_probs(hidden_MH, head, run.top_k, batch.labels, temperature=run.temperature, **settings)


def _sampled_rows(
    run: TeachRun, gpt: GPT, hidden_MH: torch.Tensor, batch: MicroBatch, samples: Sequence[Sample], world: World
) -> Columns:
    parts = [uniforms(run.seed, sample.key, len(sample.positions), run.num_samples) for sample in samples]
    # The empty array is for a micro-batch without samples.
    uniforms_NS = np.concatenate([np.empty((0, run.num_samples)), *parts])
    uniforms_MS = torch.from_numpy(uniforms_NS).to(hidden_MH.device)[slice(None) if batch.kept is None else batch.kept]
    draws_MS, label_logp_M = sample_ids(
        hidden_MH,
        gpt.head.weight,
        uniforms_MS,
        batch.labels,
        temperature=run.temperature,
        **head_settings(gpt, world),
    )
    ids_MS, counts_MS = map(torch.from_numpy, count_draws(draws_MS.cpu().numpy()))
    logp_MS = (counts_MS.double() / run.num_samples).log().float().to(hidden_MH.device)
    # Draws are of the whole vocabulary, so no mass is left for a residual: its log is -inf.
    return ids_MS.to(hidden_MH.device), logp_MS, torch.full_like(label_logp_M, -torch.inf), label_logp_M


def _sums(samples: Sequence[Sample], logp_S: torch.Tensor) -> Iterator[tuple[bytes, Row]]:
    """Rows without positions; here S counts the samples of the micro-batch."""
    for sample, logp in zip(samples, logp_S.tolist(), strict=True):
        yield sample.key, Row.of_sum(sample.ids_hash, len(sample.positions), logp, sample.num_bytes)


def _cut(
    samples: Sequence[Sample],
    ids_NK: torch.Tensor,
    logp_NK: torch.Tensor,
    residual_N: torch.Tensor,
    label_logp_N: torch.Tensor,
) -> Iterator[tuple[bytes, Row]]:
    """Cut a micro-batch's results at its samples' borders."""
    lengths = [len(sample.positions) for sample in samples]
    columns = (tensor.cpu().split(lengths) for tensor in (ids_NK, logp_NK, residual_N, label_logp_N))
    for sample, ids_PK, logp_PK, residual_P, label_logp_P in zip(samples, *columns, strict=True):
        yield (
            sample.key,
            Row(
                ids_hash=sample.ids_hash,
                end_bytes=sample.end_bytes[sample.positions],
                ids_PK=ids_PK.numpy(),
                logp_PK=logp_PK.float().numpy(),
                log_residual_P=residual_P.float().numpy(),
                sum_logp=float(label_logp_P.double().sum()),
                label_ids_P=sample.ids[sample.positions + 1],
                label_logp_P=label_logp_P.float().numpy(),
                num_bytes=sample.num_bytes,
            ),
        )
