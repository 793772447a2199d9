"""The file of Python code that travels with models that transformers has no classes for. fusemega never runs it."""

from __future__ import annotations

from pathlib import Path

CODE = Path(__file__).with_name("modeling_pruned.py")
"""The file that travels with a folder."""


def auto_map(hf_class: str) -> dict[str, str]:
    """`auto_map` of config.json: where transformers finds the classes.

    Args:
        hf_class: how their names begin.

    Example:
        >>> auto_map("PrunedLlama")["AutoConfig"]
        'modeling_pruned.PrunedLlamaConfig'
    """
    return {
        "AutoConfig": f"{CODE.stem}.{hf_class}Config",
        "AutoModelForCausalLM": f"{CODE.stem}.{hf_class}ForCausalLM",
    }
