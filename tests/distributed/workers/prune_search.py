"""The search under several layouts, in one launch.

worker.py WORK LAYOUTS    with WORK/model and WORK/texts.jsonl; LAYOUTS: JSON, name -> [parallel, changes]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fusemega.config import validate
from fusemega.prune.evaluate import evaluate_order
from fusemega.prune.run_file import PruneEvalRun, PruneRun
from fusemega.prune.search import search
from fusemega.runtime.parallel import shutdown
from tests.distributed.launch import report


def main() -> None:
    work, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    results: dict[str, Any] = {}
    for name, (parallel, changes) in layouts.items():
        base: dict[str, Any] = {
            "model": {"load": str(work / "model"), "dtype": "fp32"},
            "data": {"path": str(work / "texts.jsonl"), "seq_length": 40, "limit": 8},
            "parallel": parallel,
        }
        output = work / f"layout-{name}"
        search_keys = {"blocks": 3, "output": str(output), **changes}
        found, _ = search(validate(PruneRun, base | search_keys, name))
        keys = {"order": str(output / "order.json"), "counts": [0, 3]}
        evaluation, _ = evaluate_order(validate(PruneEvalRun, base | keys, name))
        results[name] = {
            "order": found.order,
            "dense": found.dense_perplexity,
            "perplexities": found.perplexities,
            "evaluated": evaluation.perplexities,
            "head_runs": found.work.head_runs,
        }
    report(results)
    shutdown()


if __name__ == "__main__":
    main()
