"""The published cross-tokenizer objectives against plain loops, each setting, and what they refuse.

Tensor-parallel ranks are in tests/distributed/test_vocab.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusemega.align.student_projection import student_projection
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.fusion.teacher_rows import TeacherRows
from fusemega.losses.project_student import ProjectStudent
from fusemega.losses.registry import build_objective, parse_objective
from fusemega.passes.answers import HiddenStates
from fusemega.text.sample import BEGINS, OF_TEXT
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.run_file import TrainRun
from tests.logits.loops import make_head
from tests.losses.published import (
    CHUNK_SETTINGS,
    MERGE_SETTINGS,
    NO_LABELS,
    OURS,
    PROJECT_SETTINGS,
    THEIRS,
    VOCAB,
    built,
    chunk_case,
    merge_case,
    packed,
    project_case,
    row_of,
    sample_of,
    store_of,
)


@pytest.mark.parametrize("settings", CHUNK_SETTINGS, ids=str)
def test_chunk_equals_the_formula(settings: dict[str, Any], tmp_path: Path) -> None:
    case = chunk_case(tmp_path, **settings)
    assert case.objective.counts(case.batch) == {"lm": 12, "chunk": 6}
    assert case.check() <= 1e-10


def test_chunk_settings_all_act(tmp_path: Path) -> None:
    hidden, weight = make_head(tokens=12)
    losses = []
    for number, settings in enumerate(CHUNK_SETTINGS):
        case = chunk_case(tmp_path / str(number), **settings)
        head = {"group": None, "vocab_size": VOCAB}
        loss, sums = case.objective.loss(HiddenStates(hidden, weight, head), case.batch, case.denominators)
        losses.append(float(loss))
        assert set(sums) == {"lm", "chunk"} and not sums["chunk"].requires_grad
    assert len({round(loss, 6) for loss in losses}) == len(CHUNK_SETTINGS)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "total_variation"])
def test_chunk_is_nothing_between_a_model_and_itself(divergence: str, tmp_path: Path) -> None:
    """With one tokenizer every token is a chunk, and where both give the same there is nothing to learn."""
    sample = sample_of(0, [0, 3, 4, 9])
    hidden, weight = make_head()
    labels = torch.from_numpy(sample.ids[1:].astype(np.int64))
    logp_P = (hidden @ weight[:VOCAB].t()).log_softmax(1).gather(1, labels[:, None])[:, 0].detach().numpy()
    store = store_of(tmp_path, {0: row_of(0, [0, 3, 4, 9], logp_P)})
    settings = {"divergence": divergence, "lambda": 0.0, "binarization_temperature": 2.0}
    objective = built({"name": "chunk", "store": str(store.path), **settings})
    batch = packed(objective, [sample])
    assert objective.counts(batch) == {"lm": 4, "chunk": 4}
    # What half precision lost is put back.
    batch.position_fields["chunk_logp"] = torch.from_numpy(logp_P)  # type: ignore[index]
    output = HiddenStates(hidden, weight, {"group": None, "vocab_size": VOCAB})
    loss, sums = objective.loss(output, batch, {"lm": 4, "chunk": 4})
    assert float(sums["chunk"]) == pytest.approx(0.0, abs=1e-12)
    if divergence != "total_variation":  # whose gradient has a step there
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert float(gradient.abs().max()) < 1e-12


def test_chunk_of_certain_and_of_impossible_text_is_finite(tmp_path: Path) -> None:
    """In fp32, with log-probs of 0 and far beyond the range of exp."""
    for tau in (1.0, 100.0):
        for theirs in (0.0, -6e4):
            ends = [0, 3, 4, 9]
            store = store_of(tmp_path / f"{tau}{theirs}", {0: row_of(0, ends, np.full(4, theirs))})
            section = {"name": "chunk", "store": str(store.path), "binarization_temperature": tau}
            objective = built(section)
            batch = packed(objective, [sample_of(0, ends)])
            for scale in (0.0, 1e3):
                hidden = torch.full((4, 2), scale, requires_grad=True)
                weight = torch.zeros(VOCAB, 2)
                weight[int(batch.labels[0])] = 1.0  # one label is certain, the others impossible
                output = HiddenStates(hidden, weight, {"group": None, "vocab_size": VOCAB})
                loss, _ = objective.loss(output, batch, {"lm": 4, "chunk": 4})
                (gradient,) = torch.autograd.grad(loss, hidden)
                assert loss.isfinite() and gradient.isfinite().all()


def test_stores_without_labels_are_refused_by_name(tmp_path: Path) -> None:
    old = store_of(tmp_path / "old", {0: row_of(0, THEIRS[0], **NO_LABELS)}, format=2)
    section = {"name": "chunk", "store": str(old.path)}
    remedy = "run `fusemega teach` with the teacher and its own tokenizer into a new folder"
    with pytest.raises(UserError, match=rf"objective.store: objective.name chunk needs .*old \(format 2\).*{remedy}"):
        built(section)
    projected = store_of(tmp_path / "projected", {0: row_of(0, THEIRS[0], **NO_LABELS)}, projected={"source": "s"})
    with pytest.raises(UserError, match=rf"objective.store: .*`fusemega project`, which knows none; {remedy}"):
        built({**section, "store": str(projected.path)})
    mixed = store_of(tmp_path / "mixed", {0: row_of(0, THEIRS[0], **NO_LABELS)})
    with pytest.raises(UserError, match=rf"chat.jsonl:1: objective.name chunk needs .*{remedy}"):
        built({**section, "store": str(mixed.path)}).position_fields(sample_of(0))


def test_a_sample_without_a_row_and_one_that_shares_no_position(tmp_path: Path) -> None:
    store = store_of(tmp_path, {0: row_of(0, [90, 91])})
    section = {"name": "chunk", "store": str(store.path)}
    with pytest.raises(UserError, match=r"chat.jsonl:2: no row in the store .*on_missing: skip"):
        built(section).position_fields(sample_of(1))
    for fields in (
        built({**section, "on_missing": "skip"}).position_fields(sample_of(1)),
        built(section).position_fields(sample_of(0)),
    ):
        assert not fields["chunk_starts"].any() and not fields["in_chunk"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "jsd"}, "objective.divergence: found 'jsd'.*allowed: kl, reverse_kl, total_variation"),
        ({"binarization_temperature": 0}, "objective.binarization_temperature: Input should be greater than 0"),
        ({"lambda": 2}, "objective.lambda: Input should be less than or equal to 1"),
        ({"temperature": 2.0}, "objective.temperature: unknown key"),
        ({"map": "m"}, "objective.map: unknown key"),
    ],
)
def test_wrong_chunk_sections(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built({"name": "chunk", "store": "s", **changes})


def test_context_parallelism_is_refused_before_anything_is_opened() -> None:
    run = {
        "output_dir": "out",
        "model": {"load": "nowhere"},
        "parallel": {"context_parallel_size": 2},
        "data": {"path": "nowhere", "seq_length": 64},
        "objective": {"name": "chunk", "store": "nowhere"},
        "optimizer": {"lr": 1.0},
        "training": {"train_iters": 1, "global_batch_size": 2},
    }
    with pytest.raises(UserError, match="objective.name chunk sums over .*context_parallel_size 2 .*set it to 1"):
        validate(TrainRun, run, "train.yaml")
    validate(TrainRun, run | {"parallel": {"tensor_model_parallel_size": 2}}, "train.yaml")


def test_chunks_are_those_of_the_bytes(tmp_path: Path) -> None:
    """The last of several positions at one byte begins a chunk; a token before the first shared byte is in none."""
    case = chunk_case(tmp_path)
    starts = case.batch.position_fields["chunk_starts"].tolist()
    assert starts == [n in (0, 2, 4, 5) for n in range(len(OURS[0]))] + [False] * 2 + [False, True, True]
    assert case.batch.position_fields["in_chunk"].tolist() == [True] * 7 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("settings", PROJECT_SETTINGS, ids=str)
def test_project_student_equals_the_formula(settings: dict[str, Any], tmp_path: Path) -> None:
    case = project_case(tmp_path, **settings)
    aligned = 6 if settings.get("unaligned") == "nothing" else 10
    assert case.objective.counts(case.batch) == {"lm": 12, "distill": aligned}
    assert case.check() <= 3e-7  # the fields are fp32


def test_project_student_settings_all_act(tmp_path: Path) -> None:
    hidden, weight = make_head(tokens=12)
    losses = []
    for number, settings in enumerate(PROJECT_SETTINGS):
        case = project_case(tmp_path / str(number), **settings)
        output = HiddenStates(hidden, weight, {"group": None, "vocab_size": VOCAB})
        losses.append(float(case.objective.loss(output, case.batch, case.denominators)[0]))
    assert len({round(loss, 6) for loss in losses}) == len(PROJECT_SETTINGS)


@pytest.mark.parametrize("tail", ["residual", "renormalise"])
def test_project_student_with_one_tokenizer_is_distill(tail: str, tmp_path: Path) -> None:
    """For `renormalise` up to what `distill` does not scale: log of the student's mass on the listed ids."""
    sample = sample_of(0, [0, 3, 4, 9])
    store = store_of(
        tmp_path, {0: row_of(0, [0, 3, 4, 9], ids_hash=sample.ids_hash)}, tokenizer="own", vocab_size=VOCAB
    )
    section = {"store": str(store.path), "lambda": 0.2, "tail": tail}
    parsed = parse_objective({"name": "project_student", "tokenizer": "t", **section})
    assert isinstance(parsed, ProjectStudent.Settings)
    same: Any = SimpleNamespace(content_hash="own")
    identity = student_projection(same, same, lambda content: [], VOCAB, VOCAB)
    objective = ProjectStudent(parsed, TeacherRows(parsed, "objective"), identity, None)
    hidden, weight = make_head()
    found = []
    for each in (objective, built({"name": "distill", **section})):
        batch = packed(each, [sample])
        output = HiddenStates(hidden, weight, {"group": None, "vocab_size": VOCAB})
        loss, _ = each.loss(output, batch, {"lm": 4, "distill": 4})
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight), retain_graph=True)))
    if tail == "residual":
        for got, wanted in zip(*found, strict=True):
            assert torch.equal(got, wanted)
    else:
        logq = (hidden @ weight[:VOCAB].t()).log_softmax(1)
        mass = logq.gather(1, batch.position_fields["teacher_ids"]).logsumexp(1)
        torch.testing.assert_close(found[0][0], found[1][0] + 0.8 / 4 * mass.sum(), rtol=0, atol=1e-7)


def test_a_content_whose_first_token_has_a_space_in_one_tokenizer_only(tmp_path: Path) -> None:
    """There the projected tokens do not stand for the teacher's text, so the position learns its label."""
    places = np.zeros(8, dtype=np.uint8)
    places[1] = BEGINS  # position 1 ends at byte 5, where the teacher ends no token; position 2 at 6
    places[2] = BEGINS
    sample = replace(sample_of(0), places=places)
    for same_start, taught in ((True, [0, 2, 4, 5]), (False, [0, 4, 5])):
        objective = project_case(tmp_path / str(same_start)).objective
        objective.projection = replace(objective.projection, same_start=same_start)  # type: ignore[attr-defined]
        assert np.flatnonzero(objective.position_fields(sample)["teacher_row"]).tolist() == taught


def test_project_student_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, {0: row_of(0, THEIRS[0])})
    section = {"name": "project_student", "store": str(store.path), "tokenizer": "elsewhere"}
    with pytest.raises(UserError, match="objective.tokenizer: required"):
        built({"name": "project_student", "store": "s"})
    with pytest.raises(UserError, match="objective.max_pieces: Input should be greater than or equal to 1"):
        built({**section, "max_pieces": 0})
    with pytest.raises(UserError, match="objective.map: unknown key"):
        built({**section, "map": "m"})
    loaded = SimpleNamespace(content_hash="third")
    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, source: loaded))
    with pytest.raises(UserError, match="objective.tokenizer: elsewhere is not the tokenizer of the store .*third"):
        built(section)
    with pytest.raises(UserError, match=r"objective.temperature: found 2.0, .* was stored at 1.0"):
        project_case(tmp_path / "other", temperature=2.0)


@pytest.mark.parametrize("settings", MERGE_SETTINGS, ids=str)
def test_merge_equals_the_formula(settings: dict[str, Any], tmp_path: Path) -> None:
    case = merge_case(tmp_path, **settings)
    assert case.objective.counts(case.batch) == {"lm": 12, "merge": 6}
    assert case.check() <= 3e-7  # the fields are fp32


def test_merge_settings_all_act(tmp_path: Path) -> None:
    hidden, weight = make_head(tokens=12)
    losses = []
    for number, settings in enumerate(MERGE_SETTINGS):
        case = merge_case(tmp_path / str(number), **settings)
        output = HiddenStates(hidden, weight, {"group": None, "vocab_size": VOCAB})
        losses.append(float(case.objective.loss(output, case.batch, case.denominators)[0]))
    assert len({round(loss, 6) for loss in losses}) == len(MERGE_SETTINGS)


@pytest.mark.parametrize("strategy", ["observed", "bayesian"])
def test_merge_with_one_tokenizer_compares_the_listed_ids(strategy: str, tmp_path: Path) -> None:
    """Every token is a group and every id is matched: beta = 0 is KL over the listed ids, without a residual."""
    sample = sample_of(0, [0, 3, 4, 9])
    row = row_of(0, [0, 3, 4, 9])
    store = store_of(tmp_path, {0: row}, tokenizer="own", vocab_size=VOCAB)
    section = {"name": "merge", "store": str(store.path), "lambda": 0.0, "beta": 0.0, "token_merge_strategy": strategy}
    objective = built(section)
    hidden, weight = make_head()
    output = HiddenStates(hidden, weight, {"group": None, "vocab_size": VOCAB})
    loss, _ = objective.loss(output, packed(objective, [sample]), {"lm": 4, "merge": 4})
    read = store.get(sample.key)
    assert read is not None
    logq = (hidden @ weight[:VOCAB].t()).log_softmax(1).gather(1, torch.from_numpy(row.ids_PK.astype(np.int64)))
    logp = torch.from_numpy(read.logp_PK).double()
    torch.testing.assert_close(loss, (logp.exp() * (logp - logq)).sum() / 4, rtol=0, atol=1e-6)


def test_merge_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    def section(name: str, **changes: Any) -> dict[str, Any]:
        return {"name": "merge", "store": str(store_of(tmp_path / name, {0: row_of(0, THEIRS[0])}, **changes).path)}

    with pytest.raises(UserError, match="matched_weight and unmatched_weight: give both, or none"):
        built({"name": "merge", "store": "s", "matched_weight": 1.0})
    with pytest.raises(UserError, match="objective.beta: Input should be less than or equal to 1"):
        built({"name": "merge", "store": "s", "beta": 1.5})
    with pytest.raises(UserError, match="the store's tokenizer is 'theirs', expected 'own'"):
        built(section("tokenizer"))
    with pytest.raises(UserError, match="has rows: top_k at temperature 2.0; merge needs rows: top_k at 1.0"):
        built(section("temperature", temperature=2.0, tokenizer="own"))
    mined = VocabularyMap("mined", "theirs", "own", *[np.zeros(50, dtype=np.int32)] * 3, 50, VOCAB, False, False)
    mined.save(tmp_path / "mined.map")
    with pytest.raises(
        UserError, match="mined.map: the map's kind is mined; merge needs `fusemega align --kind exact`"
    ):
        built({**section("map"), "map": str(tmp_path / "mined.map")})


@pytest.mark.parametrize("name", ["chunk", "merge", "project_student"])
def test_the_end_of_a_plain_text_is_not_compared(name: str, tmp_path: Path) -> None:
    ends = [0, 3, 4, 9]
    sample = replace(sample_of(0, ends), places=np.full(5, OF_TEXT, dtype=np.uint8))
    eos_id = int(sample.ids[-1])
    store = store_of(tmp_path, {0: row_of(0, ends)}, tokenizer="own")
    tokenizer: Any = SimpleNamespace(content_hash="own", template_hash=None, eos_id=eos_id)

    def fields(text_end: str) -> dict[str, np.ndarray]:
        section = {"name": name, "store": str(store.path), "text_end": text_end}
        if name == "project_student":
            parsed = parse_objective(section | {"tokenizer": "theirs"})
            assert isinstance(parsed, ProjectStudent.Settings)
            same: Any = SimpleNamespace(content_hash="own")
            identity = student_projection(same, same, lambda content: [], VOCAB, VOCAB)
            return ProjectStudent(parsed, TeacherRows(parsed, "objective"), identity, eos_id).position_fields(sample)
        return build_objective(parse_objective(section), tokenizer, VOCAB).position_fields(sample)

    taught = {"chunk": "chunk_starts", "merge": "merge_base", "project_student": "teacher_row"}[name]
    by_label, by_row = fields("label"), fields("row")
    assert by_row[taught].tolist() == [True] * 4 and by_label[taught].tolist() == [True] * 3 + [False]
    if name == "project_student":
        assert by_label["teacher_ids"][3].tolist() == [eos_id, -1, -1] and by_label["teacher_logp"][3, 0] == 0
    else:
        assert by_label["in_chunk"].tolist() == [True] * 3 + [False]
    for field, values in by_row.items():
        np.testing.assert_array_equal(by_label[field][:3], values[:3])
