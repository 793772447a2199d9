"""`fusemega transplant`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id of the model to move.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a Hugging Face folder.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id whose tokenizer and chat template the model gets.")],
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map",
            help="Vocabulary map whose source is the new tokenizer and whose target is MODEL's: the old id for"
            " each new id.",
            show_default="an exact map, made for this call",
        ),
    ] = None,
) -> None:
    """Move a model to another tokenizer's vocabulary: new rows in embedding and head, everything else bit for bit.

    A new id gets the row of the old id with the same content; without one, the mean of the old rows of the pieces into
    which the old tokenizer cuts the content; without pieces, or if no text becomes this id, the mean of all old rows.
    Tokens with a role (bos, eos, the token that closes an assistant's turn, pad, unk) get the row of the token with the
    same role. The model needs training afterwards. Prints one JSON object, which is also OUT/transplant.json.
    """
    import json

    from fusemega.align.transplant import transplant
    from fusemega.hf.hub import resolve
    from fusemega.runtime.console import say

    record = transplant(resolve(model), out, resolve(tokenizer), map_file)
    shares = (f"{record[kind] / record['ids']:.1%} {what}" for kind, what in _KINDS.items())
    say(f"{record['ids']} ids: {', '.join(shares)}")
    if record["dropped_settings"]:
        say(f"settings left out, because they are ids of the old vocabulary: {', '.join(record['dropped_settings'])}")
    print(json.dumps({"wrote": str(out)} | record))


_KINDS = {"copied": "copied", "averaged": "averaged over pieces", "mean": "given the mean of all rows"}
