"""Folders in and out: what is refused, vocabularies, tied heads, types, mergekit's YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusemega.errors import UserError
from fusemega.merge.merge import Options
from fusemega.merge.run_file import from_mergekit
from fusemega.merge.settings import resolve
from tests.merge.conftest import (
    CONFIG,
    base_tensors,
    entries,
    read_all,
    run_merge,
    tuned,
    write_folder,
    write_tokenizer,
)

Family = Callable[..., tuple[Path, list[Path]]]


def _refused(tmp_path: Path, **run: Any) -> str:
    """The message; nothing may be left of the merge."""
    with pytest.raises(UserError) as error:
        run_merge(tmp_path / "out", **run)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))
    assert "\n" not in str(error.value)
    return str(error.value)


BAD_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"merge_method": "tie"}, "did you mean 'ties'"),
    "no base": ({"merge_method": "sce", "base_model": None}, "base_model: sce needs one"),
    "unknown setting": ({"merge_method": "sce", "parameters": {"select_top": 0.1}}, "did you mean 'select_topk'"),
    "setting of another method": ({"merge_method": "varm", "parameters": {"weight": 1}}, "not a setting of varm"),
    "wrong value": ({"merge_method": "sce", "parameters": {"select_topk": 2}}, "select_topk"),
    "wrong type": ({"merge_method": "sce", "parameters": {"select_topk": "much"}}, "select_topk"),
    "no weight": ({"merge_method": "ties"}, "weight: required"),
    "weights that do not sum": (
        {"merge_method": "linear", "parameters": {"normalize": False, "weight": 0.6}},
        "the weights sum to 1.2",
    ),
    "weights that cancel": ({"merge_method": "task_arithmetic", "parameters": {"weight": 0.0, "normalize": True}}, "0"),
    "nan weight": ({"merge_method": "linear", "parameters": {"weight": float("nan")}}, "finite"),
    "two models for slerp": ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "exactly one"),
    "filter that fits nothing": (
        {"merge_method": "sce", "parameters": {"select_topk": [{"filter": "experts", "value": 0.1}, {"value": 1.0}]}},
        "'experts' fits no tensor",
    ),
    "density outside the window": (
        {"merge_method": "della", "parameters": {"weight": 1.0, "density": 0.9, "epsilon": 0.2}},
        "epsilon 0.2 must stay",
    ),
    "unknown key": ({"merge_method": "sce", "modles": []}, "did you mean 'models'"),
    "unknown dtype": ({"merge_method": "sce", "dtype": "float8"}, "dtype"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs_are_refused(case: str, family: Family, tmp_path: Path) -> None:
    changes, expected = BAD_RUNS[case]
    base, models = family(rms=(1e-3, 1e-3))
    run = {"base_model": str(base), "models": entries(models)} | changes
    assert expected in _refused(tmp_path, **run)


def _without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


Q = "model.layers.1.self_attn.q_proj.weight"


def _poisoned(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bad = tensors[Q].clone()
        bad.view(-1)[777] = value
        return tensors | {Q: bad}

    return poison


BAD_MODELS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], dict[str, Any], str]] = {
    "missing tensor": (lambda t: _without(t, Q), {}, f"tensor {Q} is missing"),
    "extra tensor": (
        lambda t: t | {"model.extra.weight": t[Q]},
        {},
        "model.extra.weight is not part of this architecture",
    ),
    "other shape": (lambda t: t | {Q: t[Q][:-1]}, {}, f"tensor {Q} has shape"),
    "other architecture": (lambda t: t, {"num_attention_heads": 8, "num_key_value_heads": 4}, "one architecture"),
    "other model type": (lambda t: t, {"model_type": "gpt2"}, "gpt2"),
    "other rotary base": (lambda t: t, {"rope_theta": 5e5}, "rotary positions differ"),
    "other dtype": (lambda t: {k: v.bfloat16() for k, v in t.items()}, {}, "bfloat16, and float32"),
    "NaN": (_poisoned(float("nan")), {}, f"tensor {Q} holds nan at element 777"),
    "infinity": (_poisoned(float("-inf")), {}, f"tensor {Q} holds -inf at element 777"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused(case: str, tmp_path: Path) -> None:
    change, config, expected = BAD_MODELS[case]
    base = base_tensors()
    folders = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "a", tuned(base, 0, 1e-3))]
    bad = write_folder(tmp_path / "bad", change(tuned(base, 1, 1e-3)), **config)
    message = _refused(tmp_path, merge_method="sce", base_model=str(folders[0]), models=entries([folders[1], bad]))
    assert expected in message and str(bad) in message or case == "other model type"


def test_an_output_that_is_not_empty_is_refused(family: Family, tmp_path: Path) -> None:
    base, models = family()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        run_merge(tmp_path / "out", merge_method="sce", base_model=str(base), models=entries(models))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_other_dtypes_merge_once_the_output_is_chosen(tmp_path: Path) -> None:
    base = base_tensors()
    narrow = {name: value.bfloat16() for name, value in tuned(base, 1, 1e-2).items()}
    folders = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "a", narrow)]
    out = run_merge(
        tmp_path / "out",
        merge_method="task_arithmetic",
        base_model=str(folders[0]),
        models=entries(folders[1:], weight=[0.5]),
        dtype="float16",
    )
    for name, value in read_all(out).items():
        assert torch.equal(value, (base[name] + 0.5 * (narrow[name].float() - base[name])).half())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_values_too_large_for_the_output_are_refused(tmp_path: Path) -> None:
    base = base_tensors()
    far = {name: value * 3e5 for name, value in base.items()}
    folders = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "a", far)]
    run = {"merge_method": "linear", "models": entries(folders), "dtype": "float16"}
    assert "too large for" in _refused(tmp_path, **run)


def test_settings_by_pattern_and_layer() -> None:
    assert resolve(0.3, "x", 0.5) == 0.3
    assert resolve([0, 1], "x", 0.25) == 0.25
    assert [resolve([0, 0.5, 0.3, 0.7, 1], "x", i / 31) for i in (0, 31)] == [0, 1]
    assert abs(resolve([0, 0.5, 0.3, 0.7, 1], "x", 10 / 31) - (0.5 - 0.2 * (40 / 31 - 1))) < 1e-12
    two = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "model.layers.[0-1].*", "value": 0.9}]
    by_filter = [*two, {"value": 2}]
    assert resolve(by_filter, "model.layers.1.self_attn.q_proj.weight", 0.5) == 0.5
    assert resolve(by_filter, "model.layers.1.mlp.up_proj.weight", 0.5) == 0.9
    assert resolve(by_filter, "model.layers.2.mlp.up_proj.weight", 0.5) == 2
    assert resolve(by_filter[:1], "lm_head.weight", 0) is None
    for bad in ([], [True], [{"filter": "x"}], ["a", "b"]):
        with pytest.raises(ValueError):
            resolve(bad, "x", 0)


def test_fusechats_slerp_file_is_read_as_it_is(family: Family, tmp_path: Path) -> None:
    base, models = family(rms=(2e-3,))
    text = f"""
slices:
  - sources:
      - model: {base}
        layer_range: [0, 3]
      - model: {models[0]}
        layer_range: [0, 3]
merge_method: slerp
base_model: {base}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
"""
    out = run_merge(tmp_path / "out", **yaml.safe_load(text))
    before, other = read_all(base), read_all(models[0])
    wanted = {"self_attn": [0, 0.3, 1], "mlp": [1, 0.7, 0]}
    for name, value in read_all(out).items():
        kind = next((kind for kind in wanted if kind in name), None)
        t = wanted[kind][int(name.split(".")[2])] if kind else 0.5
        assert torch.allclose(value, (1 - t) * before[name] + t * other[name], atol=1e-6), name
    part = yaml.safe_load(text.replace("[0, 3]", "[0, 2]"))
    assert "layer_range is [0, 2]" in _refused(tmp_path / "b", **part)


def test_mergekits_other_spellings() -> None:
    run = {
        "merge_method": "sce",
        "base_model": "b",
        "models": [{"model": "a", "parameters": {"int8_mask": True, "weight": 1}}, {"model": "c", "parameters": None}],
        "tokenizer_source": "union",
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    data, notes = from_mergekit(run, "f.yml")
    assert data["vocabulary"] == "union" and data["dtype"] == "bfloat16"
    assert data["models"] == [{"model": "a", "parameters": {"weight": 1}}, {"model": "c"}]
    assert any("sce_mergekit" in note for note in notes) and any("int8_mask" in note for note in notes)
    for bad in ({"modules": {}}, {"tokenizer_source": "other/model"}, {"slices": [{}, {}]}):
        with pytest.raises(UserError, match="f.yml"):
            from_mergekit({"merge_method": "sce"} | bad, "f.yml")


def test_the_base_among_the_models_is_not_merged_into_itself(family: Family, tmp_path: Path) -> None:
    base, models = family()
    listed = [{"model": str(base)}, *entries(models)]
    outs = [
        run_merge(tmp_path / name, merge_method="sce", base_model=str(base), models=given)
        for name, given in (("a", listed), ("b", entries(models)))
    ]
    first, second = (read_all(out) for out in outs)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- vocabularies -------------------------------------------------------------------------------------------------


@pytest.fixture
def unequal(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base of 301 rows and 300 tokens, and a variant of 304 rows with four tokens more, the last one a special."""
    base = base_tensors()
    tokens = [f"t{i}" for i in range(300)]
    longer = tuned(base_tensors(vocab_size=304), 1, 0.0) | {
        k: v for k, v in tuned(base, 1, 1e-2).items() if v.shape[0] != 301
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name][:301] = base[name] + 0.01
    folders = write_folder(tmp_path / "base", base), write_folder(tmp_path / "long", longer, vocab_size=304)
    write_tokenizer(folders[0], tokens)
    write_tokenizer(folders[1], [*tokens, "extra0", "extra1", "extra2"], ["<|im_end|>"])
    return *folders, base, longer


def _unequal_run(base: Path, longer: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": entries([longer], weight=[0.5]),
    } | more


def test_vocabularies_are_never_matched_silently(unequal: Any, tmp_path: Path) -> None:
    base, longer, *_ = unequal
    assert "fewer than 304" in _refused(tmp_path, **_unequal_run(longer, base, vocabulary="crop"))
    message = _refused(tmp_path, **_unequal_run(base, longer))
    assert "301" in message and "304" in message and "crop" in message and "union" in message
    write_tokenizer(longer, ["other", *(f"t{i}" for i in range(1, 300))])
    assert "id 0 is 't0'" in _refused(tmp_path, **_unequal_run(base, longer, vocabulary="crop"))


@pytest.mark.parametrize("mode", ["crop", "pad", "union"])
@pytest.mark.parametrize("block", [1, None])
def test_vocabulary_modes(mode: str, block: int | None, unequal: Any, tmp_path: Path) -> None:
    base, longer, before, other = unequal
    out = run_merge(tmp_path / "out", Options(block_elements=block), **_unequal_run(base, longer, vocabulary=mode))
    merged = read_all(out)
    config = json.loads((out / "config.json").read_text())
    rows = {"crop": 301, "pad": 304, "union": 304}[mode]
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    assert config["vocab_size"] == rows
    assert len(tokenizer["added_tokens"]) == {"crop": 0, "pad": 1, "union": 4}[mode]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        value, ours, theirs = merged[name], before[name], other[name]
        assert value.shape == (rows, 96)
        assert torch.allclose(value[:300], ours[:300] + 0.5 * (theirs[:300] - ours[:300]), atol=1e-6)
        if mode == "crop":
            assert torch.allclose(value[300], ours[300] + 0.5 * (theirs[300] - ours[300]), atol=1e-6)
        else:  # rows that only the longer model has are its own; by string, the base's padding row gives way to extra0
            assert torch.allclose(value[301:], theirs[301:], atol=1e-6)
    if mode == "union":
        assert [token["id"] for token in tokenizer["added_tokens"]] == [300, 301, 302, 303]
        assert [token["content"] for token in tokenizer["added_tokens"]][-1] == "<|im_end|>"
        assert tokenizer["added_tokens"][-1]["special"] and not tokenizer["added_tokens"][0]["special"]


def test_union_goes_by_token_string(tmp_path: Path) -> None:
    base = base_tensors()
    shuffled = tuned(base, 1, 0.0)
    order = torch.randperm(301, generator=torch.Generator().manual_seed(1))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shuffled[name] = base[name][order]
    folders = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "a", shuffled)]
    write_tokenizer(folders[0], [f"t{i}" for i in range(301)])
    write_tokenizer(folders[1], [f"t{i}" for i in order.tolist()])
    run = _unequal_run(*folders)
    assert "choose vocabulary: union" in _refused(tmp_path, **run)
    merged = read_all(run_merge(tmp_path / "out", Options(block_elements=1), **run, vocabulary="union"))
    assert all(torch.allclose(merged[name], base[name], atol=1e-7) for name in base)


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True)])
def test_tied_and_untied_heads(tied: tuple[bool, bool], tmp_path: Path) -> None:
    tensors = [base_tensors(tie_word_embeddings=flag) for flag in tied]
    folders = [
        write_folder(tmp_path / str(j), t, tie_word_embeddings=flag)
        for j, (t, flag) in enumerate(zip(tensors, tied, strict=True))
    ]
    out = run_merge(tmp_path / "out", **_unequal_run(*folders))
    merged = read_all(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == all(tied)
    assert ("lm_head.weight" in merged) == (not all(tied))
    if not all(tied):
        heads = [t.get("lm_head.weight", t["model.embed_tokens.weight"]) for t in tensors]
        assert torch.allclose(merged["lm_head.weight"], (heads[0] + heads[1]) / 2, atol=1e-6)


def test_a_tied_models_copy_of_its_head_must_be_the_embedding(tmp_path: Path) -> None:
    base = base_tensors(tie_word_embeddings=True)
    head = base["model.embed_tokens.weight"].clone()
    good = write_folder(tmp_path / "good", base | {"lm_head.weight": head}, tie_word_embeddings=True)
    other = write_folder(tmp_path / "other", base | {"lm_head.weight": head + 1}, tie_word_embeddings=True)
    plain = write_folder(tmp_path / "plain", base, tie_word_embeddings=True)
    merged = read_all(run_merge(tmp_path / "fine", **_unequal_run(plain, good)))
    assert merged.keys() == base.keys()
    assert "lm_head.weight differs" in _refused(tmp_path, **_unequal_run(good, other))


def test_models_that_give_scores_are_merged_and_others_refused(tmp_path: Path) -> None:
    """A head is merged with its like, and so are layers: neither is merged with another kind."""
    score = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    tensors = [base_tensors(tie_word_embeddings=True) for _ in range(2)]
    for number, found in enumerate(tensors):
        found["score.weight"] = torch.full((1, found["model.norm.weight"].numel()), float(number))
    folders = [write_folder(tmp_path / str(j), t, **score) for j, t in enumerate(tensors)]
    out = run_merge(tmp_path / "scores", **_unequal_run(*folders))
    merged = read_all(out)
    assert merged.keys() == tensors[0].keys() and (merged["score.weight"] == 0.5).all()
    assert json.loads((out / "config.json").read_text())["architectures"] == score["architectures"]
    plain = write_folder(tmp_path / "plain", base_tensors())
    refused = _refused(tmp_path, **_unequal_run(plain, folders[0]))
    assert "LlamaForSequenceClassification; allowed here: LlamaForCausalLM" in refused
    kept = {name: t for name, t in base_tensors().items() if not re.search(r"layers\.0\.(mlp|post_attention)", name)}
    left_out = [{"ffn": {"no_op": True}}, *({} for _ in range(CONFIG["num_hidden_layers"] - 1))]
    short = write_folder(tmp_path / "short", kept, block_configs=left_out)
    assert "block_configs of config.json leaves out other blocks" in _refused(tmp_path, **_unequal_run(plain, short))
