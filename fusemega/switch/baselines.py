"""What a switcher is compared with: other choices between the modes, each a score for every prompt.

* `text`: a linear classifier of hashed words and word pairs, trained on the same labels
* `sentence_encoder`: the mean vector of a text encoder, with the switcher's network
* `perplexity` (CAR): the perplexity of the first short answer; the long mode costs both answers
* `oracle`: the labels themselves; no choice can be better by the rule of a threshold on the gain

Shape suffixes: N prompts, M modes, F hashed features, H numbers of a vector, B texts of a batch, L tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusemega.errors import UserError
from fusemega.hf.hub import resolve
from fusemega.store import Store
from fusemega.switch.labels import Labels
from fusemega.switch.run_file import SwitchRun
from fusemega.switch.train import fit, split

_FEATURES = 4096
_BATCH = 16


def text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The user's last message."""
    content = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), "")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content)


def hashed(texts: Sequence[str], size: int = _FEATURES) -> torch.Tensor:
    """float64 [N, F]: log counts of words and word pairs (numbers count by their digits), each in the place that its
    hash gives, with its sign; rows of length 1."""
    found = torch.zeros(len(texts), size, dtype=torch.float64)
    for row, text in enumerate(texts):
        words = [re.sub(r"\d", "0", word) for word in re.findall(r"\w+|[^\w\s]", text.lower())]
        for gram in [
            *words,
            *(" ".join(pair) for pair in zip(words, words[1:], strict=False)),
            f"#{len(words).bit_length()}",
        ]:
            digest = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")
            found[row, digest % size] += 1 - 2 * (digest >> 63)
    found = found.sign() * found.abs().log1p()
    return found / found.norm(dim=1, keepdim=True).clamp(min=1e-12)


def text_scores(train: Labels, asked: Labels, penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1)) -> np.ndarray:
    """[N]: the gain of the long mode that the words let expect.

    Args:
        train: to learn from; a tenth of it chooses the penalty.
        asked: whose scores are wanted.
        penalties: on the squared weights.
    """
    words_NF = hashed([text_of(messages) for messages in train.messages])
    rates_NM = torch.from_numpy(train.rates_NM)
    rest, held = split(train, 0.1)
    losses = {
        penalty: _loss(_linear(words_NF[rest], rates_NM[rest], penalty), words_NF[held], rates_NM[held])
        for penalty in penalties
    }
    fitted = _linear(words_NF, rates_NM, min(losses, key=lambda penalty: losses[penalty]))
    scores_NM = torch.sigmoid(fitted(hashed([text_of(messages) for messages in asked.messages])))
    gain: np.ndarray = (scores_NM[:, 1] - scores_NM[:, 0]).detach().numpy()
    return gain


def encoder_scores(run: SwitchRun, source: str, train: Labels, asked: Labels) -> np.ndarray:
    """[N]: the gain that the switcher's network expects of a text encoder's vectors.

    Raises:
        UserError: no encoder that transformers can load.
    """
    vectors = _encoded(source, [text_of(messages) for messages in (*train.messages, *asked.messages)])
    rest, held = split(train, run.train.validation)
    network, _ = fit(vectors[: len(train)], train, rest, held, run.train)
    with torch.no_grad():
        scores_NM = network(torch.from_numpy(vectors[len(train) :])).double().numpy()
    gain: np.ndarray = scores_NM[:, 1] - scores_NM[:, 0]
    return gain


def perplexity_choice(store: Store, labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CAR: scores [N], pass rates [N, M] and tokens [N, M] of answering in the short mode first.

    The score is the mean negative log-probability of the first short answer. A prompt without one (it was empty) goes
    to the long mode first of all. The short column has that one answer, and the long mode's tokens include its tokens.
    """
    scores, rates, tokens = np.full(len(labels), np.inf), labels.rates_NM.copy(), labels.tokens_NM.copy()
    for row, (key, first) in enumerate(zip(labels.keys, labels.first_short, strict=True)):
        entry = store.entry(bytes.fromhex(key))
        if entry is not None and first is not None:
            scores[row] = -float(entry["sum_logp"]) / int(entry["positions"])
        if first is not None:
            rates[row, 0], tokens[row, 0] = first
        tokens[row, 1] += tokens[row, 0]
    highest = scores[np.isfinite(scores)].max(initial=0.0)
    scores[~np.isfinite(scores)] = highest + 1
    return scores, rates, tokens


def _linear(words_NF: torch.Tensor, rates_NM: torch.Tensor, penalty: float) -> torch.nn.Linear:
    """Logistic regression of each mode's pass rate."""
    layer = torch.nn.Linear(words_NF.size(1), rates_NM.size(1), dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.logit(rates_NM.mean(0).clamp(0.01, 0.99)))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(layer(words_NF), rates_NM)
        loss = loss + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


@torch.no_grad()
def _loss(layer: torch.nn.Linear, words_NF: torch.Tensor, rates_NM: torch.Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(layer(words_NF), rates_NM))


@torch.no_grad()
def _encoded(source: str, texts: Sequence[str]) -> np.ndarray:
    """float32 [N, H]: the mean over tokens of the encoder's last hidden states."""
    from transformers import AutoModel, AutoTokenizer

    path = resolve(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model = AutoModel.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"baselines.sentence_encoder: {source}: transformers cannot load it: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=512, return_tensors="pt"
        )
        hidden_BLH = model(**batch).last_hidden_state
        mask_BL1 = batch["attention_mask"][:, :, None]
        found.append(((hidden_BLH * mask_BL1).sum(1) / mask_BL1.sum(1)).numpy())
    return np.concatenate(found)
