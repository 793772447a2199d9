"""What a checkpoint's save takes of host memory, by rank, in bytes a parameter.

    python benchmarks/save_memory.py [--processes 1 2 4] [--hidden 1024] [--layers 4] [--async-save]

A random Llama is trained for one update under data parallelism alone, in fp32, and saved. Of each rank it is measured
how far its resident set rises above what it held before the save (the kernel's own maximum, set anew), and what the
processes that write held beside it. The last line is one JSON object; `ok` says whether the rank that gathers the
optimizer's state stays below 28 bytes a parameter (12 are that state), and the others below 4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GATHERING, OTHERS = 28.0, 4.0


def measured(work: Path, in_background: bool) -> dict[str, float]:
    """One rank: trains, saves, and returns bytes a parameter."""
    import torch

    from fusemega.config import validate
    from fusemega.runtime.memory import peak_memory
    from fusemega.training.assembly import open_trainer
    from fusemega.training.checkpoints import Checkpoints
    from fusemega.training.run_file import TrainRun

    run = {
        "output_dir": str(work / "run"),
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 64},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-4},
        "training": {"train_iters": 1, "global_batch_size": 4, "export_hf": False, "async_save": in_background},
    }
    trainer, _ = open_trainer(validate(TrainRun, run, "save_memory"))
    trainer.step()
    parameters = sum(parameter.numel() for parameter in trainer.gpt.parameters())
    trainer.world.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = peak_memory(torch.device("cpu"))
    trainer.save()
    saver = trainer.callback(Checkpoints).saver
    saver.wait()
    rise = peak_memory(torch.device("cpu")) - before
    found = {"save": rise / parameters, "writers": saver.writers_bytes / parameters, "parameters": parameters}
    trainer.world.barrier()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        found = measured(args.rank_of, args.async_save)
        (args.rank_of / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
        return

    import tiny

    result: dict[str, Any] = {"benchmark": "save_memory", "async_save": args.async_save}
    ok = True
    for count in args.processes:
        with tempfile.TemporaryDirectory(prefix="fusemega-save-") as folder:
            work = Path(folder)
            shape = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers}
            tiny.write_model(work / "model", tiny.write_chat(work / "chat.jsonl", rows=8, characters=200), **shape)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command += [__file__, "--rank-of", str(work), *(["--async-save"] if args.async_save else [])]
            subprocess.run(command, check=True, env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"))
            ranks = [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(count)]
        result["parameters"] = ranks[0]["parameters"]
        result[f"DP{count}"] = [{key: round(rank[key], 2) for key in ("save", "writers")} for rank in ranks]
        ok &= ranks[0]["save"] < GATHERING and all(rank["save"] < OTHERS for rank in ranks[1:])
        print(f"DP{count}: {result[f'DP{count}']}", flush=True)
    print(json.dumps(result | {"ok": ok}))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
