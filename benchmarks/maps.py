"""Time and memory of vocabulary maps at real sizes: Gemma-3 (262,145 ids) onto Qwen2.5 (151,665), exact and MinED.

    python benchmarks/maps.py [--threads 2]
    python benchmarks/maps.py --next 64

`--next`: instead, where maps send the next token of held-out chats, so many, at the positions that the two tokenizers
share, but for each message's first: to the target's own next token, to another (to one that is only longer: "longer"),
or to nothing, in per cent.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import Counter

from fusemega.align.make_map import exact_map, first_piece_map, mined_map
from fusemega.align.pieces import before_text, cutter
from fusemega.align.positions import shared_positions
from fusemega.align.vocabulary import Vocabulary
from fusemega.fixtures.data import chat_data
from fusemega.fixtures.tokenizers import tokenizer
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.sample import BEGINS
from fusemega.text.tokenizer import Tokenizer


def next_tokens(chats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Pair -> kind -> share of positions, in per cent."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for names in (("smollm2", "mistral_v3"), ("qwen2.5", "smollm2"), ("mistral_v3", "smollm2")):
        (theirs, source), (ours, target) = ((t, Vocabulary.of(t)) for t in map(Tokenizer.load, map(tokenizer, names)))
        config = DataConfig(path=str(chat_data().held_out), seq_length=8192, limit=chats)
        with tempfile.TemporaryDirectory() as folder:
            own, other = ({s.key: s for s in prepare(config, t, folder)} for t in (theirs, ours))
            next_S, next_T = [], []
            for key in own.keys() & other.keys():
                a, b = own[key], other[key]
                at, to = shared_positions(a.end_bytes[a.positions], b.end_bytes[b.positions])
                inside = ~b.is_place(BEGINS)[b.positions[to]]
                next_S += a.ids[a.positions[at][inside] + 1].tolist()
                next_T += b.ids[b.positions[to][inside] + 1].tolist()
        cut = cutter(ours, target)
        maps = {
            "first_piece": first_piece_map(source, target, cut, before_text(theirs, ours, source.contents)),
            "first_piece, alone": first_piece_map(source, target, cut),
            "exact": exact_map(source, target),
        }
        shares: dict[str, dict[str, float]] = {}
        for kind, made in maps.items():
            said = [int(made.table_S[s]) for s in next_S]
            pairs = zip(said, next_T, next_S, strict=True)
            counts = Counter(_verdict(u, t, source.contents[s], target) for u, t, s in pairs)
            shares[kind] = {name: round(100 * count / len(next_T), 2) for name, count in sorted(counts.items())}
        result[f"{names[0]} onto {names[1]}, {len(next_T)} positions"] = shares
    return result


def _verdict(said: int, label: int, content: bytes | None, target: Vocabulary) -> str:
    if said == label:
        return "right"
    longer = content is not None and (target.contents[label] or b"").startswith(content)
    return "nothing" if said < 0 else "longer" if longer else "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--next", type=int, default=0, metavar="CHATS")
    options = parser.parse_args()
    if options.next:
        print(json.dumps(next_tokens(options.next)))
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
