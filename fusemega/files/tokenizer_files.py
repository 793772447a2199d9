"""Tokenizers that others made: their files are looked at before transformers reads them, and a panic is an error.

transformers and the tokenizers library raise anything, from OSError to bare Exception; the latter's compiled code also
panics, which is no Exception, and arrays are made as large as an id says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.opening import MIB, refuse_special_files
from fusemega.files.pickles import first_line

JSON_BYTES = 256 * MIB
IDS = 1 << 25  # the most that stores can code
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def load_pretrained(source: str | Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer in a local folder, or of a hub id.

    Raises:
        UserError: nothing there that transformers can load, or a file of it beyond the bounds.
    """
    from transformers import AutoTokenizer

    with tokenizer_errors(f"{source}: cannot load a tokenizer"):
        if Path(source).is_dir():
            _check(Path(source))
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turns whatever the libraries raise, panics too, into a UserError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # PyO3's, which cannot be imported
        if not panic and not isinstance(error, Exception):
            raise
        reason = f"the tokenizers library broke down: {first_line(error)}" if panic else first_line(error)
        raise UserError(reason if reason.startswith(what) else f"{what}: {reason}") from error


def _check(folder: Path) -> None:
    refuse_special_files(folder)
    found = {name: read_json(folder / name, JSON_BYTES) for name in _JSON if (folder / name).is_file()}
    whole = found.get("tokenizer.json", {})
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    for added in whole.get("added_tokens") or []:
        ids.append(added.get("id") if isinstance(added, dict) else added)
    ids += [*found.get("vocab.json", {}).values(), *found.get("added_tokens.json", {}).values()]
    for i in ids:
        if type(i) is not int or not 0 <= i < IDS:
            raise UserError(f"the id {i!r} of a token; allowed: 0 to {IDS - 1}")
