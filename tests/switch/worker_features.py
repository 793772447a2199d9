"""Features under layouts of two ranks.

    worker_features.py WORK MODEL    with WORK/train.jsonl, and WORK/kinds.json: layout -> pairs of layer and pooling

Leaves WORK/LAYOUT-NUMBER/features.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fusemega.runtime.parallel import shutdown
from fusemega.switch.features import features
from tests.distributed.launch import report
from tests.switch.conftest import switch_run

LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
}


def main() -> None:
    """See the module."""
    work, model = Path(sys.argv[1]), Path(sys.argv[2])
    for name, layout in LAYOUTS.items():
        for number, (layer, pooling) in enumerate(json.loads((work / "kinds.json").read_text())[name]):
            section = {"layer": layer, "pooling": pooling}
            out = str(work / f"{name}-{number}")
            features(switch_run(work, model, output_dir=out, parallel=layout, features=section))
    report({})
    shutdown()


if __name__ == "__main__":
    main()
