"""Time and memory of vocabulary maps at real sizes: Gemma-3 (262,145 ids) onto Qwen2.5 (151,665), exact and MinED.

    python benchmarks/maps.py [--threads 2]
    python benchmarks/maps.py --next 64 [--tokenizers smollm2 mistral_v3]

`--next`: instead, for each pair of tokenizers: at how many of the positions that they share in so many held-out chats
and programs, but for each message's first, a map sends the source's own next token to the target's own next token or to
the cell that it is in, in per cent; and how many cells there are, of several ids, ids in these, ids in the largest.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from fusemega.align.cells import cells_map
from fusemega.align.kinds import KINDS, MapInputs
from fusemega.align.make_map import exact_map, mined_map
from fusemega.align.positions import shared_positions
from fusemega.align.probes import next_tokens, probe_texts
from fusemega.align.vocabulary import Vocabulary
from fusemega.fixtures.data import chat_data, domain_data
from fusemega.fixtures.tokenizers import TOKENIZERS, tokenizer
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.sample import BEGINS, Sample
from fusemega.text.tokenizer import Tokenizer

TEXTS = ("chat", "code")


def right_tokens(limit: int, names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Pair -> kind of map or of number -> text -> share of positions in per cent, or number."""
    tokenizers = {name: Tokenizer.load(tokenizer(name)) for name in names}
    vocabularies = {name: Vocabulary.of(each) for name, each in tokenizers.items()}
    samples = {name: _samples(each, limit) for name, each in tokenizers.items()}
    result: dict[str, dict[str, dict[str, float]]] = {}
    for first, second in combinations(names, 2):
        # Both directions of a pair are made of the same parts.
        found = {}
        for one, other in ((first, second), (second, first)):
            inputs = MapInputs((tokenizers[one], tokenizers[other]), (vocabularies[one], vocabularies[other]))
            found[one] = KINDS["first_piece"].make(inputs)
        written = next_tokens(
            tokenizers[first], tokenizers[second], probe_texts(vocabularies[n] for n in (first, second))
        )
        for source, target, pairs in ((first, second, written), (second, first, written[::-1])):
            cells = cells_map(vocabularies[source], vocabularies[target], found[source], found[target], pairs)
            maps = {"cells": cells, "first_piece": found[source]}
            sizes = {int(size): count for size, count in cells.statistics["cell_sizes"].items()}
            shares: dict[str, dict[str, float]] = {"positions": {}, **{kind: {} for kind in maps}}
            for text in TEXTS:
                next_S, next_T = _shared(samples[source][text], samples[target][text])
                shares["positions"][text] = len(next_T)
                for kind, made in maps.items():
                    cell_T = made.cell_T if len(made.cell_T) else np.arange(made.target_size)
                    right = made.table_S[next_S] == cell_T[next_T]
                    shares[kind][text] = round(100 * float(right.mean()), 2)
            several = {size: count for size, count in sizes.items() if size > 1}
            shares["sizes"] = {"cells": sum(sizes.values()), "several": sum(several.values())}
            shares["sizes"] |= {"ids": sum(n * count for n, count in several.items()), "largest": max(sizes)}
            result[f"{source} onto {target}"] = shares
            print(f"{source + ' onto ' + target:28} {json.dumps(shares)}", flush=True)
    for kind in ("cells", "first_piece"):
        lowest = {text: min(shares[kind][text] for shares in result.values()) for text in TEXTS}
        result[f"lowest, {kind}"] = {"share": lowest}
    return result


def _samples(tokenizer: Tokenizer, limit: int) -> dict[str, dict[bytes, Sample]]:
    found = {}
    for text, files in (("chat", chat_data()), ("code", domain_data("code"))):
        config = DataConfig(path=str(files.held_out), seq_length=8192, limit=limit)
        with tempfile.TemporaryDirectory() as folder:
            found[text] = {sample.key: sample for sample in prepare(config, tokenizer, folder)}
    return found


def _shared(own: dict[bytes, Sample], other: dict[bytes, Sample]) -> tuple[np.ndarray, np.ndarray]:
    """The next tokens of both at the positions that they share, but for each message's first."""
    next_S, next_T = [], []
    for key in sorted(own.keys() & other.keys()):
        a, b = own[key], other[key]
        at, to = shared_positions(a.end_bytes[a.positions], b.end_bytes[b.positions])
        inside = ~b.is_place(BEGINS)[b.positions[to]]
        next_S.append(a.ids[a.positions[at][inside] + 1])
        next_T.append(b.ids[b.positions[to][inside] + 1])
    return np.concatenate(next_S), np.concatenate(next_T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--next", type=int, default=0, metavar="TEXTS")
    parser.add_argument("--tokenizers", nargs="+", default=TOKENIZERS)
    options = parser.parse_args()
    if options.next:
        print(json.dumps(right_tokens(options.next, options.tokenizers)))
        return
    threads = options.threads
    begun = time.perf_counter()
    source, target = (Vocabulary.of(Tokenizer.load(tokenizer(name))) for name in ("gemma3", "qwen2.5"))
    loaded = time.perf_counter()
    exact = exact_map(source, target)
    matched = time.perf_counter()
    mined = mined_map(source, target, threads)
    result = {
        "source_ids": source.size,
        "target_ids": target.size,
        "threads": threads,
        "load_seconds": round(loaded - begun, 2),
        "exact_seconds": round(matched - loaded, 2),
        "mined_seconds": round(time.perf_counter() - matched, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "identical": exact.statistics["identical"],
        "searched": sum(mined.statistics["distances"]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
