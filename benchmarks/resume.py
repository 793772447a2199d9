"""Kill -9 at seeded moments, some inside a save; the resumed curve is bitwise the uninterrupted one.

    python benchmarks/resume.py [--kills 10] [--seed 0] [--nproc 2]

Runs `fusemega train` on a tiny model (data parallel, distributed optimizer, a checkpoint every third step) once
undisturbed, and once killed again and again: half of the kills right after a checkpoint folder appears under its
temporary name, half at a random moment of a random step. Then metrics.jsonl (apart from times) and the
exported weights of both must agree bit for bit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

from fusemega.training.records import COSTS

STEPS, SAVE_INTERVAL = 60, 3


def start(run_file: Path, output: Path, nproc: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fusemega", "train", str(run_file), f"output_dir={output}"]
    command += ["--nproc", str(nproc)] if nproc > 1 else []
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and every rank, as a dying node would."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def rows(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def durable(output: Path) -> int:
    tracker = output / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def started_from(log: Path, logged: int) -> int | None:
    """The iteration that a run says it goes on after (0: it starts), in what its log holds beyond `logged` bytes."""
    text = log.read_bytes()[logged:].decode(errors="replace")
    said = re.search(r"(?:starting|resuming after iteration (\d+)) of", text)
    return said and int(said[1] or 0)


def saves_begun(checkpoints: Path, before: set[Path], least: int) -> list[Path]:
    """Checkpoints of iteration `least` or later that are being written, without those in `before`."""
    return [path for path in {*checkpoints.glob("iter_*.tmp")} - before if int(path.name[5:12]) >= least]


def run_until_killed(
    run_file: Path, output: Path, nproc: int, log: Path, inside_save: bool, chance: random.Random
) -> dict[str, Any] | None:
    """One life of the run. None: it reached its end before its moment came."""
    begin = durable(output)
    # Far enough to make progress, near enough to leave steps for the lives to come.
    target = begin + chance.randint(2, 6)
    pause = chance.uniform(0.0, 0.15)
    checkpoints = output / "checkpoints"
    logged = log.stat().st_size if log.exists() else 0
    left_before = set(checkpoints.glob("iter_*.tmp"))  # of lives before this one, until its first save
    process = start(run_file, output, nproc, log)
    while process.poll() is None:
        if inside_save:
            if fresh := saves_begun(checkpoints, left_before, target):
                kill(process)
                left = [p.name for p in fresh if p.exists()]
                death = {"moment": "inside save", "iteration": int(fresh[0].name[5:12]), "partial_left": left}
                return death | {"started_from": started_from(log, logged)}
        # Until it has said where it starts, the rows are those of the life before.
        elif (origin := started_from(log, logged)) is not None and (found := rows(output)):
            if (last := found[-1]["iteration"]) >= target:
                time.sleep(pause)
                kill(process)
                return {"moment": "in a step", "iteration": last, "started_from": origin}
        time.sleep(0.001)
    if process.returncode:
        raise SystemExit(f"the run failed by itself:\n{log.read_text()[-3000:]}")
    return None


def fingerprint(output: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((output / "hf").glob("*.safetensors"))
    }


def curve(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in COSTS} for row in rows(output)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="fusemega-resume-") as folder:
        work = Path(folder)
        chat = tiny.write_chat(work / "chat.jsonl", rows=96, characters=300)
        tiny.write_model(work / "model", chat)
        run_file = work / "run.yaml"
        run_file.write_text(
            yaml.safe_dump(
                {
                    "output_dir": "replaced on the command line",
                    "model": {"load": str(work / "model"), "dtype": "fp32"},
                    "data": {"path": str(chat), "seq_length": 128},
                    "objective": {"name": "sft"},
                    "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
                    "training": {"train_iters": STEPS, "global_batch_size": 8, "save_interval": SAVE_INTERVAL},
                }
            )
        )
        whole, broken = work / "whole", work / "broken"
        begun = time.monotonic()
        if start(run_file, whole, args.nproc, work / "whole.log").wait():
            raise SystemExit((work / "whole.log").read_text()[-3000:])
        print(f"uninterrupted: {STEPS} steps in {time.monotonic() - begun:.0f} s")
        kills: list[dict[str, Any]] = []
        while len(kills) < args.kills:
            inside = len(kills) % 2 == 0
            before = durable(broken)
            death = run_until_killed(run_file, broken, args.nproc, work / "broken.log", inside, chance)
            if death is None:
                break
            if death["started_from"] != before:
                raise SystemExit(f"started from {death['started_from']}, and {before} was durable")
            kills.append(death | {"durable": durable(broken)})
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
        if start(run_file, broken, args.nproc, work / "broken.log").wait():
            raise SystemExit((work / "broken.log").read_text()[-3000:])
        a, b = curve(whole), curve(broken)
        different = [row["iteration"] for row, other in zip(a, b, strict=False) if row != other]
        leftovers = [path.name for path in (broken / "checkpoints").glob("*.tmp")]
        result = {
            "benchmark": "resume",
            "kills": len(kills),
            "inside_save": sum(death["moment"] == "inside save" for death in kills),
            "partial_saves_left_behind_by_kills": sum(bool(death.get("partial_left")) for death in kills),
            "steps": len(a),
            "steps_that_differ": different,
            "curve_bitwise_equal": a == b,
            "weights_bitwise_equal": fingerprint(whole) == fingerprint(broken) and bool(fingerprint(whole)),
            "leftovers": leftovers,
        }
    complete = len(kills) == args.kills and len(a) == STEPS
    result["ok"] = complete and result["curve_bitwise_equal"] and result["weights_bitwise_equal"] and not leftovers
    print(json.dumps(result))
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
