"""A tiny model folder on real text, for benchmarks that ask whether curves agree rather than how fast they fall."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from fusemega.fixtures.data import chat_data

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat(path: Path, rows: int, characters: int) -> Path:
    """`rows` real conversations, each text cut to `characters`, as JSONL."""
    kept = []
    for line in chat_data().train.read_text(encoding="utf-8").splitlines()[:rows]:
        messages = json.loads(line)["messages"]
        kept.append({"messages": [{**m, "content": m["content"][:characters].strip()} for m in messages]})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    return path


def write_model(folder: Path, chat: Path, *, seed: int = 0, vocab_size: int = 509, **config: object) -> Path:
    """A randomly initialised Llama, or another `model_type`, with a byte-level BPE tokenizer trained on `chat`.

    Its vocabulary needs padding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chat.read_text(encoding="utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
    }
    torch.manual_seed(seed)
    named = {"model_type": "llama", "vocab_size": vocab_size, **settings, **config}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**named)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def pad_vocabulary(folder: Path, vocab_size: int) -> Path:
    """A model with rows for more ids than its tokenizer has, as many published ones have."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.save_pretrained(folder)
    return folder
