"""The file of Python code that travels with models that transformers has no classes for. fusemega never runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CODE = Path(__file__).with_name("modeling_pruned.py")
"""The file that travels with a folder."""


def code_files(auto_map: Mapping[str, str]) -> list[str]:
    """The files of code that an `auto_map` names.

    Example:
        >>> code_files({"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"})
        ['configuration_x.py', 'modeling_x.py']
    """
    return sorted({f"{name.split('.')[0]}.py" for name in auto_map.values()})


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
