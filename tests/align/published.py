"""The published alignment and projection, written from their description: lists, loops, one token at a time.

Nothing here is shared with the package. `benchmarks/alignment.py` takes its time as that of the published form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

Distance = Callable[[str, str], int]


@cache
def levenshtein(a: str, b: str) -> int:
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def aligned(
    source: Sequence[str],
    target: Sequence[str],
    source_mark: str,
    target_mark: str,
    distance: Distance = levenshtein,
    fusellm: bool = False,
) -> list[list[int]]:
    """The source steps of each target position."""

    def cost(a: str, b: str) -> int:
        bare_a = a.replace(source_mark, "") if source_mark else a
        bare_b = b.replace(target_mark, "") if target_mark else b
        if not fusellm and (bare_a == "" or bare_b == ""):
            return distance(a.replace(source_mark, target_mark) if source_mark else a, b)
        return distance(bare_a, bare_b)

    infinity = math.inf
    total = [[infinity] * (len(target) + 1) for _ in range(len(source) + 1)]
    total[0][0] = 0
    for i, a in enumerate(source):
        above, here = total[i], total[i + 1]
        for j, b in enumerate(target):
            here[j + 1] = cost(a, b) + min(above[j + 1], here[j], above[j])
    steps: list[list[int]] = [[] for _ in target]
    i, j = len(source), len(target)
    while True:
        steps[j - 1].append(i - 1)
        if (i, j) == (1, 1):
            break
        diagonal, target_back, source_back = total[i - 1][j - 1], total[i][j - 1], total[i - 1][j]
        if diagonal <= target_back and diagonal <= source_back:
            i, j = i - 1, j - 1
        elif target_back < source_back or (target_back == source_back and not fusellm):
            j -= 1
        else:
            i -= 1
    return [sorted(found) for found in steps]


class Published:
    """Rows onto positions.

    Args:
        kind: "exact" (EM), "mined" (MinED) or "ms" (MS).
        source_strings, target_strings: `decode([id])` of the tokens of one text.
        source_forms: id -> form in the source's vocabulary, for the entries of rows.
        target_vocabulary: form -> id.
        mapped: id -> where the map takes it, absent for nowhere.
        fusellm: FuseLLM's label instead of FuseChat's.
    """

    def __init__(
        self,
        kind: str,
        source_mark: str,
        target_mark: str,
        source_forms: Sequence[str],
        target_vocabulary: dict[str, int],
        mapped: dict[int, int],
        fusellm: bool = False,
    ) -> None:
        self.fusellm = fusellm
        self.kind, self.source_mark, self.target_mark = kind, source_mark, target_mark
        self.source_forms, self.target_vocabulary, self.mapped = source_forms, target_vocabulary, mapped

    def remark(self, text: str) -> str:
        return text.replace(self.source_mark, self.target_mark) if self.source_mark else text

    def row(self, ids: Sequence[int], logits: Sequence[float]) -> list[tuple[int, float]]:
        found: list[tuple[int, float]] = []
        for logit, entry in sorted(zip(logits, ids, strict=True), key=lambda pair: -pair[0]):
            form = self.remark(self.source_forms[entry])
            if form in self.target_vocabulary:
                place = self.target_vocabulary[form]
            elif self.kind != "exact" and entry in self.mapped:
                place = self.mapped[entry]
            else:
                continue
            if place not in [known for known, _ in found]:
                found.append((place, logit))
        return found

    def source_of(self, steps: list[int], string: str, position_id: int, source: list[tuple[int, str]]) -> int | str:
        """The step whose row counts, or "label", or "nothing"."""
        texts = [self.remark(source[j][1]) for j in steps]
        if len(steps) == 1:
            (j,), (text,) = steps, texts
            if self.kind == "ms":
                return j if text.endswith(string) or string.endswith(text) else "label"
            same = text == string or (self.kind == "mined" and self.mapped.get(source[j][0]) == position_id)
            return j if same else "label"
        if self.kind != "ms":
            return "label"
        for j, text in zip(steps, texts, strict=True):
            if text.endswith(string) or string.endswith(text):
                return j
        rest, last = string, -1
        for j, text in zip(steps, texts, strict=True):
            if rest and rest.startswith(text):
                rest, last = rest[len(text) :], j
            else:
                break
        if last >= 0 and not rest:
            return last
        joined = "".join(texts)
        if joined.endswith(string) or string.endswith(joined):
            return "nothing"
        return "label"

    def project(
        self,
        source: list[tuple[int, str]],
        target: list[tuple[int, str]],
        rows: dict[int, tuple[list[int], list[float]]],
        steps: list[list[int]],
        wanted: Sequence[int],
    ) -> list[dict[int, float] | str]:
        """For each wanted target position its distribution, or "nothing" where the target's own stands.

        Args:
            source, target: (id, string) of each token.
            rows: source step -> ids and logits.
        """
        out: list[dict[int, float] | str] = []
        for i in wanted:
            label = target[i + 1][0] if i + 1 < len(target) and not self.fusellm else target[i][0]
            choice = self.source_of(steps[i], target[i][1], target[i][0], source)
            if choice == "label":
                out.append({label: 1.0})
                continue
            entries = self.row(*rows[choice]) if choice in rows else []  # type: ignore[index]
            if not entries:
                out.append("nothing")
                continue
            largest = max(logit for _, logit in entries)
            total = sum(math.exp(logit - largest) for _, logit in entries)
            out.append({place: math.exp(logit - largest) / total for place, logit in entries})
        return out
