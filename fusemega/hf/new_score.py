"""A language model's folder seen as a reward model's: a new scalar head in place of the vocabulary's."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from fusemega.errors import UserError
from fusemega.files.boxes import Box, slices
from fusemega.files.moves import Stored
from fusemega.hf.folder import HFFolder
from fusemega.models.heads import has_head, scored_config
from fusemega.models.registry import architecture_of
from fusemega.text.tokenizer import Tokenizer

SCORE = "score.weight"


class NewScore(HFFolder):
    """The folder without its vocabulary head, and with `score.weight`, which is in no file.

    The weight is normal(0, `initializer_range`, 0.02 where the configuration has none), as transformers initialises it,
    in the dtype of the embedding, and drawn in float32 from a generator seeded by the seed and its name: the same on
    every rank. `pad_token_id` becomes the tokenizer's, with which batches are padded, or that of its end of text.

    Args:
        path: a language model's folder.
        seed: of the new weight.
        tokenizer: the folder's.

    Raises:
        UserError: as `HFFolder`.
    """

    def __init__(self, path: str | Path, seed: int, tokenizer: Tokenizer) -> None:
        super().__init__(path)
        before = architecture_of(self.config)
        if not has_head(before.family.hf_class, "scalar"):
            raise UserError(
                f"{path}: a reward model cannot be made of it: {self.config['model_type']} has no class with a score"
            )
        # transformers has no embedding for an id beyond the model's rows, and no batches without a padding id.
        padding = (tokenizer.hf.pad_token_id, tokenizer.eos_id)
        pad_id = next((i for i in padding if i is not None and i < before.vocab_size), None)
        self.config = scored_config(self.config, before.family.hf_class, pad_id)
        self._entries.pop("lm_head.weight", None)
        (hidden,) = before.hf_shapes()["model.norm.weight"]
        self._like = "model.embed_tokens.weight"
        # crc32, because Python's own hash of a string differs from process to process.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{SCORE}".encode()))
        std = self.config.get("initializer_range", 0.02)
        self._score = torch.empty(1, hidden).normal_(0.0, std, generator=generator)

    def keys(self) -> list[str]:
        """See `HFFolder.keys`."""
        return sorted([*super().keys(), SCORE])

    def __contains__(self, name: object) -> bool:
        return name == SCORE or super().__contains__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `HFFolder.shape`."""
        return tuple(self._score.shape) if name == SCORE else super().shape(name)

    def file(self, name: str) -> Path:
        """See `HFFolder.file`; of the new weight, the file of the embedding, for want of its own."""
        return super().file(self._like if name == SCORE else name)

    def dtype(self, name: str) -> torch.dtype:
        """See `HFFolder.dtype`."""
        return super().dtype(self._like if name == SCORE else name)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `HFFolder.read`."""
        return self._score[slices(box)].to(self.dtype(name)) if name == SCORE else super().read(name, box)

    def stored(self, name: str) -> Stored:
        """See `HFFolder.stored`.

        Raises:
            UserError: the new weight is asked for.
        """
        if name == SCORE:
            raise UserError(f"{self.path}: {SCORE} is new and untrained, and is not exported")
        return super().stored(name)

    def content_hash(self, digests: Mapping[str, str] | None = None) -> str:
        """See `HFFolder.content_hash`; the new weight counts as its values."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(super().content_hash(digests).encode())
        digest.update(self._score.numpy().tobytes())
        return digest.hexdigest()
