"""LoRA adapters merged into their base, against the product in float64; settings that are not understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fusemega.errors import UserError
from fusemega.hf.adapter import merge_adapter
from fusemega.hf.folder import HFFolder
from fusemega.merge.merge import _with_adapter
from tests.merge.conftest import CONFIG, base_tensors, entries, read_all, run_merge, write_folder

# What peft 0.21 writes into adapter_config.json of an adapter made with its defaults.
WRITTEN: dict[str, Any] = {
    **{"alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "x/y"},
    **{"bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None},
    **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None},
    **{"layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}},
    **{"lora_bias": False, "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core"},
    **{"modules_to_save": None, "monteclora_config": None, "peft_version": "0.21.2", "qalora_group_size": 16},
    **{"revision": None, "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None},
    **{"use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None},
}
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
EMBEDDING, NORM = "model.embed_tokens", "model.norm.weight"


def _adapter(folder: Path, extra: dict[str, torch.Tensor] | None = None, **config: Any) -> dict[str, torch.Tensor]:
    """An adapter on three modules, with a norm that was trained whole; K has a rank and an alpha of its own."""
    generator = torch.Generator().manual_seed(3)
    hidden, rows = CONFIG["hidden_size"], CONFIG["vocab_size"]
    shapes = {
        f"{Q}.lora_A.weight": (4, hidden),
        f"{Q}.lora_B.weight": (hidden, 4),
        f"{K}.lora_A.weight": (2, hidden),
        f"{K}.lora_B.weight": (hidden // 2, 2),
        f"{EMBEDDING}.lora_embedding_A": (4, rows),
        f"{EMBEDDING}.lora_embedding_B": (hidden, 4),
        NORM: (hidden,),
    }
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()} | (extra or {})
    folder.mkdir()
    save_file({f"base_model.model.{n}": value for n, value in tensors.items()}, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    given |= {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"layers\.1\..*k_proj": 6}, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(WRITTEN | given | config))
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_added_to_its_base(rslora: bool, tmp_path: Path) -> None:
    before = base_tensors()
    base = write_folder(tmp_path / "base", before)
    lora = _adapter(tmp_path / "lora", use_rslora=rslora)
    assert merge_adapter(base, tmp_path / "lora", tmp_path / "out") == {
        "notes": [],
        "changed": 4,
        "tensors": len(before),
    }
    merged = read_all(tmp_path / "out")
    scale = {Q: 4.0 if rslora else 2.0, K: 6 / 2**0.5 if rslora else 3.0, EMBEDDING: 4.0 if rslora else 2.0}
    for module in (Q, K, EMBEDDING):
        infix, end = ("embedding_", "") if module == EMBEDDING else ("", ".weight")
        a, b = (lora[f"{module}.lora_{infix}{half}{end}"].double() for half in "AB")
        product = scale[module] * (b @ a)
        expected = before[f"{module}.weight"].double() + (product.T if module == EMBEDDING else product)
        assert (merged[f"{module}.weight"] - expected).abs().max() <= 1e-6, module
    assert torch.equal(merged[NORM], lora[NORM])
    rest = before.keys() - {f"{module}.weight" for module in (Q, K, EMBEDDING)} - {NORM}
    assert all(torch.equal(merged[name], before[name]) for name in rest)


def test_base_and_adapter_among_the_models_of_a_merge(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", base_tensors())
    other = write_folder(tmp_path / "other", base_tensors(seed=1))
    _adapter(tmp_path / "lora")
    merge_adapter(base, tmp_path / "lora", tmp_path / "whole")
    models = [Path(f"{base}+{tmp_path / 'lora'}"), other]
    run: dict[str, Any] = {"merge_method": "linear", "vocabulary": "position"}
    merged = read_all(run_merge(tmp_path / "out", models=entries(models, weight=[0.75, 0.25]), **run))
    expected = run_merge(tmp_path / "same", models=entries([tmp_path / "whole", other], weight=[0.75, 0.25]), **run)
    assert all(torch.equal(value, merged[name]) for name, value in read_all(expected).items())
    assert not list(tmp_path.glob(".*"))


def test_what_an_interrupted_merge_has_made_of_an_adapter_is_of_its_small_files_too(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", base_tensors())
    _adapter(tmp_path / "lora")
    paths = []
    for name, text in (("", ""), ("lora", "a"), ("base", "a"), ("lora", ""), ("lora", "b")):
        if name:
            template = tmp_path / name / "chat_template.jinja"
            template.write_text(text) if text else template.unlink()
        paths += [_with_adapter(base, tmp_path / "lora", tmp_path / "scratch") for _ in range(2)]
    assert paths[0::2] == paths[1::2] and len(set(paths)) == 5


BAD: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "DoRA": ({"use_dora": True}, {}, "use_dora = True is not supported"),
    "another kind": ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'; supported: LORA"),
    "a setting of tomorrow": ({"use_xora": "fast"}, {}, "use_xora = 'fast' is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights 'pissa' changes the base too"),
    "another rank": ({"r": 8}, {}, ", 4], and r is 8 in adapter_config.json"),
    "no alpha": ({"lora_alpha": None}, {}, "lora_alpha is None; expected a number"),
    "half a pair": ({}, {f"{Q}x.lora_A.weight": torch.zeros(4, 96)}, f"{Q}x has lora_A alone"),
    "unknown module": ({}, {"model.layers.9.mlp.weight": torch.zeros(2)}, "has no tensor model.layers.9.mlp.weight"),
    "more tokens": ({}, {"lm_head.weight": torch.zeros(302, 96)}, "lm_head.weight is [301, 96]"),
    "a pattern that backtracks": ({"rank_pattern": {r"(\w+)+x": 2}}, {}, r"the pattern '(\\w+)+x' may take too long"),
    "choices that multiply": ({"alpha_pattern": {"(q|.)" * 9: 2}}, {}, "may take too long; allowed: 256"),
    "a repetition beyond all": ({"rank_pattern": {"q{99999999999999999999}": 2}}, {}, "is not a regular expression"),
    "a pattern of 300 characters": ({"rank_pattern": {"(" * 300: 2}}, {}, "allowed: 256 characters"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, {}, "rank_pattern is ['q_proj']; expected an object"),
    "QALoRA": ({"use_qalora": True}, {}, "use_qalora = True is not supported"),
    "DoRA's magnitude": ({}, {f"{Q}.lora_magnitude_vector": torch.zeros(96)}, "has no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_understood_is_refused(case: str, tmp_path: Path) -> None:
    config, extra, expected = BAD[case]
    base = write_folder(tmp_path / "base", base_tensors())
    _adapter(tmp_path / "lora", extra, **config)
    with pytest.raises(UserError) as error:
        merge_adapter(base, tmp_path / "lora", tmp_path / "out")
    assert expected in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_adapters_folder_is_called_one(tmp_path: Path) -> None:
    _adapter(tmp_path / "lora")
    with pytest.raises(UserError, match="a LoRA adapter, not a model: merge it into its base"):
        HFFolder(tmp_path / "lora")
