"""Loads tokenizers from any source: checks their files before transformers reads them, and turns panics into errors.

transformers and the tokenizers library raise anything from OSError to a bare Exception. The library's compiled code
also panics, which is not an Exception, and it allocates arrays as large as an id says.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.opening import MIB, refuse_special_files
from fusemega.files.pickles import first_line

JSON_BYTES = 256 * MIB
TEMPLATE_BYTES = 4 * MIB
_ONE_AT_A_TIME = threading.Lock()  # for file descriptor 2, which all threads share
IDS = 1 << 25  # the most that stores can code
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def load_pretrained(source: str | Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer in a local folder, or of a hub id.

    Raises:
        UserError: nothing is there that transformers can load, or one of its files exceeds a limit.
    """
    from transformers import AutoTokenizer

    logging.getLogger("transformers.configuration_utils").addFilter(_not_of_types)
    with tokenizer_errors(f"{source}: cannot load a tokenizer", quietly=True):
        if Path(source).is_dir():
            read_tokenizer_json(Path(source))
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)


def _not_of_types(record: logging.LogRecord) -> bool:
    """Keeps back what transformers says of each `model_type` that it does not know: a tokenizer does not need it."""
    return not record.getMessage().startswith("You are using a model of type")


@contextmanager
def tokenizer_errors(what: str, quietly: bool = False) -> Iterator[None]:
    """Turns whatever the libraries raise, panics too, into a UserError that begins with `what`.

    Args:
        quietly: keep a panic's own message off stderr; not for blocks that several threads run at once.
    """
    try:
        with _panics_unheard() if quietly else nullcontext():
            yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # PyO3's, which cannot be imported
        if not panic and not isinstance(error, Exception):
            raise
        reason = f"the tokenizers library broke down: {first_line(error)}" if panic else first_line(error)
        raise UserError(reason if reason.startswith(what) else f"{what}: {reason}") from error


@contextmanager
def _panics_unheard() -> Iterator[None]:
    """Keeps off stderr what compiled code writes to file descriptor 2 itself: a panic's message and its backtrace."""
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with tempfile.TemporaryFile() as kept:
            os.dup2(kept.fileno(), 2)
            try:
                yield
            except BaseException as error:
                if type(error).__name__ == "PanicException":
                    kept.truncate(0)
                raise
            finally:
                sys.stderr.flush()
                os.dup2(stderr, 2)
                kept.seek(0)
                if said := kept.read():
                    os.write(2, said)
    finally:
        os.close(stderr)
        _ONE_AT_A_TIME.release()


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer.json, {} where there is none. All JSON files of the tokenizer are checked first.

    Raises:
        UserError: a JSON file or a chat template is malformed or too large, or an added token or an id is invalid.
    """
    refuse_special_files(folder)
    for template in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
        if template.is_file() and template.stat().st_size > TEMPLATE_BYTES:
            size = template.stat().st_size
            raise UserError(f"{template}: {size} bytes; allowed for a chat template: {TEMPLATE_BYTES}")
    found = {name: read_json(folder / name, JSON_BYTES) for name in _JSON if (folder / name).is_file()}
    whole = found.get("tokenizer.json", {})
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = {"tokenizer.json": list(vocabulary.values()) if isinstance(vocabulary, dict) else []}
    for added in whole.get("added_tokens") or []:
        if not isinstance(added, dict) or not isinstance(added.get("content"), str):
            raise UserError(f"{folder / 'tokenizer.json'}: {added!r} is not an added token")
        ids["tokenizer.json"].append(added.get("id"))
    ids |= {name: list(found.get(name, {}).values()) for name in ("vocab.json", "added_tokens.json")}
    for name, given in ids.items():
        for i in given:
            if type(i) is not int or not 0 <= i < IDS:
                raise UserError(f"{folder / name}: the id {i!r} of a token; allowed: 0 to {IDS - 1}")
    return whole
