"""A Hugging Face fast tokenizer, with hashes of its content and exact character offsets."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Encoder
from transformers import PreTrainedTokenizerBase

from fusemega.errors import UserError
from fusemega.files.opening import read_text
from fusemega.files.tokenizer_files import load_pretrained, tokenizer_errors

_TOGETHER = 4 << 20  # characters, see `_portions`
SPACES = ("\u2581", "\u0120")  # how vocabularies write the space before a word


@dataclass(frozen=True)
class Encoding:
    """One text's tokens: `ids` int32 [L]; `starts`, `ends` int64 [L], the characters each token covers."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Tokenizer:
    """A fast tokenizer; `load` makes one from a folder or a hub id.

    Attributes:
        hf: the transformers tokenizer.
        source: the folder or hub id, for messages.
        content_hash: hex, of everything that decides ids: the tokenizer's serialised form with its added tokens,
            and which tokens are bos, eos, pad...; independent of the folder and of how the files are laid out.
        template_hash: hex, of the chat template; None where there is none.
        template_file: where that template is from, if not from the tokenizer's folder.
        num_ids: 1 + the largest id it can produce.
        eos_id, pad_id: int or None; pad_id falls back on eos_id, then on 0.
        prefix_ids: what its post-processor puts before a text (usually bos, or nothing).
        special_ids: ids of special tokens.
        unknown_id: id that its model gives to text without a token; None if there is no such text.
        added_tokens: texts of all added tokens, longest first.
    """

    def __init__(self, hf: PreTrainedTokenizerBase, source: str) -> None:
        if not getattr(hf, "is_fast", False):
            raise UserError(
                f"{source}: {type(hf).__name__} is a slow tokenizer without character offsets; "
                "convert it to a fast one (a folder with tokenizer.json)"
            )
        self.hf: Any = hf
        self.source = source
        state = json.loads(self.hf.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        specials = {name: str(value) for name, value in self.hf.special_tokens_map.items()}
        self.content_hash = _hash({"tokenizer": state, "special_tokens": specials})
        self._template: str | None = None
        self.template_file: str | None = None
        template = self.chat_template
        self.template_hash = None if template is None else _hash(template)
        # Byte-level tokenizers can report offsets without the spaces a token holds; ids do not depend on it.
        for node in _nodes(state):
            if "trim_offsets" in node:
                node["trim_offsets"] = False
        self._encoder = Encoder.from_str(json.dumps(state))
        decoders = list(_nodes(state.get("decoder")))
        self._byte_level = any(node.get("type") == "ByteLevel" for node in decoders)
        self._spaces_as_underscores = any("\u2581" in node.values() for node in decoders)
        self.num_ids = 1 + max(self._encoder.get_vocab(with_added_tokens=True).values())
        self.eos_id: int | None = self.hf.eos_token_id
        pad = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_id
        self.pad_id: int = 0 if pad is None else pad
        added = self._encoder.get_added_tokens_decoder()
        self.special_ids = np.array(sorted(i for i, token in added.items() if token.special), dtype=np.int32)
        self.added_tokens = tuple(sorted((token.content for token in added.values()), key=len, reverse=True))
        model = state["model"]
        unknown = model.get("unk_token")  # Unigram models have its id, the others its form
        self.unknown_id: int | None = model.get("unk_id") if unknown is None else self._encoder.token_to_id(unknown)
        if not self._encoder.encode("a", add_special_tokens=False).ids:
            raise UserError(f"{source}: the tokenizer makes no token of the text 'a': its vocabulary is damaged")
        framed = self._encoder.encode("a", add_special_tokens=True)
        # The special tokens in front of the first ordinary one.
        leading = framed.special_tokens_mask.index(0) if 0 in framed.special_tokens_mask else 0
        self.prefix_ids = tuple(framed.ids[:leading])

    @classmethod
    def load(cls, source: str | Path, trust_remote_code: bool = False) -> Tokenizer:
        """The tokenizer in a local folder, or of a hub id.

        Raises:
            UserError: nothing there that transformers can load, or a slow tokenizer.
        """
        hf = load_pretrained(source, trust_remote_code)
        with tokenizer_errors(f"{source}: cannot load a tokenizer", quietly=True):
            return cls(hf, str(source))

    def with_template(self, path: str | Path | None) -> Tokenizer:
        """The same tokenizer with the chat template of a file; itself for None.

        Raises:
            UserError: no such file, or no text.
        """
        if path is None:
            return self
        other = copy.copy(self)
        other._template, other.template_file = read_text(Path(path)), str(path)
        other.template_hash = _hash(other._template)
        return other

    @property
    def template_source(self) -> str:
        """Where the chat template is from, for messages."""
        return self.template_file or self.source

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, or None.

        Raises:
            UserError: something else than a text, or several by name and none of them the default.
        """
        if self._template is not None:
            return self._template
        try:
            template = self.hf.get_chat_template() if self.hf.chat_template else None
        except ValueError as error:
            raise UserError(f"{self.source}: no default chat template: {error}") from None
        if template is not None and not isinstance(template, str):
            raise UserError(f"{self.source}: the chat template is a {type(template).__name__}, expected a text")
        return template

    def token(self, token_id: int) -> str:
        """The token's form in the vocabulary, for messages."""
        return str(self._encoder.id_to_token(int(token_id)))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes each text once, in parallel, adding no special tokens of its own."""
        encodings: list[Encoding] = []
        for portion in _portions(texts):
            with tokenizer_errors(f"{self.source}: cannot tokenize"):
                encoded = self._encoder.encode_batch(portion, add_special_tokens=False)
            encodings += [Encoding(np.array(e.ids, dtype=np.int32), *_columns(e.offsets)) for e in encoded]
        return encodings

    @cached_property
    def token_num_bytes(self) -> np.ndarray:
        """int32 [num_ids]: UTF-8 bytes a token stands for, where its form tells: byte-level vocabularies (one
        character a byte), and SentencePiece's, with spaces as U+2581 and byte tokens `<0xE2>`; 0 where unknown."""
        num_bytes = np.zeros(self.num_ids, dtype=np.int32)
        for token, token_id in self._encoder.get_vocab(with_added_tokens=False).items():
            if self._byte_level:
                num_bytes[token_id] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                num_bytes[token_id] = 1
            elif self._spaces_as_underscores:
                num_bytes[token_id] = len(token.replace("\u2581", " ").encode())
        return num_bytes


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in portions of about `_TOGETHER` characters to be tokenized together: the library holds some
    hundred bytes for each token until a whole portion is done."""
    portion: list[str] = []
    length = 0
    for text in texts:
        if portion and length + len(text) > _TOGETHER:
            yield portion
            portion, length = [], 0
        portion.append(text)
        length += len(text)
    if portion:
        yield portion


def _columns(offsets: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def _nodes(state: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a tokenizer's serialised form, apart from its vocabulary."""
    if isinstance(state, dict):
        yield state
        for key, value in state.items():
            if key not in ("vocab", "merges", "added_tokens"):
                yield from _nodes(value)
    elif isinstance(state, list):
        for value in state:
            yield from _nodes(value)


def _hash(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
