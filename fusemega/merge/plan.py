"""The plan of a merge, tensor by tensor, with every check that is possible before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fusemega.merge.methods  # noqa: F401  (registers them)
from fusemega.errors import UserError, nearest
from fusemega.files.sizes import parse_size
from fusemega.hf.check import check_copies, check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.ranges import RangeReader
from fusemega.hf.safetensors_writer import TensorInfo, plan_shards
from fusemega.merge.jobs import plan_jobs
from fusemega.merge.method import ELEMENTWISE_ALIGNMENT, Job, Method, TensorSpec, find_method
from fusemega.merge.run_file import MergeRun
from fusemega.merge.sources import TensorSource
from fusemega.merge.statistics import CELL
from fusemega.merge.template import plan_template
from fusemega.merge.vocabulary import MergedVocabulary, plan_vocabulary
from fusemega.models.architecture import Architecture
from fusemega.models.registry import architecture_of
from fusemega.models.rules import VocabRows

BLOCK_BYTES = 16 << 20
"""Bytes of the vectors of one block in a worker: near the processor's caches, and so many that Python's cost for each
operation is small beside the operation."""
MOST_ELEMENTS = 1 << 24
"""The most elements of a block: up to this number, fp32 counts exactly."""
INTERPRETER_BYTES = 230 << 20
"""Memory of Python with torch, measured."""
WORKER_BYTES = 40 << 20
"""Memory that a forked process comes to have for itself: parts of that, and memory that it has freed. Measured."""


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: what is written, and where each model keeps it (the base first, if there is one)."""

    spec: TensorSpec
    dtype: torch.dtype
    sources: list[TensorSource]

    @property
    def computed_in(self) -> torch.dtype:
        """fp32, or fp64 where anything is fp64."""
        wide = torch.float64 in {self.dtype, *(source.dtype for source in self.sources)}
        return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class MergePlan:
    """A checked merge.

    Attributes:
        run: the run file.
        method: the method of the run.
        folders: the models' folders, the base first if there is one.
        has_base: whether there is a base.
        tensors: output name -> tensor, in the model's order.
        jobs: what is merged together, in that order.
        shards: output file -> its tensors.
        config: the output's config.json.
        vocabulary: rows, tokenizer.
        template: the chat template that takes the place of that tokenizer's; None: its own.
        notes: what was understood and done, for the user.
    """

    run: MergeRun
    method: Method
    folders: list[HFFolder]
    has_base: bool
    tensors: dict[str, PlannedTensor]
    jobs: list[Job]
    shards: dict[str, list[TensorInfo]]
    config: dict[str, Any]
    vocabulary: MergedVocabulary
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[HFFolder]:
        """The folders without the base."""
        return self.folders[self.has_base :]

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(info.nbytes for shard in self.shards.values() for info in shard)

    def close(self) -> None:
        """Closes the folders' files."""
        for tensor in self.tensors.values():
            for source in tensor.sources:
                source.reader.close()

    def block_elements(self, asked: int | None) -> int:
        """Elements of a block: about `asked`, or what `BLOCK_BYTES` allow, in steps that keep results the same."""
        if asked is None:
            fixed, each = self.method.vectors
            count = len(self.models)
            asked = BLOCK_BYTES // (4 * (len(self.folders) + 1 + fixed + each * count))
        return max(CELL, min(asked, MOST_ELEMENTS) // CELL * CELL)

    def blocks(self, spec: TensorSpec, block_elements: int) -> list[tuple[int, int]]:
        """(start, count) of each block of a tensor."""
        step = block_elements
        if self.method.whole_rows and spec.shape:
            row = spec.shape[-1]
            # A multiple both of a row and of the alignment.
            unit = row * ELEMENTWISE_ALIGNMENT // math.gcd(row, ELEMENTWISE_ALIGNMENT)
            step = max(unit, block_elements // unit * unit)
        return [(start, min(step, spec.elements - start)) for start in range(0, spec.elements, step)]


def plan_merge(run: MergeRun, paths: Mapping[str, Path], source: str, notes: Sequence[str] = ()) -> MergePlan:
    """Opens every folder and checks everything that can be checked without reading weights.

    Args:
        run: the run.
        paths: each model's name in the run -> its Hugging Face folder.
        source: the run file, for messages.
        notes: notes from reading it.

    Raises:
        UserError: an unknown method or setting, models that do not fit each other, a choice that has to be made.
    """
    method = find_method(run.merge_method)
    entries = [entry for entry in run.models if not (method.needs_base and entry.model == run.base_model)]
    if method.needs_base and run.base_model is None:
        raise UserError(f"{source}: base_model: {method.name} needs one, and none is given")
    if not entries or (method.only_two and len(entries) != 1):
        wanted = "exactly one" if method.only_two else "at least one"
        raise UserError(f"{source}: models: {method.name} merges {wanted} model into the base, found {len(entries)}")
    names = ([str(run.base_model)] if method.needs_base else []) + [entry.model for entry in entries]
    opened = {name: HFFolder(paths[name]) for name in dict.fromkeys(names)}
    for folder in opened.values():
        check_tensors(folder)
    folders = [opened[name] for name in names]
    _check_architecture(folders)
    layers = int(folders[0].config["num_hidden_layers"])
    if run.layer_range is not None and run.layer_range != (0, layers):
        found = list(run.layer_range)
        raise UserError(f"{source}: slices: layer_range is {found}, and the models have {layers} layers")
    donor = None if run.tokenizer_source is None else _place(run.tokenizer_source, names, source)
    vocabulary = plan_vocabulary(folders, run.vocabulary, donor, method.needs_base)
    vocabulary, template, told = plan_template(vocabulary, folders, names, run, method.needs_base)
    tensors, config = _tensors(folders, run, vocabulary)
    all_notes = [*notes, *([vocabulary.note] if vocabulary.note else []), *told]
    jobs = plan_jobs(method, run, entries, [tensor.spec for tensor in tensors.values()], layers, source)
    infos = [TensorInfo(name, tensor.dtype, tensor.spec.shape) for name, tensor in tensors.items()]
    shards = plan_shards(infos, parse_size("max_shard_size", run.max_shard_size))
    return MergePlan(
        run, method, folders, method.needs_base, tensors, jobs, shards, config, vocabulary, template, all_notes
    )


def _place(name: str, names: Sequence[str], source: str) -> int:
    if name not in names:
        raise UserError(f"{source}: tokenizer_source: {name!r} takes no part in this merge{nearest(name, names)}")
    return names.index(name)


def _check_architecture(folders: Sequence[HFFolder]) -> None:
    """Checks that all compute the same function of their weights; vocabularies and tied heads are checked elsewhere."""
    first = folders[0]
    ours = first.architecture.transformer_config
    for folder in folders[1:]:
        other = folder.architecture
        if other.family is not first.architecture.family:
            raise UserError(
                f"{folder.path}: model_type {folder.config.get('model_type')!r}, and {first.path} is "
                f"{first.config.get('model_type')!r}: only models of one architecture can be merged"
            )
        other.require_head([first.architecture.head], str(folder.path))
        if other.layers != first.architecture.layers and other.transformer_config == ours:
            raise UserError(
                f"{folder.path}: block_configs of config.json leaves out other blocks than in {first.path}: only "
                f"models of one architecture can be merged"
            )
        theirs = other.transformer_config
        for key in ours.keys() | theirs.keys():
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{folder.path}: {key} is {theirs.get(key)}, and {ours.get(key)} in {first.path}: only models of "
                    f"one architecture can be merged"
                )
        for what in ("softcap", "attention_softcap"):
            if getattr(other, what) != getattr(first.architecture, what):
                raise UserError(
                    f"{folder.path}: {what} is {getattr(other, what)}, and {getattr(first.architecture, what)} in "
                    f"{first.path}: only models of one architecture can be merged"
                )
        same_rope = other.text_rope() == first.architecture.text_rope()
        for of in (Architecture.inv_freq, Architecture.local_inv_freq):
            frequencies, others = of(first.architecture), of(other)
            if frequencies is None or others is None:
                same_rope &= frequencies is others
            else:
                same_rope &= torch.equal(frequencies, others)
        if not same_rope:
            raise UserError(f"{folder.path}: its rotary positions differ from those of {first.path}")


def _tensors(
    folders: Sequence[HFFolder], run: MergeRun, vocabulary: MergedVocabulary
) -> tuple[dict[str, PlannedTensor], dict[str, Any]]:
    tied = [folder.architecture.tied for folder in folders]
    config = dict(folders[0].config) | {"vocab_size": vocabulary.rows, "tie_word_embeddings": all(tied)}
    donor = folders[vocabulary.donor].config
    config |= {key: value for key, value in donor.items() if key.endswith("_token_id")}
    rules = [rule for rule in architecture_of(config).rules() if not rule.duplicate]
    shapes = {name: shape for rule in rules for name, shape in rule.hf_shapes().items()}
    by_rows = {name for rule in rules if isinstance(rule, VocabRows) for name in rule.hf_shapes()}
    readers = {id(folder): RangeReader(folder) for folder in folders}
    tensors = {}
    for name, shape in shapes.items():
        sources = []
        for folder, rows in zip(folders, vocabulary.maps, strict=True):
            # A tied model's head is its embedding.
            there = folder.architecture.copies().get(name, name)
            rows = rows if name in by_rows else None
            sources.append(TensorSource(readers[id(folder)], there, folder.dtype(there), rows, shape[-1]))
        tensors[name] = PlannedTensor(TensorSpec(name, shape), _dtype(name, sources, run), sources)
    for folder in folders:
        check_copies(folder)
    del config["tie_word_embeddings"]
    if any(tied) or "tie_word_embeddings" in folders[0].config:  # a family's default may be either
        config["tie_word_embeddings"] = all(tied)
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return tensors, config


def _dtype(name: str, sources: Sequence[TensorSource], run: MergeRun) -> torch.dtype:
    if run.dtype is not None:
        chosen = getattr(torch, run.dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    first = sources[0]
    for source in sources[1:]:
        if source.dtype != first.dtype:
            raise UserError(
                f"{source.reader.folder.path}: tensor {source.name} is {_short(source.dtype)}, and "
                f"{_short(first.dtype)} in {first.reader.folder.path}; say which dtype is to be written (dtype:)"
            )
    return first.dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory_bytes(plan: MergePlan, workers: int, block_elements: int) -> int:
    """The memory that all processes together are expected to hold at their peak: Python and torch once; for each worker
    its own part of these, a block with its temporaries, and what the method remembers of a tensor."""
    workers = min(workers, len(plan.jobs))
    fixed, each = plan.method.vectors
    largest = max(count for t in plan.tensors.values() for _, count in plan.blocks(t.spec, block_elements))
    widest = max(tensor.computed_in.itemsize for tensor in plan.tensors.values())
    vectors = len(plan.folders) + 1 + fixed + each * len(plan.models)
    sizes = sorted((job.elements for job in plan.jobs), reverse=True)
    remembered = sum(plan.method.remembered_bytes(elements, len(plan.models)) for elements in sizes[:workers])
    return INTERPRETER_BYTES + workers * (WORKER_BYTES + largest * widest * vectors) + remembered
