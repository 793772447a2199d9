"""Text, tokenizers and models from a seed: what most parts need, without a download."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

from gpu.card import Card

SEED = 1234
# Layers of 8B are left out, so that weights, gradients and Adam's state (18 bytes a parameter) fit into 80 GB.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # Llama-3.2-1B
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {  # Llama-3.1-8B, 8 of its 32 layers
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "moe": {  # Mixtral's form: 8 experts of 25 million parameters in each of 8 layers
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 509,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}


class Words:
    """An endless text of invented words, whose frequencies fall as those of real ones, and which follow each other in
    habits that a model can learn."""

    def __init__(self, seed: int = SEED, vocabulary: int = 300) -> None:
        self._random = random.Random(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        make = random.Random(SEED)  # the same words for every seed
        self._words = ["".join(make.choices(syllables, k=make.randint(1, 4))) for _ in range(vocabulary)]
        self._weights = [1.0 / (place + 3) for place in range(vocabulary)]
        self._last = 0

    def take(self, count: int) -> str:
        """The next `count` words."""
        chosen = []
        for _ in range(count):
            if self._random.random() < 0.5:  # the habit: each word has one that often comes next
                self._last = (7 * self._last + 13) % len(self._words)
            else:
                (self._last,) = self._random.choices(range(len(self._words)), self._weights)
            chosen.append(self._words[self._last])
        return " ".join(chosen)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chat(path: Path, rows: int, words: int = 24) -> Path:
    """Conversations of a question and an answer of unequal length, about `words` words each."""
    source = Words()
    return write_rows(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": source.take(3 + number % 7)},
                    {"role": "assistant", "content": source.take(words // 2 + (5 * number) % words)},
                ]
            }
            for number in range(rows)
        ],
    )


def write_pairs(path: Path, rows: int, prompt_words: int, response_words: int) -> Path:
    """A prompt, and two responses of unequal length, in each row."""
    source = Words()

    def message(role: str, words: int) -> list[dict[str, str]]:
        return [{"role": role, "content": source.take(words)}]

    return write_rows(
        path,
        [
            {
                "prompt": message("user", prompt_words),
                "chosen": message("assistant", response_words + number % 3),
                "rejected": message("assistant", response_words - number % 2),
            }
            for number in range(rows)
        ],
    )


def model_folder(work: Path, name: str, card: Card, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder `work/NAME-SEED` of a model of that shape with random bf16 weights (tiny: fp32), made once.

    Its tokenizer is a small one for `Words`; a large model has rows for more ids than that.

    Args:
        changes: of its `config.json`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = work / "-".join([name, str(seed), *(f"{key}{value}" for key, value in changes.items())])
    if folder.is_dir():
        return folder
    made = work / f".{folder.name}.incomplete"
    chat = write_chat(work / "tokenizer.jsonl", rows=200)
    shape: Mapping[str, Any] = SHAPES[name] | changes
    tiny.write_model(made, chat, **SHAPES["tiny"])
    (made / "model.safetensors").unlink()
    written = json.loads((made / "config.json").read_text(encoding="utf-8"))
    ids = {key: value for key, value in written.items() if key.endswith("_token_id")}
    config = AutoConfig.for_model(**{"model_type": "llama", **ids, **shape, "max_position_embeddings": 8192})
    torch.manual_seed(seed)
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    with torch.device("cpu" if name == "tiny" else card.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(made)
    del model
    card.free()
    made.replace(folder)
    return folder
