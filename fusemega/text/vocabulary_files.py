"""What the files of a model folder say of its vocabulary: evidence for whether the rows of two models belong together.

tokenizer.json, or vocab.json + merges.txt, or tokenizer.model (SentencePiece), with the added tokens that
added_tokens.json and tokenizer_config.json name. Read without transformers; a folder with none of them shows nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.opening import read_bytes, read_text
from fusemega.files.tokenizer_files import JSON_BYTES, read_tokenizer_json, tokenizer_errors

TOKENIZER_FILE = "tokenizer.json"
FILES = (TOKENIZER_FILE, "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
PROBES = (
    "The river was cold, and the boat was late in the morning.",
    "def add(a, b):\n    return a + b  # 1234567890\n\n\n\tdone()",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\r\n",
    "Съешь ещё этих мягких французских булок 你好,世界 こんにちは 🙂👍🏽 e\u0301",
    "I'LL they'd don't WE'RE 3.14159 https://example.org/a_b?c=d&e=f user@example.org   ",
)
"""Texts on which two tokenizers are compared."""


@dataclass(frozen=True)
class VocabularyFiles:
    """A folder's vocabulary.

    Attributes:
        folder: the model folder.
        content: hash of the files' bytes.
        strings: id -> token.
        added: the added tokens' entries, by token.
        kind, ranks: the model's type, and what decides which tokens it cuts a text into: BPE's merges, Unigram's and
            SentencePiece's scores; None where the strings alone do.
        rest: the other entries of a tokenizer.json that decide it (normalizer, pre-tokenizer, options); None for other
            files.
    """

    folder: Path
    content: str
    strings: dict[int, str]
    added: dict[str, dict[str, Any]]
    kind: str
    ranks: list[Any] | None
    rest: dict[str, Any] | None

    @property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        return {token: i for i, token in self.strings.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text according to tokenizer.json alone.

        Raises:
            UserError: the folder has none, or the tokenizers library cannot read it.
        """
        from tokenizers import Tokenizer

        with tokenizer_errors(f"{self.folder / TOKENIZER_FILE}: cannot tokenize"):
            encoder = Tokenizer.from_str(read_text(self.folder / TOKENIZER_FILE, JSON_BYTES))
            return list(encoder.encode(text, add_special_tokens=False).ids)


def read_vocabulary(folder: Path) -> VocabularyFiles | None:
    """A folder's vocabulary; None where it has no files of one.

    Raises:
        UserError: a file that is not of its form.
    """
    read_tokenizer_json(folder)  # ids within bounds
    content = hashlib.blake2b(digest_size=16)
    for name in FILES[:-1]:
        content.update((read_bytes(folder / name, JSON_BYTES) if (folder / name).is_file() else b"") + b"\0")
    if (folder / TOKENIZER_FILE).is_file():
        ids, added, kind, ranks, rest = _from_tokenizer_json(folder / TOKENIZER_FILE)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        ids, added, kind, rest = read_json(folder / "vocab.json", JSON_BYTES), {}, "BPE", None
        lines = read_text(folder / "merges.txt", JSON_BYTES).split("\n")
        ranks = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.model").is_file():
        pieces = list(_sentencepieces(folder / "tokenizer.model"))
        ids, added, rest = {piece: i for i, (piece, _) in enumerate(pieces)}, {}, None
        kind, ranks = "SentencePiece", [score for _, score in pieces]
    else:
        return None
    strings = {i: token for token, i in ids.items()}
    for token, i, entry in _named_beside(folder):
        if strings.setdefault(i, token) == token:
            added.setdefault(token, entry | {"id": i, "content": token})
    return VocabularyFiles(folder, content.hexdigest(), strings, added, kind, ranks, rest)


def difference(first: VocabularyFiles, second: VocabularyFiles, *, common_only: bool = False) -> str | None:
    """The first evidence that rows at one position belong to different tokens in the two; None without evidence.

    Args:
        first, second: the two vocabularies.
        common_only: whether one may have more ordinary tokens than the other.
    """
    if first.content == second.content:
        return None
    a, b = first.strings, second.strings
    for i in sorted(a.keys() & b.keys()):
        if a[i] != b[i]:
            return f"id {i} is {a[i]!r} in {first.folder} and {b[i]!r} in {second.folder}"
    own = first.ids
    for i, token in b.items():
        if own.get(token, i) != i:
            return f"{token!r} is id {own[token]} in {first.folder} and {i} in {second.folder}"
    return _cut_otherwise(first, second, common_only)


def renamed(first: VocabularyFiles, second: VocabularyFiles) -> list[int] | None:
    """The ids whose tokens differ in name alone: both are added tokens, and neither name belongs to another id of the
    other vocabulary. None if the vocabularies differ in anything else."""
    a, b = first.strings, second.strings
    other = [i for i in sorted(a.keys() & b.keys()) if a[i] != b[i]]
    if any(a[i] not in first.added or b[i] not in second.added for i in other):
        return None
    names = {a[i] for i in other} & set(b.values()) or {b[i] for i in other} & set(a.values())
    return None if names or _cut_otherwise(first, second, common_only=False) else other


def _cut_otherwise(first: VocabularyFiles, second: VocabularyFiles, common_only: bool) -> str | None:
    ranks = [one.ranks for one in (first, second)]
    if first.kind == second.kind and ranks[0] is not None and ranks[1] is not None:
        if common_only and first.kind == "BPE":
            common = set(first.strings.values()) & set(second.strings.values())
            ranks = [[pair for pair in one or [] if "".join(pair) in common] for one in ranks]
        elif common_only:
            ranks = [(one or [])[: min(map(len, ranks))] for one in ranks]  # type: ignore[arg-type]
        if ranks[0] != ranks[1]:
            what = "merges" if first.kind == "BPE" else "scores"
            return f"the {what} are not the same, so {first.folder} and {second.folder} cut text otherwise"
    if first.rest is None or second.rest is None or first.rest == second.rest:
        return None
    for text in PROBES:
        if not common_only and first.encode(text) != second.encode(text):
            return f"{first.folder} and {second.folder} cut the text {text!r} otherwise"
    return None


def _from_tokenizer_json(
    path: Path,
) -> tuple[dict[str, int], dict[str, dict[str, Any]], str, list[Any] | None, dict[str, Any]]:
    whole = read_json(path, JSON_BYTES)
    try:
        model = dict(whole["model"])
        vocab, merges = model.pop("vocab"), model.pop("merges", None)
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        ranks: list[Any] | None = None if isinstance(vocab, dict) else [score for _, score in vocab]
        if merges is not None:
            ranks = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
        added = {entry["content"]: entry for entry in whole.get("added_tokens") or []}
        kind = model.get("type") or ("BPE" if merges is not None else "Unigram" if ranks else "WordLevel")
        rest = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer")} | model | {"type": kind}
        return ids | {token: entry["id"] for token, entry in added.items()}, added, str(kind), ranks, rest
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a tokenizer file with a vocabulary") from None


def _named_beside(folder: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Tokens of added_tokens.json and of tokenizer_config.json's list, with their ids."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    beside = folder / "added_tokens.json"
    for token, i in (read_json(beside, JSON_BYTES) if beside.is_file() else {}).items():
        if type(i) is int:
            yield token, i, plain
    config = folder / "tokenizer_config.json"
    listed = (read_json(config, JSON_BYTES) if config.is_file() else {}).get("added_tokens_decoder")
    for i, entry in (listed if isinstance(listed, Mapping) else {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(i).isdecimal():
            yield entry["content"], int(i), plain | entry


def _sentencepieces(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each piece with the bits of its score: field 1 of the model's protocol buffer, with fields 1 and 2 in it."""
    try:
        for field, value in _fields(read_bytes(path, JSON_BYTES)):
            if field == 1 and isinstance(value, bytes):
                parts = dict(_fields(value))
                yield bytes(parts[1]).decode(), bytes(parts.get(2, b""))
    except (IndexError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a SentencePiece model") from None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        # A key is (field number << 3) | wire type: 0 a varint, 1 and 5 eight and four bytes, 2 a length and bytes.
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(kind) or (number() if kind == 2 else -1)
        if size < 0 or at + size > len(data):
            raise ValueError
        yield key >> 3, data[at : at + size]
        at += size
