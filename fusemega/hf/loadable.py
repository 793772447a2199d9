"""Loads a finished Hugging Face folder as its users will, without weights, before the folder gets its name.

`AutoTokenizer` chooses a class from configuration files beside tokenizer.json, and `generate()` stops at the tokens in
generation_config.json. Both may differ from what the model was trained with. So the folder's tokenizer is compared with
the training tokenizer on probe texts, its ids with the number of rows, and the token that closes a turn with the stop
tokens. Differences that can be corrected are corrected and reported; the others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.pickles import first_line
from fusemega.hf.side_files import write_template
from fusemega.models.architecture import Architecture
from fusemega.models.registry import architecture_of
from fusemega.models.travelling_code import code_files
from fusemega.text.chat import ChatRenderer
from fusemega.text.document import BadRow
from fusemega.text.templates import OverBudget
from fusemega.text.tokenizer import Tokenizer
from fusemega.text.vocabulary_files import FILES, PROBES

GENERATION = "generation_config.json"


def settle(folder: Path, trained_with: Tokenizer | Path, *, chats: bool, ends: Iterable[int] = ()) -> list[str]:
    """Checks a folder that is about to be published, and corrects what it can.

    Args:
        folder: with configuration, tokenizer and generation settings; it may lack weights.
        trained_with: the tokenizer to which the rows of the model belong, or its folder.
        chats: whether the model was taught conversations by the folder's chat template.
        ends: other ids at which generation has to stop.

    Returns:
        Notes for the user, one sentence each: corrections, and what to know. Empty for a folder without a tokenizer.

    Raises:
        UserError: transformers cannot load it, or loads another tokenizer than `trained_with`; a token that ends turns
            or texts has no row.
    """
    if not any((folder / name).is_file() for name in FILES[:4]):  # those that can hold a vocabulary
        return []
    reference = trained_with if isinstance(trained_with, Tokenizer) else _known(trained_with)
    if reference is None:
        return []
    notes: list[str] = []
    architecture = architecture_of(read_json(folder / "config.json"))
    if architecture.family.auto_map:
        files = [name for name in code_files(architecture.family.auto_map) if not (folder / name).is_file()]
        lacking = (
            f"; copy {' and '.join(files)} into it from the published folder: fusemega copies no code" if files else ""
        )
        runs = " and ".join(code_files(architecture.family.auto_map))
        notes.append(f"transformers reads it with trust_remote_code=True, which runs {runs} of the folder{lacking}")
    elif not architecture.complete:
        notes.append(
            "block_configs of config.json leaves out blocks, which transformers would fill at random: it reads "
            "no such folder"
        )
    tokenizer = _with_template(folder, _tokenizer(folder, reference, notes), reference, notes)
    config = _config(folder, architecture)
    rows = int(config["vocab_size"])
    stops = [i for i in (closing_id(tokenizer) if chats else None, *ends) if i is not None]
    if tokenizer.num_ids > rows:
        beyond = [i for i in (tokenizer.eos_id, *stops) if i is not None and i >= rows]
        if beyond and chats:
            raise UserError(
                f"{reference.source}: {tokenizer.token(beyond[0])!r} is id {beyond[0]}, and the model has {rows} rows: "
                "it can neither read nor write what ends a turn"
            )
        first = tokenizer.token(rows)
        notes.append(f"the tokenizer has {tokenizer.num_ids} ids, the model {rows} rows: none for {first!r} and after")
    if architecture.head == "scalar":  # writes nothing, so it has nothing to stop at
        return notes + _pads(folder, config, tokenizer)
    return notes + _stop_at(folder, config, [i for i in stops if i < rows], tokenizer)


def closing_id(tokenizer: Tokenizer) -> int | None:
    """The token with which the chat template closes a turn; None without a template, or where it is not one token."""
    try:
        if tokenizer.chat_template is None:
            return None
        (closing,) = tokenizer.encode([ChatRenderer(tokenizer).closing.strip()])
    except OverBudget:
        raise
    except (UserError, BadRow):
        return None
    return int(closing.ids[0]) if len(closing.ids) == 1 else None


def stop_ids(folder: Path) -> list[int]:
    """The ids at which `generate()` stops: those of generation_config.json, or of config.json without one."""
    for name in (GENERATION, "config.json"):
        found = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if found is not None:
            return [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]
    return []


def _known(folder: Path) -> Tokenizer | None:
    """The source's tokenizer; None if transformers cannot load it either, so that its copy need not load."""
    try:
        return Tokenizer.load(folder)
    except UserError:
        return None


def _tokenizer(folder: Path, reference: Tokenizer, notes: list[str]) -> Tokenizer:
    """The folder's tokenizer; corrected if it does not cut text as `reference` does."""
    try:
        found: Tokenizer | None = Tokenizer.load(folder)
    except UserError:
        found = None
    if found is not None and _same(found, reference):
        return found
    # The configuration selects another class: write the training tokenizer, with the class that loads it unchanged.
    (folder / "tokenizer.json").write_text(reference.hf.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    settings = {key: value for key, value in settings.items() if key not in ("auto_map", "tokenizer_type")}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | reference.hf.special_tokens_map
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    mended = Tokenizer.load(folder)
    if not _same(mended, reference):
        raise UserError(
            f"{folder}: transformers loads its tokenizer as another one than {reference.source} (a "
            f"{type(mended.hf).__name__} and a {type(reference.hf).__name__}), with other ids for the same text"
        )
    notes.append(f"tokenizer_class is PreTrainedTokenizerFast: transformers would load another than {reference.source}")
    return mended


def _with_template(folder: Path, found: Tokenizer, reference: Tokenizer, notes: list[str]) -> Tokenizer:
    """The folder's tokenizer, with the chat template that a run file gave in place of the model's."""
    if reference.template_file is None or found.chat_template == reference.chat_template:
        return found
    write_template(folder, reference.chat_template or "")
    notes.append(f"the chat template is that of {reference.template_file}, with which it was trained")
    return Tokenizer.load(folder)


def _same(found: Tokenizer, reference: Tokenizer) -> bool:
    """Whether both have the same prefix, and cut the probes and a text of added tokens alike."""
    texts = [*PROBES, "a".join(sorted(reference.added_tokens)[:64])]
    pairs = zip(found.encode(texts), reference.encode(texts), strict=True)
    return found.prefix_ids == reference.prefix_ids and all(a.ids.tolist() == b.ids.tolist() for a, b in pairs)


def _config(folder: Path, architecture: Architecture) -> dict[str, Any]:
    """config.json, after a check that transformers can load it and the generation settings.

    A configuration that takes code of the folder is not loaded: fusemega runs none.
    """
    from transformers import AutoConfig, GenerationConfig

    for name, kind in (("config.json", AutoConfig), (GENERATION, GenerationConfig)):
        try:
            if (folder / name).is_file() and not (kind is AutoConfig and architecture.family.auto_map):
                kind.from_pretrained(folder)
        except Exception as error:  # noqa: BLE001  (transformers raises anything)
            raise UserError(f"{folder / name}: transformers cannot load it: {first_line(error)}") from None
    return read_json(folder / "config.json")


def _pads(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Makes the tokenizer pad with the id that a reward model's configuration takes for padding, if it has none."""
    wanted, found = config.get("pad_token_id"), tokenizer.hf.pad_token_id
    if wanted is None or found == wanted or not 0 <= wanted < tokenizer.num_ids:
        return []
    if found is not None:
        return [
            f"the tokenizer pads with {tokenizer.token(found)!r} ({found}), and config.json takes id {wanted} for "
            "padding: transformers scores texts of a padded batch at the wrong token"
        ]
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    settings["pad_token"] = tokenizer.token(wanted)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [f"the tokenizer had no padding token: it is {settings['pad_token']!r} ({wanted}), as in config.json"]


def _stop_at(folder: Path, config: dict[str, Any], wanted: list[int], tokenizer: Tokenizer) -> list[str]:
    """Adds the ids `wanted` to those at which generation stops; returns a note if there were any to add."""
    found = stop_ids(folder)
    missing = [i for i in dict.fromkeys(wanted) if i not in found]
    if not missing:
        return []
    eos = [*found, *missing]
    path = folder / GENERATION
    kept = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    settings = read_json(path) if path.is_file() else kept
    for file, content in ((path, settings), (folder / "config.json", config)):
        content = content | {"eos_token_id": eos if len(eos) > 1 else eos[0]}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    names = ", ".join(f"{tokenizer.token(i)!r} ({i})" for i in missing)
    return [f"{names} ends a turn: added to eos_token_id in {GENERATION} and config.json, which had {found or 'none'}"]
