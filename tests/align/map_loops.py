"""Vocabulary maps, written from their description with plain loops. Nothing here is shared with the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusemega.align.vocabulary import Vocabulary
from tests.align.published import levenshtein


def vocabulary(contents: Sequence[bytes | None], **facts) -> Vocabulary:
    """A made-up vocabulary; forms as SentencePiece writes them unless given."""
    forms = tuple(
        f"<{i}>" if c is None else c.decode("utf-8", "replace").replace(" ", "▁") for i, c in enumerate(contents)
    )
    plain = {"content_hash": "made up", "source": "made up", "forms": forms, "contents": tuple(contents)}
    plain |= {"byte_tokens": frozenset(), "marker": "▁", "marks_start": False, "marks_text": False}
    plain |= {"bos_id": None, "eos_id": None, "unk_id": None, "closing_id": None}
    return Vocabulary(**{**plain, **facts})


def text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def roles(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    found = {}
    for name in ("bos_id", "eos_id", "closing_id"):
        if getattr(source, name) is not None and getattr(target, name) is not None:
            found[getattr(source, name)] = getattr(target, name)
    return found


def same_bytes(content: bytes, target: Vocabulary) -> int:
    """The first token of these bytes, a byte token only if there is no other."""
    hits = [i for i in range(target.size) if target.contents[i] == content]
    usual = [i for i in hits if i not in target.byte_tokens]
    return (usual or hits or [-1])[0]


def first_piece(u: int, cut, source: Vocabulary, target: Vocabulary) -> int:
    content = source.contents[u]
    if content is None or u in roles(source, target):
        return roles(source, target).get(u, -1)
    if same_bytes(content, target) >= 0:
        return same_bytes(content, target)
    for piece in cut(content)[:1]:
        whole = target.contents[piece]
        if content[: len(whole)] == whole:
            return piece
    return -1


def cells(
    source: Vocabulary, target: Vocabulary, cuts: tuple, written: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """(representative of each source token's cell, that of each target token), by walking edges from each target token.

    `cuts`: what cuts a content into the target's pieces, and into the source's.
    """
    alone = {target.bos_id, target.eos_id, target.closing_id}
    alone |= {v for v, c in enumerate(target.contents) if c is not None and same_bytes(c, target) != v}
    edges = set(written)
    for u in range(source.size):
        if u not in roles(source, target) and source.contents[u] is not None:
            edges.add((u, same_bytes(source.contents[u], target)))
            edges.add((u, first_piece(u, cuts[0], source, target)))
    for v in range(target.size):
        if v not in roles(target, source) and target.contents[v] is not None:
            edges.add((first_piece(v, cuts[1], target, source), v))
    edges = {(u, v) for u, v in edges if min(u, v) >= 0 and v not in alone and u not in roles(source, target)}
    of_source, of_target = [-1] * source.size, list(range(target.size))
    for start in range(target.size):
        seen: set[tuple[str, int]] = set()
        waiting = [("target", start)]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [("target", v) for u, v in edges if node == ("source", u)]
                waiting += [("source", u) for u, v in edges if node == ("target", v)]
        ids = sorted((len(target.contents[v] or b""), v) for side, v in seen if side == "target")
        of_target[start] = ids[0][1]
        for side, u in seen:
            if side == "source":
                of_source[u] = ids[0][1]
    for u in range(source.size):
        piece = first_piece(u, cuts[0], source, target)
        if piece in alone:  # it begins with a token that is in no other's cell
            of_source[u] = piece
    return of_source, of_target


def mined(u: int, source: Vocabulary, target: Vocabulary) -> int:
    content = source.contents[u]
    if content is None or u in roles(source, target):
        return roles(source, target).get(u, -1)
    if same_bytes(content, target) >= 0 or u in source.byte_tokens:
        return same_bytes(content, target)
    best, found = math.inf, -1
    for p in range(target.size):
        if target.contents[p] is not None and p not in target.byte_tokens:
            distance = levenshtein(text(content), text(target.contents[p]))
            if distance < best:
                best, found = distance, p
    return found


def most_frequent(u: int, pairs: dict[tuple[int, int], int], source: Vocabulary, target: Vocabulary) -> int:
    """`pairs`: (source id, target id) -> count."""
    content = source.contents[u]
    if content is None or u in roles(source, target):
        return roles(source, target).get(u, -1)
    if same_bytes(content, target) >= 0:
        return same_bytes(content, target)
    candidates = [p for (s, p) in pairs if s == u and target.contents[p] is not None]
    key = {p: (-pairs[u, p], levenshtein(text(content), text(target.contents[p])), p) for p in candidates}
    return min(candidates, key=key.__getitem__, default=-1)


def published(u: int, pairs: dict[tuple[int, int], int], source: Vocabulary, target: Vocabulary) -> int:
    """FuseChat's statistics map, step by step."""
    if u == source.eos_id and target.eos_id is not None:
        return target.eos_id
    if u == source.bos_id and target.bos_id is not None:
        return target.bos_id
    candidates = sorted(p for (s, p) in pairs if s == u)
    if not candidates:
        fallback = target.unk_id if target.unk_id is not None else target.eos_id
        return -1 if fallback is None else fallback
    best, found = math.inf, -1
    for p in candidates:
        a, b = source.forms[u].replace(source.marker, ""), target.forms[p].replace(target.marker, "")
        if a == "" or b == "":
            a, b = source.forms[u].replace(source.marker, target.marker), target.forms[p]
        weight = 0.1 if a in b or b in a else 1.0
        score = 1.0 / (1.0 + math.exp(-pairs[u, p])) * (weight * levenshtein(a, b))
        if score < best:
            best, found = score, p
    return found
