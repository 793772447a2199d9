"""Runs a worker script on several gloo ranks and collects what each of them found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL = 6000


def run_ranks(script: Path | str, nproc: int, *args: str, timeout: float = 900) -> list[dict[str, Any]]:
    """`python -m torch.distributed.run --nproc-per-node nproc script args`, one thread a process.

    Each rank writes one JSON object with `report`; they are returned in rank order.
    Relative script paths are taken from `tests/distributed/workers`.

    Raises:
        AssertionError: the launch failed, ran past `timeout` seconds, or a rank reported nothing;
            the end of its output is in the message.
    """
    script = Path(__file__).parent / "workers" / script
    with tempfile.TemporaryDirectory(prefix="fusemega-ranks-") as folder:
        env = dict(os.environ, OMP_NUM_THREADS="1", FUSEMEGA_TEST_OUT=folder, TOKENIZERS_PARALLELISM="false")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, str(script), *args], env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"no end after {timeout:g} s"
            finally:
                if process.poll() is None:
                    # TERM lets the launcher end its workers, each of which leads a session of its own.
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(40)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
        tail = log.read_text(errors="replace")[-TAIL:]
        assert status == 0, f"{script.name} on {nproc} ranks: exit {status}\n{tail}"
        files = [Path(folder) / f"rank{rank}.json" for rank in range(nproc)]
        silent = [file.stem for file in files if not file.is_file()]
        assert not silent, f"{script.name}: no report from {', '.join(silent)}\n{tail}"
        return [json.loads(file.read_text()) for file in files]


def report(result: dict[str, Any]) -> None:
    """Called by a worker at its end: hands `result` (JSON-serialisable) to `run_ranks`."""
    path = Path(os.environ["FUSEMEGA_TEST_OUT"]) / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(result))
