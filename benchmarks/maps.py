"""Time and memory of vocabulary maps at real sizes: Gemma-3 (262,145 ids) onto Qwen2.5 (151,665), exact and MinED.

    python benchmarks/maps.py [--threads 2]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from fusemega.align.make_map import exact_map, mined_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.assets_tokenizers import tokenizer
from fusemega.text.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
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
