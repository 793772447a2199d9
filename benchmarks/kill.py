"""Forty kill -9: of the launcher, of one rank, of all at once; in steps, in saves, in the rename of the tracker.

    python benchmarks/kill.py [--kills 40] [--seed 0] [--nproc 2] [--work FOLDER]

Runs `fusemega train` on a tiny model (data parallel, distributed optimizer, a checkpoint every third step) once
undisturbed, and once killed again and again, every life saving in another way than the one before. The rename of the
tracker is made to last (the ranks' os.replace is replaced by one that waits, through a sitecustomize.py on their path),
so that the kill falls inside it. Who is killed goes round: the launcher alone (its ranks must end by themselves), one
rank alone (the launcher must end the others, and name it in one line), every process. After each kill no process of
that life may be left, nor a temporary folder; where all were killed at once, the next life removes it. The checkpoint
that the tracker names must be whole, and the next life must start from it or from a later one; at the end
metrics.jsonl (apart from times) and the exported weights must agree bit for bit. With `--work` an interrupted
benchmark goes on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml
from resume import curve, durable, fingerprint, kill, rows, saves_begun, started_from

from fusemega.files.integrity import damaged_files

SAVE_INTERVAL = 3
STEPS_PER_KILL = 5
# The moments of ten kills; the second ten are the same again.
MOMENTS = (
    "save at once",
    "step",
    "save in the background",
    "tracker",
    "save at once",
    "step in the background",
    "save in the background",
    "step",
    "save at once",
    "save in the background",
)
WAIT_IN_RENAME_S = 20
VICTIMS = ("launcher", "rank", "tree")
SECONDS_TO_END = 20.0
SLOW_RENAME = f"""
import os, time
real = os.replace
def replace(source, target, **keywords):
    if str(target).endswith("latest_checkpointed_iteration.txt"):
        with open(os.environ["RENAME_REACHED"], "w") as note:
            note.write(str(source))
        time.sleep({WAIT_IN_RENAME_S})
    real(source, target, **keywords)
if "RENAME_REACHED" in os.environ:
    os.replace = replace
"""


def start(
    work: Path, output: Path, nproc: int, background: bool = False, slow: bool = False
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fusemega", "train", str(work / "run.yaml"), f"output_dir={output}"]
    command += [f"training.async_save={str(background).lower()}"] + (["--nproc", str(nproc)] if nproc > 1 else [])
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TMPDIR=str(work / "tmp"))
    if slow:
        environment["RENAME_REACHED"] = str(work / "reached")
        environment["PYTHONPATH"] = os.pathsep.join([str(work / "slow"), environment.get("PYTHONPATH", "")])
    with (work / f"{output.name}.log").open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def strike(process: subprocess.Popen[bytes], victim: str, chance: random.Random, tmp: Path) -> dict[str, Any]:
    """Kills, and says what is left when the others have had time to end."""
    if victim == "tree":
        kill(process)
    elif victim == "launcher":
        process.kill()
    else:
        own = [int(note.stem) for note in tmp.glob("fusemega-*/*.pid") if session_of(int(note.stem)) == process.pid]
        os.kill(chance.choice(sorted(own)) if own else process.pid, signal.SIGKILL)
    before = time.monotonic()
    while (left := session(process.pid)) and time.monotonic() - before < SECONDS_TO_END:
        process.poll()  # else it would be left, as a zombie
        time.sleep(0.01)
    seconds = time.monotonic() - before
    for one in left:
        one.kill()
    status = process.wait()
    return {
        "victim": victim,
        "status": status,
        "seconds_to_end": round(seconds, 2),
        "processes_left": len(left),
        "folders_left": folders(tmp),
    }


def session_of(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def session(leader: int) -> list[psutil.Process]:
    """The processes of one life: all stay in its session, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        if session_of(process.pid) == leader:
            found.append(process)
    return found


def folders(tmp: Path) -> list[str]:
    """Temporary files and folders, but for those that torch keeps for every process to come."""
    return sorted(path.name for path in tmp.iterdir() if not path.name.startswith("torchinductor"))


def one_life(work: Path, output: Path, nproc: int, moment: str, victim: str, chance: random.Random) -> dict[str, Any]:
    """Starts or resumes the run and kills it at a moment of the wanted kind."""
    begin = durable(output)
    target = begin + chance.randint(2, 6)
    log, reached, checkpoints = work / f"{output.name}.log", work / "reached", output / "checkpoints"
    logged = log.stat().st_size if log.exists() else 0
    left_before = set(checkpoints.glob("iter_*.tmp"))  # of lives before this one, until its first save
    reached.unlink(missing_ok=True)
    pause = chance.uniform(0, 0.05 if "save" in moment else 0.15)
    process = start(work, output, nproc, "background" in moment, moment == "tracker")
    death: dict[str, Any] | None = None
    while death is None:
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself:\n{log.read_text()[-3000:]}")
        if moment.startswith("save"):
            if fresh := saves_begun(checkpoints, left_before, target):
                time.sleep(pause)
                fate = strike(process, victim, chance, work / "tmp")
                left = [sorted(file.name for file in path.iterdir()) for path in fresh if path.exists()]
                death = {"inside": bool(left), "files_left": left[0] if left else []}
        elif moment == "tracker":
            if reached.exists():
                fate = strike(process, victim, chance, work / "tmp")
                death = {"inside": durable(output) == begin and Path(reached.read_text()).exists()}
        # Until it has said where it starts, the rows are those of the life before.
        elif started_from(log, logged) is not None and (found := rows(output)) and found[-1]["iteration"] >= target:
            time.sleep(pause)
            fate = strike(process, victim, chance, work / "tmp")
            death = {"inside": True}
        time.sleep(0.001)
    said = log.read_bytes()[logged:].decode(errors="replace")
    whole = durable(output)
    damaged = damaged_files(checkpoints / f"iter_{whole:07d}") if whole else []
    return {
        "moment": moment,
        "durable_before": begin,
        "started_from": started_from(log, logged),
        "durable_after": whole,
        "damaged": damaged,
        "named": victim != "rank" or ("was ended by SIGKILL" in said and "Traceback" not in said),
        **fate,
        **death,
    }


def prepare(work: Path, kills: int) -> None:
    chat = tiny.write_chat(work / "chat.jsonl", rows=96, characters=300)
    tiny.write_model(work / "model", chat)
    (work / "slow").mkdir()
    (work / "tmp").mkdir()
    (work / "slow" / "sitecustomize.py").write_text(SLOW_RENAME)
    run = {
        "output_dir": "replaced on the command line",
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
        "training": {
            "train_iters": STEPS_PER_KILL * kills + 10,
            "global_batch_size": 8,
            "save_interval": SAVE_INTERVAL,
            "keep_checkpoints": 3,
        },
    }
    (work / "run.yaml").write_text(yaml.safe_dump(run))


def finish(work: Path, output: Path, nproc: int) -> None:
    if not (output / "done").exists() and start(work, output, nproc).wait():
        raise SystemExit((work / f"{output.name}.log").read_text()[-3000:])


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    if not (work / "run.yaml").exists():
        prepare(work, args.kills)
    whole, broken, record = work / "whole", work / "broken", work / "kills.jsonl"
    finish(work, whole, args.nproc)
    kills = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    while len(kills) < args.kills:
        moment = MOMENTS[len(kills) % len(MOMENTS)]
        chance = random.Random(f"{args.seed} {len(kills)}")
        kills.append(one_life(work, broken, args.nproc, moment, VICTIMS[len(kills) % len(VICTIMS)], chance))
        with record.open("a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
        print(f"kill {len(kills)}: {kills[-1]}", flush=True)
    finish(work, broken, args.nproc)
    a, b = curve(whole), curve(broken)
    within = [death["moment"] for death in kills if death["inside"]]
    lost = [
        number
        for number, death in enumerate(kills, 1)
        if death["started_from"] != death["durable_before"]
        or death["durable_after"] < death["durable_before"]
        or death["damaged"]
    ]
    return {
        "benchmark": "kill",
        "kills": len(kills),
        "kills_of": {victim: sum(death["victim"] == victim for death in kills) for victim in VICTIMS},
        "kills_that_left_processes": numbers(kills, lambda death: death["processes_left"]),
        "kills_that_left_folders": numbers(kills, lambda death: death["victim"] != "tree" and death["folders_left"]),
        "folders_left_at_the_end": folders(work / "tmp"),
        "killed_ranks_not_named_in_one_line": numbers(kills, lambda death: not death["named"]),
        "seconds_until_all_had_ended": {
            victim: max((death["seconds_to_end"] for death in kills if death["victim"] == victim), default=None)
            for victim in VICTIMS
        },
        "inside_saves_at_once": within.count("save at once"),
        "inside_saves_in_the_background": within.count("save in the background"),
        "inside_renames_of_the_tracker": within.count("tracker"),
        "kills_that_lost_something_durable": lost,
        "steps": len(a),
        "steps_that_differ": [row["iteration"] for row, other in zip(a, b, strict=False) if row != other],
        "curve_bitwise_equal": a == b,
        "weights_bitwise_equal": fingerprint(whole) == fingerprint(broken) and bool(fingerprint(whole)),
        "leftovers": [path.name for path in (broken / "checkpoints").glob("*.tmp")],
    }


def numbers(kills: list[dict[str, Any]], wrong: Callable[[dict[str, Any]], Any]) -> list[int]:
    return [number for number, death in enumerate(kills, 1) if wrong(death)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep everything there, and go on with what is there already")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusemega-kill-") as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(work, args)
    share = args.kills / 20
    result["ok"] = (
        result["inside_saves_at_once"] + result["inside_saves_in_the_background"] >= 8 * share
        and result["inside_renames_of_the_tracker"] >= 2 * share
        and not result["kills_that_lost_something_durable"]
        and not result["leftovers"]
        and not result["kills_that_left_processes"]
        and not result["kills_that_left_folders"]
        and not result["folders_left_at_the_end"]
        and not result["killed_ranks_not_named_in_one_line"]
        and result["curve_bitwise_equal"]
        and result["weights_bitwise_equal"]
    )
    print(json.dumps(result))
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
