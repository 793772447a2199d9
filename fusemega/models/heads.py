"""What a model ends in: a vocabulary, one number, several with a gate (`gated_head.py`), or its hidden states.

Shape suffixes: N positions, H hidden, V_padded vocabulary padded to a multiple of TP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fusemega.errors import UserError, choose
from fusemega.models.rules import Replicated, Rule, VocabRows

HeadKind = Literal["vocabulary", "scalar", "gated", "none"]
REWARD: tuple[HeadKind, ...] = ("scalar", "gated")
"""Heads of reward models: one number for a text."""
_KINDS: dict[str, HeadKind] = {
    "ForCausalLM": "vocabulary",
    "ForSequenceClassification": "scalar",
    "ForRewardModelWithGating": "gated",
    "Model": "none",
}
_GATED = "LlamaForRewardModelWithGating"
# How the names of classes begin of which there are only language models here.
_LANGUAGE_ONLY = ("Pruned", "DeciLM", "InternLM2")
# Names of the parameter in a Megatron model: Megatron's own for logits, transformers' for scores.
_LOGITS, _SCORE = "output_layer.weight", "score.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def class_name(hf_class: str, kind: HeadKind) -> str:
    """transformers' class name of a model with such a head.

    Example:
        >>> class_name("Llama", "scalar")
        'LlamaForSequenceClassification'
    """
    if (hf_class, kind) == ("Gemma3Text", "vocabulary"):
        return "Gemma3ForCausalLM"
    return hf_class + next(ending for ending, found in _KINDS.items() if found == kind)


def has_head(hf_class: str, kind: HeadKind) -> bool:
    """Whether the family has a class with such a head; the gated one is Llama's alone."""
    if hf_class.startswith(_LANGUAGE_ONLY):
        return kind == "vocabulary"
    return kind != "gated" or class_name(hf_class, kind) == _GATED


def head_kind(hf_config: Any, hf_class: str) -> HeadKind:
    """The head that `architectures` of config.json names; a vocabulary if the key is absent or empty.

    Args:
        hf_config: the configuration.
        hf_class: how transformers' names of the family's classes begin ("Llama").

    Raises:
        UserError: not a class of the family, or a classifier with several labels.
    """
    given = hf_config.get("architectures")
    if not given:
        return "vocabulary"
    if not isinstance(given, list) or len(given) != 1:
        raise UserError(f"config.json: architectures = {given!r}, expected a list of one name")
    kinds = {class_name(hf_class, kind): kind for kind in _KINDS.values() if has_head(hf_class, kind)}
    # The first folders of Llama say LLaMAForCausalLM.
    name = {known.lower(): known for known in kinds}.get(str(given[0]).lower(), str(given[0]))
    kind = kinds[choose("config.json: architectures", name, kinds)]
    if kind == "scalar":
        labels = _labels(hf_config)
        if labels != 1:
            raise UserError(
                f"config.json: {given[0]} with {labels} labels (id2label) is not supported; allowed: 1, a score"
            )
    return kind


def is_gated(hf_config: Any) -> bool:
    """Whether this is a configuration of ArmoRM, whose folders bring code that is not needed here."""
    return hf_config.get("architectures") == [_GATED]


def scored_config(hf_config: Any, hf_class: str, pad_token_id: int | None) -> dict[str, Any]:
    """The configuration of a language model with a scalar head in place of its vocabulary, as transformers writes it.

    Args:
        hf_class: as in `head_kind`.
        pad_token_id: transformers scores the last token that is not this one; None: the last.

    Example:
        >>> scored_config({"model_type": "llama"}, "Llama", 7)["architectures"]
        ['LlamaForSequenceClassification']
    """
    names = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    # With "regression" the pipeline for text classification gives the score as it is, not its sigmoid.
    kept = {key: value for key, value in hf_config.items() if key != "num_labels"}
    new = {"architectures": [class_name(hf_class, "scalar")], "problem_type": "regression", **names}
    return kept | new | {"pad_token_id": pad_token_id}


def _labels(hf_config: Any) -> Any:
    """The number of labels as transformers counts them: two if no key gives it."""
    labels = hf_config.get("id2label")
    if labels is not None:
        return len(labels) if isinstance(labels, dict) else repr(labels)
    return hf_config.get("num_labels", 2)


def head_rules(kind: HeadKind, vocab_size: int, hidden: int, embedding: str, head: str, tied: bool) -> list[Rule]:
    """The rules of the head: one, or none.

    Args:
        embedding: Hugging Face's name of the embedding, which a tied head copies.
        head: Hugging Face's name of the vocabulary's module.
    """
    if kind == "vocabulary":
        return [VocabRows(_LOGITS, embedding if tied else f"{head}.weight", (vocab_size, hidden), is_duplicate=tied)]
    return [Replicated(_SCORE, "score.weight", (1, hidden))] if kind == "scalar" else []


class ScalarHead(torch.nn.Module):
    """One number for each position: weight [1, H], whole on every tensor-parallel rank.

    Every rank computes the same scores from the same hidden states, so each has the weight's whole gradient already.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, tp_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))
        self._tp_size = tp_size

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Scores [N] in fp32 (or wider), of rows that `passes.forward.supervised_hidden` picks.

        Backward of `supervised_hidden` sums the gradients that the tensor-parallel ranks pass back. With a vocabulary
        each rank has a part of the gradient. Here each rank has all of it, so it passes back 1 / TP of it.
        """
        # A view is a tensor of its own to autograd: the hook scales only the gradient that comes from these scores.
        hidden_NH = hidden_NH.view_as(hidden_NH)
        if self._tp_size > 1 and hidden_NH.requires_grad:
            hidden_NH.register_hook(lambda gradient: gradient / self._tp_size)
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        scores_N: torch.Tensor = hidden_NH.to(wide) @ self.weight[0].to(wide)
        return scores_N


@dataclass(frozen=True)
class Head:
    """The head of a built model, on its last stage.

    Attributes:
        kind: what the model ends in.
        weight: [V_padded / TP, H] of a vocabulary (the embedding itself where they are tied), [1, H] of a score, [M, H]
            of M objectives.
        softcap: logits become softcap * tanh(logits / softcap); None: they stay.
    """

    kind: HeadKind
    weight: torch.nn.Parameter
    softcap: float | None
