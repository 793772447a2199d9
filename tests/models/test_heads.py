"""What configurations say of a model's head and of the blocks that its layers have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import transformers_logits, verify
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.losses.apply import objective_loss
from fusemega.losses.sft import SFT
from fusemega.models import registry
from fusemega.models.build import build_model
from fusemega.models.dense_logits import dense_logits
from fusemega.models.family import HFConfig, keep_layers
from fusemega.models.heads import REWARD
from fusemega.models.llama import Llama
from fusemega.models.registry import architecture_of
from fusemega.passes.forward import run_schedule
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.parallel import World
from tests.distributed.workers.families import row_of
from tests.models.test_build import CONFIG

SCORE = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
NO_MLP = {"ffn": {"no_op": True}}


def hf_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"}, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForCausalLLM"]}, ["architectures", "did you mean 'LlamaForCausalLM'", "LlamaModel"]),
        ({"architectures": ["MistralForCausalLM"]}, ["'MistralForCausalLM'", "LlamaForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures = 'LlamaForCausalLM'", "a list of one name"]),
        ({"architectures": SCORE["architectures"]}, ["LlamaForSequenceClassification with 2 labels", "allowed: 1"]),
        (SCORE | {"id2label": {"0": "a", "1": "b", "2": "c"}}, ["with 3 labels"]),
        ({"block_configs": [{}]}, ["block_configs: 1 entries", "a list of 2"]),
        ({"block_configs": {}}, ["block_configs: {}", "a list of 2"]),
        ({"block_configs": [{}, {"mlp": {"no_op": True}}]}, ["block_configs[1].mlp", "allowed: attention, ffn"]),
        ({"block_configs": [{"ffn": {"sparsify": 2.0}}, {}]}, ["block_configs[0].ffn.sparsify = 2.0", "no_op"]),
        ({"block_configs": [{"ffn": {"ffn_mult": 2.0}}, {}]}, ["ffn_mult = 2.0", "size of 256", "layers have 48"]),
        ({"block_configs": [{"ffn": {"intermediate_size": 24}}, {}]}, ["intermediate_size = 24", "layers have 48"]),
        ({"block_configs": [{"ffn": {"ffn_mult": "2"}}, {}]}, ["ffn_mult = '2'", "a positive number"]),
        ({"block_configs": [{"attention": {"n_heads_in_group": 4}}, {}]}, ["n_heads_in_group = 4", "layers have 2"]),
        ({"block_configs": [{"ffn": {"no_op": "yes"}}, {}]}, ["block_configs[0].ffn.no_op = 'yes'", "true or false"]),
        ({"block_configs": [{"attention": None}, {"ffn": []}]}, ["block_configs[1].ffn = []", "a mapping"]),
        ({"block_configs": [{}, NO_MLP | {"attention": {"no_op": True}}]}, ["block_configs[1]", "leave the layer out"]),
    ],
)
def test_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        architecture_of(CONFIG | change)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel])
def test_rules_name_the_tensors_of_each_of_transformers_classes(kind: Any, tied: bool) -> None:
    config = hf_config(num_labels=1, tie_word_embeddings=tied)
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in kind(config).named_parameters()}
    opened = architecture_of({**config.to_dict(), "architectures": [kind.__name__]})
    assert opened.hf_shapes() == wanted
    assert opened.copies().keys() == ({"lm_head.weight"} if tied and kind is LlamaForCausalLM else set())


def test_a_model_without_a_head_gives_its_hidden_states_and_converts(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = LlamaModel(hf_config()).eval()
    body.save_pretrained(tmp_path / "body")
    opened = HFFolder(tmp_path / "body").architecture
    model = build_model(opened, world, torch.float32)
    load_hf(model, tmp_path / "body", world)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        found = model.chunks[0](ids, torch.arange(5)[None], None)
        torch.testing.assert_close(found[:, 0], body(ids).last_hidden_state[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no head"):
        _ = model.head
    with pytest.raises(UserError, match="has the architecture LlamaModel; allowed here: LlamaForCausalLM"):
        opened.require_head(["vocabulary"], "body")
    import_hf(tmp_path / "body", tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "again")
    assert verify(tmp_path / "body", tmp_path / "again").identical


def test_scores_and_hidden_states_are_compared_as_logits_are(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for kind, shape in ((LlamaForSequenceClassification, (1, 1)), (LlamaModel, (4, 32))):
        folder = tmp_path / kind.__name__
        kind(hf_config(num_labels=1, pad_token_id=5)).save_pretrained(folder)
        opened = HFFolder(folder).architecture
        model = build_model(opened, world, torch.float32)
        load_hf(model, folder, world)
        wanted, found = transformers_logits(folder, [2, 7, 1, 5], opened), dense_logits(model, world, [[2, 7, 1, 5]])
        assert found is not None and wanted.shape == shape and wanted.abs().max() > 1e-3
        torch.testing.assert_close(found[-len(wanted) :], wanted, atol=1e-5, rtol=0)
    left_out = architecture_of(CONFIG | {"block_configs": [{}, NO_MLP]})
    with pytest.raises(UserError, match="leaves out blocks, which transformers would fill at random"):
        transformers_logits(tmp_path, [1], left_out)


def test_layers_take_their_blocks_along() -> None:
    config = CONFIG | {"num_hidden_layers": 3, "block_configs": [{}, NO_MLP, {}]}
    kept = architecture_of(keep_layers(config, [1, 2])).layers
    assert [layer.mlp is None for layer in kept] == [True, False]
    assert not architecture_of(config).alike and architecture_of(CONFIG).alike


class Capped(Llama):
    """A family whose logits are capped as Gemma-2's are."""

    model_types = ("capped",)
    known = frozenset({"final_logit_softcapping"})

    def softcap(self, hf_config: HFConfig) -> float | None:
        return hf_config.get("final_logit_softcapping")


def test_a_softcap_reaches_loss_and_gradients(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Megatron's schedule and the objective, in float64, against transformers with capped logits."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, Capped()))
    torch.manual_seed(0)
    hf = LlamaForCausalLM(hf_config()).double()
    with torch.no_grad():
        hf.lm_head.weight.mul_(40)  # logits of several times the cap
    hf.save_pretrained(tmp_path)
    texts = [torch.randint(0, 101, (n,)).tolist() for n in (7, 4)]
    batch = row_of(texts, 1)

    def ours(cap: float | None) -> tuple[float, dict[str, torch.Tensor], torch.Tensor | None]:
        opened = architecture_of(CONFIG | {"model_type": "capped", "final_logit_softcapping": cap})
        model = build_model(opened, world, torch.float64)
        load_hf(model, tmp_path, world)
        assert model.head.softcap == cap

        def loss_function(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, float]:
            loss, _ = objective_loss(SFT(), model, hidden_NH, batch, {"lm": len(batch.labels)}, world)
            return loss, float(loss)

        (loss,) = run_schedule(list(model.chunks), [batch], loss_function, world, forward_only=False)
        last = model.chunks[-1]
        gradients = {
            "lm_head.weight": model.head.weight.grad,
            "model.norm.weight": last.decoder.final_layernorm.weight.grad,
            "model.layers.1.mlp.down_proj.weight": last.decoder.layers[1].mlp.linear_fc2.weight.grad,
        }
        return loss, gradients, dense_logits(model, world, texts)

    logits_SV = torch.cat([hf(torch.tensor([text])).logits[0] for text in texts])
    assert logits_SV.abs().max() > 5
    capped_SV = 2.0 * torch.tanh(logits_SV / 2.0)
    wanted = torch.nn.functional.cross_entropy(capped_SV[batch.positions], batch.labels)
    wanted.backward()
    loss, gradients, logits = ours(2.0)
    assert loss == pytest.approx(float(wanted), rel=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, hf.get_parameter(name).grad, rtol=1e-5, atol=1e-8)
    assert logits is not None
    torch.testing.assert_close(logits, capped_SV.float().detach(), rtol=1e-5, atol=1e-5)
    assert abs(ours(None)[0] - loss) > 0.1


def test_public_families_refuse_a_softcap() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        with pytest.raises(UserError, match="unknown key 'final_logit_softcapping'"):
            architecture_of(CONFIG | {"model_type": model_type, "head_dim": 8, "final_logit_softcapping": 30.0})


def test_only_llama_has_a_gated_head() -> None:
    qwen = architecture_of(CONFIG | {"model_type": "qwen2"})
    with pytest.raises(UserError, match="Qwen2ForCausalLM; allowed here: Qwen2ForSequenceClassification$"):
        qwen.require_head(REWARD, "model")
    with pytest.raises(UserError, match="unknown name 'LlamaForRewardModelWithGating'"):
        architecture_of(CONFIG | {"model_type": "qwen2", "architectures": ["LlamaForRewardModelWithGating"]})
    with pytest.raises(UserError, match="auto_map asks for the folder's own Python code"):
        architecture_of(CONFIG | {"auto_map": {"AutoModel": "modeling.Llama"}})


def test_an_old_spelling_of_a_class_is_read() -> None:
    config = LlamaConfig(num_hidden_layers=1).to_dict()
    assert architecture_of({**config, "architectures": ["LLaMAForCausalLM"]}).head == "vocabulary"
