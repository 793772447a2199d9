"""A process that is killed takes along what it started, however it started it; others' processes are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each makes a child that says that it is there, and waits.
CHILD = "import os, sys, time; print('child', os.getpid(), flush=True); time.sleep(60)"
STARTED_BY = {
    "fork": f"""
        lifeline.keep_children()
        if os.fork() == 0:
            exec({CHILD!r})
    """,
    "fork of a fork": f"""
        lifeline.keep_children()
        if os.fork() == 0:
            if os.fork() == 0:
                exec({CHILD!r})
            time.sleep(60)
    """,
    "fork by a thread that ends": f"""
        lifeline.keep_children()
        def fork():
            if os.fork() == 0:
                exec({CHILD!r})
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    """,
    "fork that is stopped": f"""
        lifeline.keep_children()
        if (child := os.fork()) == 0:
            exec({CHILD!r})
        time.sleep(0.5)
        os.kill(child, signal.SIGSTOP)
        print("stopped", flush=True)
    """,
    "command": f"""
        child = "from fusemega.runtime import lifeline; lifeline.follow_starter();" {CHILD!r}
        subprocess.Popen([sys.executable, "-c", child], env=lifeline.child_environment())
    """,
}
PARENT = "import os, signal, subprocess, sys, threading, time\nfrom fusemega.runtime import lifeline\n"


def _run(program: str, **variables: str) -> subprocess.Popen[str]:
    lines = [line[8:] for line in program.splitlines()]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join([PARENT, *lines, "time.sleep(60)"])],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", STARTED_BY)
def test_children_die_with_their_parent(how: str) -> None:
    process = _run(STARTED_BY[how])
    assert process.stdout is not None and process.stdout.readline().startswith("child ")
    if how == "fork that is stopped":
        assert process.stdout.readline() == "stopped\n"
    process.kill()
    process.communicate(timeout=50)  # returns when nobody holds the pipe any more


def test_the_thread_that_forked_may_end() -> None:
    """The kernel's signal comes with the end of a thread; it would kill a child whose parent is well."""
    look = "        time.sleep(0.3)\n        print(os.waitpid(-1, os.WNOHANG), flush=True)"
    process = _run(STARTED_BY["fork by a thread that ends"] + "\n" + look)
    assert process.stdout is not None and process.stdout.readline().startswith("child ")
    assert process.stdout.readline() == "(0, 0)\n"
    process.kill()
    process.communicate(timeout=50)


def test_one_whose_parent_is_dead_already_ends_at_once() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from fusemega.runtime import lifeline; lifeline.follow_starter(); print('here')"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "FUSEMEGA_PARENT": "1"},
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL and run.stdout == b""


def test_what_somebody_else_started_outlives_it() -> None:
    """A shell that goes away, srun, or a daemon's parent: also where torchrun is further up."""
    child = "from fusemega.runtime import lifeline; lifeline.follow_starter(); lifeline.keep_children();" + CHILD
    process = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, child],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "a"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait()
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1.5)
    os.kill(pid, signal.SIGKILL)


def test_the_ranks_of_a_torchrun_that_dies_get_a_term(tmp_path: Path) -> None:
    rank = (
        "import os, signal; from fusemega.runtime import lifeline\n"
        # No print: the signal may come while another one is at work.
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit()))\n"
        "lifeline.follow_starter()"
    )
    agent = tmp_path / "torchrun"
    start = f"subprocess.Popen([sys.executable, '-c', {'import sys; ' + rank + chr(10) + CHILD!r}], env=environment)"
    agent.write_text(
        "import os, subprocess, sys, time\n"
        f"environment = os.environ | {{'TORCHELASTIC_RUN_ID': 'a'}}\n{start}\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, agent], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("child ")
    process.kill()
    assert process.communicate(timeout=50)[0] == "saved\n"
