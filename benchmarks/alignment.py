"""Alignment by bytes against the published one: parity of the latter, where the two differ and which is right, speed.

    python benchmarks/alignment.py [--texts 210] [--dialogues 3]

1. Parity: paths, and rows projected by EM, MinED and MS, equal to the slow form in tests/align/published.py, which is
   written from the description of the methods, on real texts and pairs of real tokenizers.
2. Agreement: from which position of the source a position of the target learns, by bytes and by dynamic time warping
   with the rules of MS, both models under one template as FuseChat has it. Where they differ, the text that both have
   read, spelt out from the bytes of their tokens, says which is right.
3. Speed on 2,048-token dialogues, one thread: the published form (a NumPy matrix filled cell by cell, without its way
   back and without projection), the slow form of the tests (lists) with projection, both with edit distances by a
   compiled package; the same path and rows by fusemega; offsets with projection, and these with both tokenizations.

Prints as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402  (after the number of threads is known)
from rapidfuzz.distance import Levenshtein  # noqa: E402

from fusemega.align.dtw import Strings, decoded_strings, dtw_reference  # noqa: E402
from fusemega.align.positions import shared_positions  # noqa: E402
from fusemega.align.projection import project  # noqa: E402
from fusemega.align.reference_rows import Aligner, reference_row  # noqa: E402
from fusemega.align.vocabulary import Vocabulary  # noqa: E402
from fusemega.fixtures.data import chat_data, chinese_data, domain_data  # noqa: E402
from fusemega.fixtures.tokenizers import tokenizer  # noqa: E402
from fusemega.store import Row  # noqa: E402
from fusemega.text.chat import ChatRenderer, render_text  # noqa: E402
from fusemega.text.document import Text, parse  # noqa: E402
from fusemega.text.sample import Sample, annotate  # noqa: E402
from fusemega.text.tokenizer import Tokenizer  # noqa: E402
from tests.align.published import Published, aligned  # noqa: E402

PAIRS = [("llama3", "mistral_v3"), ("qwen2.5", "llama2"), ("llama2", "smollm2"), ("gemma3", "gpt2")]
KINDS = ("exact", "mined", "ms")
K = 10
# OpenChat's, as in FuseChat, with each tokenizer's own end of turn.
TEMPLATE = (
    "{% for m in messages %}{{ 'GPT4 Correct ' + ('User' if m.role == 'user' else 'Assistant') + ': ' + m.content "
    "+ eos_token }}{% endfor %}"
)
EMOJI = "Great news 🎉🎉 the café ☕️ opens at 9 ⏰ — bring 👨‍👩‍👧‍👦, 🐶 & 3 × 🍕! 👍🏽 naïve façade, ¿qué? 你好👋 "


def conversations(count: int) -> list[tuple[str, dict[str, Any]]]:
    """(kind, row): English, code, Chinese, emoji between real words, and several turns."""

    def lines(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    chats = [[m["content"].strip() for m in row["messages"]] for row in lines(chat_data().train)]
    chats = [contents for contents in chats if all(contents)]
    code = [row["text"].strip() for row in lines(domain_data("code").train)]
    chinese = [row["text"].strip() for row in lines(chinese_data().train)]
    share = count // 5

    def cut(*contents: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": c[:1000].strip()} for n, c in enumerate(contents)]}

    def with_emoji(text: str, n: int) -> str:
        words = text[:600].split(" ")
        marks = EMOJI.split(" ")
        return " ".join(
            w for i, word in enumerate(words) for w in ((word, marks[(i + n) % len(marks)])[: 1 + (i % 4 == 0)])
        )

    rows = [("english", cut(*contents)) for contents in chats[:share]]
    rows += [("code", cut("Complete this.", text)) for text in code[:share]]
    rows += [("chinese", cut("写作", text)) for text in chinese[:share]]
    rows += [("emoji", cut(user, with_emoji(answer, n))) for n, (user, answer) in enumerate(chats[share : 2 * share])]
    several = iter(chats[2 * share :])
    for _ in range(count - 4 * share):
        turns = [text[:300] for _ in range(3) for text in next(several)]
        rows.append(("multi-turn", cut(*turns)))
    return rows


class Side:
    """One tokenizer under the common template."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer = Tokenizer.load(tokenizer(name))
        self.tokenizer.hf.chat_template = TEMPLATE
        self.vocabulary = Vocabulary.of(self.tokenizer)
        self.renderer = ChatRenderer(self.tokenizer)
        self.strings: Strings = decoded_strings(self.tokenizer, self.vocabulary.marker)

    def sample(self, row: dict[str, Any]) -> Sample:
        document = parse(row)
        rendered = render_text(document) if isinstance(document, Text) else self.renderer.render(document)
        (encoding,) = self.tokenizer.encode([rendered.text])
        got = annotate(rendered, encoding, self.tokenizer)
        return Sample(b"", got.ids, got.supervised, got.end_bytes, int(got.target_bytes.sum()), "benchmark")


def random_row(rng: np.random.Generator, sample: Sample, size: int) -> Row:
    """A row of the shape that a teacher gives: the next token among nine of the text's own and the vocabulary's."""
    positions = sample.positions
    own = np.unique(sample.ids)
    ids_PK = np.empty((len(positions), K), dtype=np.int32)
    for p, t in enumerate(positions):
        some = np.concatenate([[sample.ids[t + 1]], rng.permutation(own)[:4], rng.integers(0, size, 12)])
        ids_PK[p] = list(dict.fromkeys(some.tolist()))[:K]
    logits_PK = -np.sort(rng.exponential(3.0, (len(positions), K)), axis=1)
    total_P = np.log(np.exp(logits_PK).sum(axis=1) + 0.05)
    logp_PK = (logits_PK - total_P[:, None]).astype(np.float32)
    ends_P = sample.end_bytes[positions]
    return Row(sample.ids_hash, ends_P, ids_PK, logp_PK, (np.log(0.05) - total_P).astype(np.float32), -1.0, 1)


class Pair:
    """A source and a target with one map, as the package has it and as the slow form has it."""

    def __init__(self, source: Side, target: Side, kind: str) -> None:
        self.source, self.target, self.kind = source, target, kind
        ids = {form: i for i, form in enumerate(target.vocabulary.forms) if form}
        by_bytes = {raw: i for i, raw in enumerate(target.vocabulary.contents) if raw}
        # Any map will do for parity; half of what has no equal goes somewhere.
        rng = np.random.default_rng(0)
        somewhere = rng.integers(-target.vocabulary.size, target.vocabulary.size, source.vocabulary.size).clip(-1)
        equal = np.array([by_bytes.get(raw, -1) if raw else -1 for raw in source.vocabulary.contents])
        self.table = np.where(equal >= 0, equal, somewhere if kind != "exact" else -1).astype(np.int32)
        self.aligner = Aligner.of(
            source.vocabulary,
            source.strings,
            target.vocabulary,
            target.strings,
            SimpleNamespace(kind=kind, table_S=self.table),  # type: ignore[arg-type]
        )
        marks = source.vocabulary.marker, target.vocabulary.marker
        mapped = {u: int(p) for u, p in enumerate(self.table) if p >= 0}
        self.published = Published(kind, *marks, source.vocabulary.forms, ids, mapped)

    def slow_steps(self, source: Sample, target: Sample) -> list[list[int]]:
        texts = [[s.strings.of_id[i] for i in x.ids] for s, x in ((self.source, source), (self.target, target))]
        return aligned(*texts, self.published.source_mark, self.published.target_mark, Levenshtein.distance)

    def slow_rows(self, source: Sample, target: Sample, row: Row, steps: list[list[int]]) -> list[Any]:
        tokens = [
            [(int(i), s.strings.of_id[i]) for i in x.ids] for s, x in ((self.source, source), (self.target, target))
        ]
        rows = {int(t): (row.ids_PK[p].tolist(), row.logp_PK[p].tolist()) for p, t in enumerate(source.positions)}
        return self.published.project(*tokens, rows, steps, target.positions.tolist())


def same_rows(got: Row, expected: Sequence[Any], own: Row) -> bool:
    for p, distribution in enumerate(expected):
        if distribution == "nothing":
            weights = np.exp(own.logp_PK[p].astype(np.float64))
            distribution = dict(zip(own.ids_PK[p].tolist(), (weights / weights.sum()).tolist(), strict=True))
        found = {int(i): float(np.exp(v)) for i, v in zip(got.ids_PK[p], got.logp_PK[p], strict=True) if v > -np.inf}
        if found.keys() != distribution.keys():
            return False
        if any(abs(found[i] - value) > 1e-5 for i, value in distribution.items()):
            return False
    return True


def parity(sides: dict[str, Side], rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Each text under one of the pairs of tokenizers, all kinds of map."""
    rng = np.random.default_rng(1)
    paths, same, positions = 0, Counter[str](), Counter[str]()
    pairs = [[Pair(sides[a], sides[b], kind) for kind in KINDS] for a, b in PAIRS]
    for n, (_, text) in enumerate(rows):
        by_kind = pairs[n % len(pairs)]
        source, target = by_kind[0].source.sample(text), by_kind[0].target.sample(text)
        row = random_row(rng, source, by_kind[0].source.vocabulary.size)
        own = random_row(rng, target, by_kind[0].target.vocabulary.size)
        steps = by_kind[0].slow_steps(source, target)
        first, last = dtw_reference(source.ids, target.ids, by_kind[0].source.strings, by_kind[0].target.strings)
        paths += [list(range(a, b + 1)) for a, b in zip(first.tolist(), last.tolist(), strict=True)] == steps
        for pair in by_kind:
            got, kinds = reference_row(pair.aligner, source, target, row, own)
            same[pair.kind] += same_rows(got, pair.slow_rows(source, target, row, steps), own)
            positions.update({f"{pair.kind}, {name}": count for name, count in kinds.items()})
    return {"texts": len(rows), "paths_identical": paths, "rows_identical": dict(same), "positions": dict(positions)}


def text_read(sample: Sample, vocabulary: Vocabulary) -> list[bytes]:
    """For every token all bytes up to its end, spelt out from the tokens alone. Special tokens stand for one byte that
    no text has; SentencePiece's own spaces, at the beginning and after special tokens, are left out."""
    read, found = b"", []
    for i in sample.ids.tolist():
        raw = vocabulary.contents[i]
        read += b"\xff" if raw is None else raw
        found.append(read.lstrip(b" \xff").replace(b"\xff ", b"\xff"))
    return found


def agreement(sides: dict[str, Side], rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Which source position each target position learns from."""
    kinds: dict[str, Counter[str]] = {}
    for a, b in PAIRS:
        pair = Pair(sides[a], sides[b], "ms")
        for kind, text in rows:
            source, target = pair.source.sample(text), pair.target.sample(text)
            by_dtw = pair.aligner.steps(source.ids, target.ids)[target.positions]
            by_bytes = np.full(len(target.positions), -1)
            in_source, in_target = shared_positions(
                source.end_bytes[source.positions], target.end_bytes[target.positions]
            )
            by_bytes[in_target] = source.positions[in_source]
            theirs, ours = text_read(source, pair.source.vocabulary), text_read(target, pair.target.vocabulary)
            counts = kinds.setdefault(kind, Counter())
            for t, j, k in zip(target.positions.tolist(), by_dtw.tolist(), by_bytes.tolist(), strict=True):
                counts[_verdict(t, j, k, theirs, ours)] += 1
    total: Counter[str] = sum(kinds.values(), Counter())
    positions = sum(total.values())
    shares = {name: round(count / positions, 5) for name, count in total.most_common()}
    by_kind = {
        kind: round((counts["same position"] + counts["neither"]) / sum(counts.values()), 4)
        for kind, counts in kinds.items()
    }
    agree = (total["same position"] + total["neither"]) / positions
    return {"positions": positions, "agree": round(agree, 4), "agree_by_text": by_kind, "shares": shares}


def _same(theirs: bytes, ours: bytes) -> bool:
    """The template's space before an answer is a token of its own only where the answer's first token has none."""
    begun = [read.removesuffix(b" ") for read in (theirs, ours)]
    return theirs == ours or (begun[0] == begun[1] and begun[0].endswith(b"Assistant:"))


def _verdict(t: int, by_dtw: int, by_bytes: int, theirs: list[bytes], ours: list[bytes]) -> str:
    if by_dtw == by_bytes:
        return "neither" if by_dtw < 0 else "same position"
    right = [j >= 0 and _same(theirs[j], ours[t]) for j in (by_dtw, by_bytes)]
    judged = {(True, False): "DTW right", (False, True): "bytes right"}.get((right[0], right[1]), "")
    if by_dtw < 0:
        return f"DTW takes the label, bytes a position: {judged or 'bytes wrong'}"
    if by_bytes < 0:
        return f"DTW takes a position, bytes none: {'DTW right' if right[0] else 'bytes right'}"
    return f"two positions: {judged or ('both right' if all(right) else 'both wrong')}"


def published_table(source: Sequence[str], target: Sequence[str], source_mark: str, target_mark: str) -> np.ndarray:
    """The cumulated costs as the published code fills them: a NumPy matrix, cell by cell. `aligned`, which takes lists,
    is about twice as fast."""

    def cost(a: str, b: str) -> int:
        bare_a, bare_b = a.replace(source_mark, ""), b.replace(target_mark, "")
        if bare_a == "" or bare_b == "":
            return Levenshtein.distance(a.replace(source_mark, target_mark), b)
        return Levenshtein.distance(bare_a, bare_b)

    total = np.zeros((len(source) + 1, len(target) + 1))
    total[0, :] = total[:, 0] = np.inf
    total[0, 0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            total[i + 1, j + 1] = cost(a, b) + min(total[i, j + 1], total[i + 1, j], total[i, j])
    return total


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median of several runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def long_dialogues(pair: Pair, count: int, tokens: int = 2048) -> Iterator[dict[str, Any]]:
    """Real turns, as many as make at least `tokens` tokens of both tokenizers, the last one cut short."""
    rng = random.Random(0)
    rows = [json.loads(line)["messages"] for line in chat_data().train.read_text(encoding="utf-8").splitlines()]

    def length(messages: list[dict[str, str]]) -> int:
        return min(len(side.sample({"messages": messages}).ids) for side in (pair.source, pair.target))

    for _ in range(count):
        messages: list[dict[str, str]] = []
        while not messages or length(messages) < tokens:
            messages += [{**m, "content": m["content"].strip()} for m in rng.choice(rows)]
        last = messages[-1]
        while length([*messages[:-1], shorter := {**last, "content": last["content"][:-40]}]) >= tokens:
            last = shorter
        yield {"messages": [*messages[:-1], last]}


def head(sample: Sample, tokens: int) -> Sample:
    return Sample(b"", sample.ids[:tokens], sample.supervised[:tokens], sample.end_bytes[:tokens], 0, sample.source)


def speed(pair: Pair, count: int) -> dict[str, Any]:
    """Median seconds a dialogue of 2,048 tokens on either side, and how many times faster than the slow forms."""
    rng = np.random.default_rng(2)
    results: dict[str, list[float]] = {}
    table = pair.table
    for text in long_dialogues(pair, count):
        source, target = head(pair.source.sample(text), 2048), head(pair.target.sample(text), 2048)
        row = random_row(rng, source, pair.source.vocabulary.size)
        own = random_row(rng, target, pair.target.vocabulary.size)

        def offsets(source: Sample = source, target: Sample = target, row: Row = row) -> None:
            in_source, _ = shared_positions(row.end_bytes, target.end_bytes[target.positions])
            project(row.ids_PK[in_source], row.logp_PK[in_source], row.log_residual_P[in_source], table)

        def tokenized(text: dict[str, Any] = text) -> None:
            pair.source.sample(text)
            pair.target.sample(text)

        def slow(source: Sample = source, target: Sample = target, row: Row = row) -> None:
            pair.slow_rows(source, target, row, pair.slow_steps(source, target))

        def published(source: Sample = source, target: Sample = target) -> None:
            theirs, ours = pair.source.strings, pair.target.strings
            published_table(
                [theirs.of_id[i] for i in source.ids], [ours.of_id[i] for i in target.ids], theirs.marker, ours.marker
            )

        def dtw(source: Sample = source, target: Sample = target, row: Row = row, own: Row = own) -> None:
            reference_row(pair.aligner, source, target, row, own)

        dtw()  # compiles
        taken = {
            "published form": seconds(published, 1),
            "slow form": seconds(slow, 1),
            "dtw_reference and rows": seconds(dtw, 9),
            "offsets and projection": seconds(offsets, 51),
            "both tokenizations": seconds(tokenized, 9),
        }
        taken["offsets, projection, both tokenizations"] = taken["offsets and projection"] + taken["both tokenizations"]
        for name, value in taken.items():
            results.setdefault(name, []).append(value)
    middle = {name: sorted(values)[len(values) // 2] for name, values in results.items()}
    return {
        "pair": [pair.source.name, pair.target.name],
        "dialogues": count,
        "seconds": {name: round(value, 6) for name, value in middle.items()},
        "times_faster_than_published_form": {n: round(middle["published form"] / v, 1) for n, v in middle.items()},
        "times_faster_than_slow_form": {n: round(middle["slow form"] / v, 1) for n, v in middle.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=210)
    parser.add_argument("--dialogues", type=int, default=3)
    options = parser.parse_args()
    sides = {name: Side(name) for name in dict.fromkeys(name for pair in PAIRS for name in pair)}
    rows = conversations(options.texts)
    result: dict[str, Any] = {"benchmark": "alignment"}
    result["speed"] = speed(Pair(sides["llama3"], sides["mistral_v3"], "ms"), options.dialogues)
    print(json.dumps(result["speed"], indent=1))
    result["agreement"] = agreement(sides, rows)
    print(json.dumps(result["agreement"], indent=1))
    result["parity"] = parity(sides, rows)
    print(json.dumps(result["parity"], indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
