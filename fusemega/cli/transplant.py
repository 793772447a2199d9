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
            help="Vocabulary map with the new tokenizer as its source and MODEL's as its target: which old id stands "
            "for each new one.",
            show_default="the exact one, made on the spot",
        ),
    ] = None,
) -> None:
    """Move a model onto another tokenizer's vocabulary: new rows for its embedding and head, all else bit for bit.

    A new id takes the old row of the id with the same content; without one, the mean of the old rows of the pieces
    that the old tokenizer cuts its content into; without pieces, or where no text becomes it, the mean of all old
    rows. Tokens of a role (bos, eos, the one that closes an assistant's turn, pad, unk) take their counterpart's row.
    The model needs training afterwards. Prints one JSON object, which is transplant.json in OUT too.
    """
    import json

    from fusemega.align.transplant import transplant
    from fusemega.hf.hub import resolve
    from fusemega.runtime.console import say

    record = transplant(resolve(model), out, resolve(tokenizer), map_file)
    shares = (f"{record[kind] / record['ids']:.1%} {what}" for kind, what in _KINDS.items())
    say(f"{record['ids']} ids: {', '.join(shares)}")
    if record["dropped_settings"]:
        say(f"left out, as ids of the old vocabulary: {', '.join(record['dropped_settings'])}")
    print(json.dumps({"wrote": str(out)} | record))


_KINDS = {"copied": "copied", "averaged": "averaged over pieces", "mean": "given the mean of all rows"}
