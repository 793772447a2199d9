"""`fusemega project`: maps a source's store to the target's ids with the published methods, before training.

Only parity needs this: the published methods align whole token sequences, which a store does not have. The default
alignment and projection work on rows when they are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field

from fusemega import __version__
from fusemega.align.corpus import Pair, map_pairs, sample_pairs
from fusemega.align.dtw import Rules, Strings, decoded_strings, form_strings
from fusemega.align.reference_rows import Aligner, reference_row
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.lock import locked
from fusemega.runtime.console import say
from fusemega.store import Manifest, Row, Store, StoreWriter, check_store
from fusemega.store.missing import why_missing
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.tokenizer import Tokenizer

PUBLISHED = ("exact", "mined", "ms", "ms_reference")  # kinds of maps


class Side(Section):
    """One of the two models."""

    tokenizer: str = Field(description="folder or hub id of the model, or of its tokenizer alone")
    store: str = Field(description="folder of its sample store, written by `fusemega teach` from the same data")


class TeacherSide(Side):
    """The teacher: its tokenizer and its store."""


class TargetSide(Side):
    """The model to be trained: its tokenizer, and the store of its own initial distribution."""


class ProjectRun(Section):
    """Run file of `fusemega project`."""

    data: DataConfig
    source: TeacherSide = Field(description="the teacher")
    target: TargetSide = Field(
        description="the model to train; its own row is used where nothing of the source's row can be mapped"
    )
    map: str = Field(description="vocabulary map from source to target, written by `fusemega align`")
    store: str = Field(description="folder of the new store; an interrupted run resumes where it stopped")
    rules: Rules = Field(
        "fusechat",
        description="fusechat, or fusellm: compare raw vocabulary tokens, break cost ties by FuseLLM's order, and"
        " use the current token as label instead of the next",
    )
    pad: bool = Field(True, description="pad both sequences to data.seq_length before the alignment, as FuseChat does")
    on_missing: Literal["error", "skip"] = Field(
        "error", description="what to do with a sample that lacks a row in a store"
    )
    workers: int | None = Field(
        None, ge=1, description="number of processes; default: one for each core, at most as many as there is work for"
    )


def project(run: ProjectRun) -> dict[str, int]:
    """Projects the source's rows. Returns, for the samples projected now, how many positions learn from the source's
    `row`, their `label`, or the target's `own` row.

    Raises:
        UserError: a store or map of other tokenizers, templates, data or windows; a store begun otherwise; a sample
            without a row (unless `on_missing: skip`).
    """
    source, target = _Model(run.source, run.data.seq_length), _Model(run.target, run.data.seq_length)
    vocabulary_map = VocabularyMap.load(run.map)
    if vocabulary_map.kind not in PUBLISHED:
        raise UserError(
            f"{run.map}: of kind {vocabulary_map.kind}, which was never published; allowed: {', '.join(PUBLISHED)}"
        )
    tokenizers = [model.tokenizer for model in (source, target)]
    whose = [(tokenizer.content_hash, tokenizer.source) for tokenizer in tokenizers]
    vocabulary_map.check(run.map, whose[0], whose[1], *(tokenizer.num_ids for tokenizer in tokenizers))
    theirs, ours = source.store.manifest, target.store.manifest
    if theirs.temperature != ours.temperature:
        raise UserError(
            f"{source.store.path}: stored at temperature {theirs.temperature}, and {target.store.path} at "
            f"{ours.temperature}; the new store mixes rows of both, so both must use the same temperature"
        )
    manifest = Manifest(
        weights=theirs.weights,
        tokenizer=target.tokenizer.content_hash,
        template=target.tokenizer.template_hash,
        mask_policy=MASK_POLICY,
        truncation=run.data.seq_length,
        temperature=theirs.temperature,
        top_k=max(theirs.entries, ours.entries),
        vocab_size=max(ours.vocab_size, target.tokenizer.num_ids),
        projected={
            "alignment": run.rules + (", padded" if run.pad else ""),
            "map": f"{vocabulary_map.kind} {vocabulary_map.content_hash}",
            "source_tokenizer": source.tokenizer.content_hash,
            "target_weights": ours.weights,
        },
        versions={"fusemega": __version__, "numba": version("numba"), "rapidfuzz": version("rapidfuzz")},
    )
    with locked(run.store):
        check_store(Path(run.store), manifest)
        return _project_all(run, source, target, vocabulary_map, manifest)


def _project_all(
    run: ProjectRun, source: _Model, target: _Model, vocabulary_map: VocabularyMap, manifest: Manifest
) -> dict[str, int]:
    folder = Path(run.store)
    for model in (source, target):
        model.data = prepare(run.data, model.tokenizer, cache_folder() / "data", progress=True)
    pairs = _with_rows(run, source, target)
    pad_to = run.data.seq_length if run.pad else 0
    words = *source.words(run.rules), *target.words(run.rules)
    aligner = Aligner.of(*words, vocabulary_map, pad_to, source.store.manifest.vocab_size)
    counts: Counter[str] = Counter()
    with StoreWriter(folder, manifest) as writer:
        distinct = {target.data.keys[t]: (s, t) for s, t in reversed(pairs)}  # the first of several equal samples
        missing = [pair for key, pair in reversed(distinct.items()) if key not in writer]
        if len(missing) < len(distinct):
            say(f"{len(distinct) - len(missing)} samples are in {folder} already")
        context = partial(_Work, source.data, target.data, source.store.path, target.store.path, aligner)
        for rows, kinds in map_pairs(_project, context, missing, "projected", run.workers):
            counts += kinds
            for key, row in rows:
                writer.add(key, row)
    return dict(counts)


class _Model:
    """One side's tokenizer, store and samples."""

    data: TokenizedDataset

    def __init__(self, side: Side, seq_length: int) -> None:
        self.tokenizer, self.store = Tokenizer.load(side.tokenizer), Store.open(side.store)
        hashes = {"tokenizer": self.tokenizer.content_hash, "template": self.tokenizer.template_hash}
        self.store.check(hashes | {"mask_policy": MASK_POLICY, "truncation": seq_length, "rows": "top_k"})

    def words(self, rules: Rules) -> tuple[Vocabulary, Strings]:
        """The vocabulary, and the strings by which the rules compare its tokens."""
        vocabulary = Vocabulary.of(self.tokenizer)
        if rules == "fusellm":
            return vocabulary, form_strings(self.tokenizer, vocabulary)
        return vocabulary, decoded_strings(self.tokenizer, vocabulary.marker)


def _with_rows(run: ProjectRun, source: _Model, target: _Model) -> list[Pair]:
    """The samples that both tokenizers and both stores have.

    Raises:
        UserError: a sample that one of them lacks, unless it may be skipped; no sample is left.
    """
    pairs, keys = sample_pairs(source.data, target.data), target.data.keys
    reasons = dict.fromkeys(range(len(keys)), "the source's tokenizer cuts its document into other windows")
    whys: dict[int, Callable[[], str]] = {}
    for _, t in pairs:
        lacking = [model.store for model in (source, target) if keys[t] not in model.store]
        if lacking:
            reasons[t] = f"no row in the store {lacking[0].path}"
            whys[t] = partial(why_missing, lacking[0], target.data, t)
        else:
            del reasons[t]
    if reasons and (run.on_missing == "error" or len(reasons) == len(keys)):
        first = min(reasons)
        why = f": {whys[first]()}" if first in whys else ""
        allowed = " (allowed with on_missing: skip)" if run.on_missing == "error" else ""
        raise UserError(
            f"{target.data[first].source}: {reasons[first]}{why}; of {len(keys)} samples {len(reasons)} cannot be "
            f"projected{allowed}"
        )
    if reasons:
        say(f"skipping {len(reasons)} of {len(keys)} samples without a row in both stores")
    return [(s, t) for s, t in pairs if t not in reasons]


class _Work:
    """The data sets and stores that a process keeps open."""

    def __init__(
        self, source_data: TokenizedDataset, target_data: TokenizedDataset, source: Path, target: Path, aligner: Aligner
    ) -> None:
        self.source_data, self.target_data = source_data, target_data
        self.source, self.target, self.aligner = Store.open(source), Store.open(target), aligner


def _project(work: _Work, pairs: Sequence[Pair]) -> tuple[list[tuple[bytes, Row]], Counter[str]]:
    rows: list[tuple[bytes, Row]] = []
    counts: Counter[str] = Counter()
    for s, t in pairs:
        source, target = work.source_data[s], work.target_data[t]
        found = []
        for sample, store in ((source, work.source), (target, work.target)):
            row = store.get(sample.key)
            assert row is not None  # looked up before any work began
            if row.ids_hash != sample.ids_hash:
                raise UserError(f"{sample.source}: the row in the store {store.path} has other token ids")
            found.append(row)
        projected, kinds = reference_row(work.aligner, source, target, *found)
        rows.append((target.key, projected))
        counts += kinds
    return rows, counts
