"""The Mistral family: Mistral 7B (v0.1 with a sliding window, later ones without), Nemo, Small, Large."""

from __future__ import annotations

from collections.abc import Sequence

from fusemega.models.dense import DenseDecoder
from fusemega.models.family import HFConfig, one_window


class Mistral(DenseDecoder):
    """`model_type` mistral: a query of any layer sees the last `sliding_window` tokens, or all where that is null."""

    model_types: tuple[str, ...] = ("mistral",)
    hf_class = "Mistral"
    known = frozenset({"sliding_window"})
    defaults = {"num_key_value_heads": 8, "sliding_window": 4096}

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """See `DenseDecoder.windows`."""
        return one_window({**self.defaults, **hf_config})
