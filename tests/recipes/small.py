"""SmolLM2 cut to two layers, or still smaller models, and a reward model of the same, for miniatures of recipes."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tiny
from fusemega.fixtures import data as assets


def write_models() -> None:
    """Writes the folders `model` and `rewarding` into the current one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    smollm2 = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained("model")
    model.config.num_labels = 1
    rewarding = LlamaForSequenceClassification(model.config)
    rewarding.model.load_state_dict(model.model.state_dict())
    rewarding.save_pretrained("rewarding")
    for folder in ("model", "rewarding"):
        tokenizer.save_pretrained(Path(folder))


def write_tiny_models() -> None:
    """Writes the folders `model` and `rewarding` into the current one: random weights, and a vocabulary of bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

    data = tiny.write_chat(Path("chats.jsonl"), rows=4, characters=60)
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    tiny.write_model(Path("model"), data, **size)
    torch.manual_seed(0)
    rewarding = LlamaForSequenceClassification(AutoConfig.from_pretrained("model", num_labels=1))
    rewarding.model.load_state_dict(AutoModelForCausalLM.from_pretrained("model").model.state_dict())
    rewarding.save_pretrained("rewarding")
    for path in Path("model").iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            (Path("rewarding") / path.name).write_bytes(path.read_bytes())
