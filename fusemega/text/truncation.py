"""A group's samples, of which a part is kept where the group is too long for a row, or a response for its limit.

    keep_start    the end of the longest responses is cut
    keep_end      the beginning of the prompt is cut, by as many tokens for each response, so that it stays one prompt
    drop          the group is left out

Shape suffixes: S responses of a group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from fusemega.text.chat import Rendered
from fusemega.text.conversation import Dropped
from fusemega.text.data import DataConfig, Truncation
from fusemega.text.fields import BadRow
from fusemega.text.packing import shared_beginning
from fusemega.text.sample import Annotated, Sample, part


def kept_parts(
    lengths_S: Sequence[int],
    first_S: Sequence[int],
    seq_length: int,
    max_length: int | None,
    truncation: Truncation,
    shared: int = 0,
) -> list[tuple[int, int]] | None:
    """[begin, end) of the tokens to keep of each response with its prompt; None: the group is to be left out.

    Example:
        >>> kept_parts([5, 20, 30], [4, 4, 4], 45, None, "keep_start")  # as few tokens as possible are cut
        [(0, 5), (0, 20), (0, 20)]
        >>> kept_parts([5, 20], [4, 4], 45, 18, "keep_end")
        [(2, 5), (2, 20)]
        >>> kept_parts([5, 20, 30], [4, 4, 4], 47, None, "keep_start", shared=4)  # the prompt is in the row once
        [(0, 5), (0, 20), (0, 30)]

    Args:
        lengths_S: tokens of each response with its prompt.
        first_S: the first token of each that is trained on.
        seq_length: tokens of a row, which the group fits in afterwards.
        max_length: most tokens of one response with its prompt; None: only the row limits it.
        shared: tokens of the prompt that lie in the row once.

    Raises:
        BadRow: the prompt would leave a response no token, or the responses leave the prompt none.
    """
    most = max(lengths_S) if max_length is None else max_length
    count = len(lengths_S)
    own_S = [length - shared for length in lengths_S]
    over = sum(own_S) + shared - seq_length
    if over <= 0 and max(lengths_S) <= most:
        return [(0, length) for length in lengths_S]
    if truncation == "drop":
        return None
    if truncation == "keep_end":
        # What is shared is cut once, what is not for each response.
        cut = max(max(lengths_S) - most, over if over <= shared else shared - (shared - over) // count)
        if cut >= min(first_S):
            raise BadRow(
                "responses over the limit",
                f"its {count} responses have {sum(lengths_S)} tokens, each with the prompt, the longest "
                f"{max(lengths_S)}: {cut} would have to be cut from a prompt of {min(first_S)} "
                f"({_limits(seq_length, max_length)})",
            )
        return [(cut, length) for length in lengths_S]
    limit = shared + _level(own_S, seq_length - shared, most - shared)
    if limit <= max(first_S):
        raise BadRow(
            "prompt over the limit",
            f"its prompt has {max(first_S)} tokens, and of each of its {count} responses with the prompt "
            f"{max(limit, 0)} would be kept ({_limits(seq_length, max_length)})",
        )
    return [(0, min(length, limit)) for length in lengths_S]


def group_samples(
    documents: Sequence[Annotated],
    parts: Sequence[tuple[bytes, Rendered]],
    config: DataConfig,
    source: str,
    share_prefix: bool = False,
) -> tuple[list[Sample], int]:
    """A sample for each response of a group, and how many tokens were left out.

    Args:
        documents: the tokens of each response with its prompt.
        parts: the canonical form of each, and its rendering.
        config: says how long the samples may be.
        source: "file:row".
        share_prefix: the prompt lies in the row once.

    Raises:
        Dropped: too long, and `data.truncation` says to drop such a row.
        BadRow: as `kept_parts`; the template writes the prompt differently for two responses; a response has no token
            to train on.
    """
    _check_prompts([rendered for _, rendered in parts])
    if not all(document.supervised.any() for document in documents):
        raise BadRow("no target", "a response of the group has no token to train on")
    lengths = [len(document.ids) for document in documents]
    first = [int(document.supervised.argmax()) for document in documents]
    shared = min(*first, shared_beginning([document.ids for document in documents])) if share_prefix else 0
    kept = kept_parts(lengths, first, config.seq_length, config.max_length, config.truncation, shared)
    if kept is None:
        raise Dropped("longer than a row, or than data.max_length", "data.truncation: drop leaves the row out")
    each = zip(documents, parts, kept, strict=True)
    samples = [part(document, identity, begin, end, source) for document, (identity, _), (begin, end) in each]
    return samples, sum(lengths) - sum(end - begin for begin, end in kept)


def _check_prompts(rendered: Sequence[Rendered]) -> None:
    """Refuses responses before which the template writes different texts."""
    texts = []
    for each in rendered:
        begins = [span.supervised[0] for span in each.spans if span.supervised] + [turn.start for turn in each.turns]
        texts.append(each.text[: min(begins)])
    for i, text in enumerate(texts):
        if text != texts[0]:
            at = len(os.path.commonprefix([text, texts[0]]))
            raise BadRow(
                "prompts differ",
                f"the chat template writes the prompt differently before the responses 0 and {i}, from character {at} "
                f"on: {texts[0][at : at + 40]!r} and {text[at : at + 40]!r}",
            )


def _level(lengths_S: Sequence[int], seq_length: int, most: int) -> int:
    """The largest number up to `most` to which lengths can be cut so that their sum is at most `seq_length`."""
    left, limit = seq_length, most
    for done, length in enumerate(sorted(lengths_S)):
        share = left // (len(lengths_S) - done)  # the shorter ones are whole, and these share what they leave
        if min(length, most) > share:
            return min(share, limit)
        left -= min(length, most)
    return limit


def _limits(seq_length: int, max_length: int | None) -> str:
    each = "" if max_length is None else f", data.max_length {max_length}"
    return f"a group lies in one row: data.seq_length {seq_length}{each}"
