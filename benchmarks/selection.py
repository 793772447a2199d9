"""How long `fusemega select` takes: groups of random words with random rewards are written, then selected from.

    python benchmarks/selection.py FOLDER --prompts 160000 --responses 20

Prints one JSON object: seconds of wall and of processor time, peak memory, bytes read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import time
from pathlib import Path

from fusemega.config import validate
from fusemega.selection.run_file import SelectRun
from fusemega.selection.select import select

WORDS = 5000


def write_groups(path: Path, prompts: int, responses: int, words: int) -> None:
    """Groups of four sources; prompts of 60 words, responses of `words` words, all drawn anew."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]
    # A long text of random words, of which each response is a piece: drawing every word would take most of the time.
    text = " ".join(rng.choices(vocabulary, k=2_000_000))
    size = 6 * words
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(prompts):
            starts = [rng.randrange(len(text) - size) for _ in range(responses)]
            row = {
                "prompt": [{"role": "user", "content": " ".join(rng.choices(vocabulary, k=60))}],
                "responses": [
                    {"text": text[start : start + size], "source": f"source{i % 4}", "sample": i // 4, "tokens": words}
                    for i, start in enumerate(starts)
                ],
                "rewards": [round(rng.random() * 0.1, 6) for _ in range(responses)],
                "domain": "instruction",
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=160_000)
    parser.add_argument("--responses", type=int, default=20)
    parser.add_argument("--words", type=int, default=90, help="of a response")
    parser.add_argument("--dedup", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    groups = args.folder / f"groups-{args.prompts}-{args.responses}-{args.words}.jsonl"
    if not groups.exists():
        write_groups(groups, args.prompts, args.responses, args.words)
    settings = {"data": str(groups), "output_dir": str(args.folder / f"out-{os.getpid()}"), "protocol": "fusechat3"}
    run = validate(SelectRun, settings | ({"dedup": {}} if args.dedup else {}), "benchmark")
    wall, cpu = time.perf_counter(), time.process_time()
    found = select(run)
    print(
        json.dumps(
            {
                "wall_s": round(time.perf_counter() - wall, 1),
                "cpu_s": round(time.process_time() - cpu, 1),
                "peak_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "read_GB": round(groups.stat().st_size / 1e9, 2),
                **found["files"],
            }
        )
    )


if __name__ == "__main__":
    main()
