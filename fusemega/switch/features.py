"""`fusemega switch features`: one forward pass over each prompt, up to where the two modes part; its hidden state.

Rows go into a sample store of `rows: hidden`, by the key of the prompt, for the prompts of all sets. An interrupted
call goes on. Any layout: the hidden states of the last stage, or of the stage that holds the layer.

Shape suffixes: S prompts of a micro-batch, T tokens of it (under context parallelism this rank's), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from fusemega import __version__
from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.models.build import GPT
from fusemega.passes.batches import RowShape
from fusemega.passes.forward import last_rows
from fusemega.passes.layers import Point
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.progress import progress
from fusemega.passes.score import layer_states, score_samples
from fusemega.runtime.console import say
from fusemega.runtime.context_parallel import sum_over_context, zigzag
from fusemega.runtime.parallel import World, environment_rank, initialize
from fusemega.runtime.together import on_main
from fusemega.sampling.prompts import read_prompts
from fusemega.store import Manifest, Row, Store, StoreWriter, check_store
from fusemega.store.manifest import HiddenRows
from fusemega.switch.modes import Modes
from fusemega.switch.prompt_samples import PromptSamples
from fusemega.switch.run_file import FeatureSettings, SwitchRun
from fusemega.switch.short_answers import score_short_answers
from fusemega.text.sample import Sample


class FeaturesFound(BaseModel):
    """What was stored.

    Attributes:
        prompts: of all sets, each once.
        new: of these, computed by this call.
        size: numbers of a vector.
        short_answers: prompts whose first short answer has a log-probability; None: not asked for.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    new: int
    size: int
    short_answers: int | None


def features_manifest(source: ModelSource, modes: Modes, settings: FeatureSettings, weights: str) -> Manifest:
    """The manifest of the store; it decides whether features belong to a model, a template and these settings."""
    return Manifest(
        weights=weights,
        tokenizer=modes.tokenizer.content_hash,
        template=modes.tokenizer.template_hash,
        mask_policy="prompt",
        truncation=settings.seq_length,
        temperature=1.0,
        rows="hidden",
        hidden=HiddenRows(
            size=source.architecture.transformer_config["hidden_size"],
            layer=str(settings.layer),
            pooling=settings.pooling,
            prompt=modes.prefill_words,
            dtype=source.config.dtype,
        ),
        vocab_size=source.vocab_size,
        versions={"fusemega": __version__, "torch": version("torch"), "megatron-core": version("megatron-core")},
    )


def features(run: SwitchRun) -> tuple[FeaturesFound, World]:
    """Stores the features of all prompts of a run file. Collective; every rank gets what was found.

    Raises:
        UserError: bad input, a prompt that is too long, a store of another model, template or layer, before anything is
            computed; a full disk; a hidden state that is not finite.
    """
    source = ModelSource(run.model, run.parallel, environment_rank()[1], run.modes.chat_template)
    check_layer(run.features, source.architecture.transformer_config["num_layers"])
    source.note_length(run.features.seq_length)
    world = initialize(run.parallel)
    modes = Modes(run.modes, run.model.load, run.model.trust_remote_code)
    prompts = {key: prompt for config in run.sets.values() for key, prompt in read_prompts(config).by_key.items()}
    ids = {key: modes.prefill(prompt.messages, prompt.source) for key, prompt in prompts.items()}
    samples = PromptSamples.of(
        [(key, ids[key], prompt.source) for key, prompt in prompts.items()], run.features.seq_length
    )
    weights = world.from_main(source.weights_hash() if world.is_main else "")
    manifest = features_manifest(source, modes, run.features, weights)
    folder = run.features_store
    on_main(world, lambda: run.out.mkdir(parents=True, exist_ok=True))
    on_main(world, lambda: check_store(folder, manifest))
    with ExitStack() as held:
        on_main(world, lambda: held.enter_context(locked(folder)))
        with StoreWriter(folder, manifest, writer_id=world.dp_rank) as writer:
            missing = [i for i, sample in enumerate(samples) if sample.key not in writer]
            world.barrier()  # no rank may write before every rank has looked
            gpt = source.build(world) if missing or run.features.short_answers else None
            if world.is_main:
                say(f"reading {len(missing)} prompts; {len(samples) - len(missing)} are in {folder} already")
            unit = run.model.row_unit(run.parallel)
            shape = RowShape(run.features.seq_length, run.features.micro_batch_size, True, source.pad_id, unit)
            if missing:
                assert gpt is not None
                with progress("reading prompts", int(samples.lengths[missing].sum())) as advance:
                    for rows in _rows(gpt, samples, missing, shape, run.features, world, advance):
                        for key, row in rows:
                            writer.add(key, row)
        world.barrier()
        answers = None
        if run.features.short_answers:
            assert gpt is not None
            answers = score_short_answers(run, source, gpt, modes, prompts, weights, shape, world)
        found = FeaturesFound(prompts=len(samples), new=len(missing), size=_size(manifest), short_answers=answers)
        on_main(world, held.close)
    return found, world


def read_features(store: Path, keys: Sequence[str], places: Path) -> tuple[np.ndarray, Manifest]:
    """The features [N, H] of prompts, fp32, and the store's manifest.

    Args:
        store: folder of the store.
        keys: of the prompts.
        places: what asks, for the message.

    Raises:
        UserError: no store of hidden states there; a prompt without a row.
    """
    if not store.is_dir():
        raise UserError(f"{store}: no features; run `fusemega switch features` first")
    opened = Store.open(store)
    if opened.manifest.rows != "hidden":
        raise UserError(f"{store}: a store of rows: {opened.manifest.rows}; the switcher reads rows: hidden")
    rows = [opened.get(bytes.fromhex(key)) for key in keys]
    if lacking := rows.count(None):
        raise UserError(
            f"{store}: lacks {lacking} of the {len(keys)} prompts of {places}; run `fusemega switch features` again"
        )
    return np.stack([row.hidden_H for row in rows if row is not None and row.hidden_H is not None]), opened.manifest


def check_layer(settings: FeatureSettings, layers: int) -> None:
    """Refuses a layer that the model does not have.

    Raises:
        UserError: names the key.
    """
    if settings.layer == "final":
        return
    if settings.layer == layers - 1:
        raise UserError(f"features.layer: {settings.layer} is the last layer; give final, its output after the norm")
    if settings.layer >= layers:
        raise UserError(f"features.layer: {settings.layer}; the model has {layers} layers, counted from 0")


def _size(manifest: Manifest) -> int:
    assert manifest.hidden is not None
    return manifest.hidden.size


def _rows(
    gpt: GPT,
    samples: PromptSamples,
    missing: Sequence[int],
    shape: RowShape,
    settings: FeatureSettings,
    world: World,
    advance: Any,
) -> Iterator[list[tuple[bytes, Row]]]:
    """For each pass the rows that this rank writes."""

    def told(pooled_SH: torch.Tensor, batch: Sequence[Sample], stage: bool) -> list[tuple[bytes, Row]]:
        # The stage's tensor- and context-parallel ranks all have the same states, so one of them writes.
        if not (stage and world.tp_rank == 0 and world.cp_rank == 0):
            return []
        return [
            (sample.key, Row.of_hidden(sample.ids_hash, vector))
            for sample, vector in zip(batch, pooled_SH.float().cpu().numpy(), strict=True)
        ]

    if settings.layer == "final":
        last = settings.pooling == "last"

        def score(hidden: torch.Tensor, batch: MicroBatch, of: Sequence[Sample]) -> list[tuple[bytes, Row]]:
            pooled = _of_last(hidden, batch, world) if last else _mean(hidden, batch, world)
            return told(pooled, of, world.is_last_stage)

        rows = last_rows if last else _all_rows
        for _, collected in score_samples(gpt, samples, missing, shape, score, world, advance, rows=rows):
            yield [row for found in collected for row in found]
        return
    point = Point(int(settings.layer))

    def see(_: Point, hidden_TH: torch.Tensor, batch: MicroBatch, of: Sequence[Sample]) -> list[tuple[bytes, Row]]:
        if settings.pooling == "last":
            return told(_of_last(hidden_TH[last_rows(batch)], batch, world), of, True)
        return told(_mean(hidden_TH, batch, world), of, True)

    done = 0
    for count, seen in layer_states(gpt, samples, missing, shape, [point], see, world):
        ordered = sorted(missing, key=lambda i: -int(samples.lengths[i]))[done:count]  # as the pass takes them
        advance(int(samples.lengths[ordered].sum()))
        done = count
        yield [row for found in seen.get(point, ()) for row in found]


def _all_rows(batch: MicroBatch) -> torch.Tensor:
    return torch.arange(batch.tokens.size(1), device=batch.tokens.device)


def _of_last(hidden_SH: torch.Tensor, batch: MicroBatch, world: World) -> torch.Tensor:
    """[S, H] of each prompt's last token, on every context-parallel rank. Collective over them."""
    if world.cp_size == 1:
        return hidden_SH
    return sum_over_context(torch.where(batch.last_tokens[:, None] >= 0, hidden_SH, 0.0), world.cp_group)


def _mean(hidden_TH: torch.Tensor, batch: MicroBatch, world: World) -> torch.Tensor:
    """[S, H], the mean over each prompt's tokens, on every context-parallel rank. Collective over them."""
    count = len(batch.last_tokens)
    prompt_T = torch.full((batch.bounds[-1],), count, dtype=torch.int64)  # which prompt a token is of; padding: S
    for place, (start, tokens) in enumerate(zip(batch.bounds[:count], batch.texts[:count], strict=True)):
        prompt_T[start : start + tokens] = place
    if world.cp_size > 1:
        prompt_T = prompt_T[zigzag(torch.tensor(batch.bounds), world.cp_rank, world.cp_size)]
    prompt_T = prompt_T.to(hidden_TH.device)
    sums = hidden_TH.new_zeros(count + 1, hidden_TH.size(1), dtype=torch.float32)
    sums.index_add_(0, prompt_T, hidden_TH.float())
    sums_SH = sums[:count]
    if world.cp_size > 1:
        sums_SH = sum_over_context(sums_SH, world.cp_group)
    return sums_SH / torch.tensor(batch.texts[:count], device=sums_SH.device)[:, None]
