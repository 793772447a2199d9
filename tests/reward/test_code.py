"""Code of responses: what counts as right; hostile programs, contained in each sandbox; none without a sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from fusemega.errors import UserError
from fusemega.fixtures.packages import AssetMissing
from fusemega.fixtures.prompts import prompts, task_data
from fusemega.reward import sandbox as sandboxes
from fusemega.reward.code import CodeLimits, Program, check_code
from fusemega.reward.extract import code_of
from fusemega.reward.sandbox import Name, find_sandbox
from tests.reward.hostile import ATTACKS, PROBES

SORTS = "def check(candidate):\n    assert candidate([3, 1, 2]) == [1, 2, 3]\n    assert candidate([]) == []\n"
SANDBOXES: tuple[Name, ...] = ("bubblewrap", "unshare")


def verdicts(programs: list[Program], timeout: float = 20.0, **limits: object) -> list[tuple[bool | None, str]]:
    return list(check_code(programs, CodeLimits.model_validate({"timeout": timeout, **limits}), workers=2))


CASES = {
    "def f(x):\n    return sorted(x)": (True, "passes"),
    "def f(x):\n    x.sort()\n    return x": (True, "passes"),
    "from typing import *\nclass f(list):\n    def __init__(self, x):\n        super().__init__(sorted(x))": (
        True,
        "passes",
    ),
    "def f(x):\n    return x": (False, "wrong answer"),
    "def f(x):\n    return None": (False, "wrong answer"),
    "def f(x):\n    return x[9]": (False, "raises IndexError"),
    "def g(x):\n    return x": (False, "the function is missing"),
    "I would sort the list.": (False, "does not run (SyntaxError)"),
    "import numpyy\ndef f(x):\n    return x": (False, "does not run (ModuleNotFoundError)"),
    "": (False, "no code"),
    "def f(x):\n    return f": (None, "answers what is not plain data"),
}


def test_what_is_right() -> None:
    found = verdicts([Program(code, SORTS, "f") for code in CASES])

    assert found == list(CASES.values())


PLUS, SAME = "def f(x): return x + 1", "def f(x): return x"
VALUES = "(1, {2: {3}}, b'4', 5j, 10**40, -1.5, None)"
TESTS: list[tuple[str, str, str | None, tuple[bool | None, str]]] = [
    (PLUS, "assert f(1) == 2", None, (True, "passes")),
    (PLUS, "def test_one():\n    assert f(1) == 3", None, (False, "wrong answer")),
    ("class S:\n def add(s, a, b=0): return a + b", "def check(c): assert c(1, b=2) == 3", "S().add", (True, "passes")),
    ("def f(x): x.append(1)", "y = [0]\nf(y)\nassert y == [0, 1]", "f", (True, "passes")),
    (SAME, f"assert f({VALUES}) == {VALUES}", "f", (True, "passes")),
    ("def f(x): return (i for i in range(x))", "assert list(f(3)) == [0, 1, 2]", "f", (True, "passes")),
    ("def f(x): raise ValueError(x)", "try: f(1)\nexcept ValueError as e: assert str(e) == '1'", "f", (True, "passes")),
    (SAME, "assert f(1) == 1\nassert undefined", "f", (None, "the tests do not run (NameError)")),
    (SAME, "assert f(1) ==", "f", (None, "the tests do not run (SyntaxError)")),
    (SAME, "assert 1 == 1", "f", (None, "the tests call nothing")),
    (SAME, "assert f(lambda y: y)", "f", (None, "the tests pass what is not plain data (function)")),
    (SAME, "assert g(f(1))", None, (None, "entry_point is needed: several names are unknown")),
    # A name of Python's stays Python's, whatever the program defines.
    ("def f(x): return 0\ndef all(x): return True", "assert all([f(1) == 1])", None, (False, "wrong answer")),
]


def test_forms_of_tests() -> None:
    found = verdicts([Program(code, tests, entry) for code, tests, entry, _ in TESTS])
    assert found == [expected for *_, expected in TESTS]


@pytest.mark.parametrize("name", SANDBOXES)
def test_hostile_programs_are_contained(name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes get nowhere, attacks are not called right, and the host is as before."""
    monkeypatch.setenv("HOST_SECRET", "seen")
    host = tmp_path / "host.txt"
    host.write_text("untouched")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        about = (
            f"HOST, PORT, HOST_PID, CWD = {str(host)!r}, {listener.getsockname()[1]}, {os.getpid()}, {os.getcwd()!r}\n"
        )
        probes = [Program(about + code, f"assert f() == {answer!r}", "f") for code, answer in PROBES.values()]
        found = dict(zip(PROBES, verdicts(probes, memory=256, sandbox=name), strict=True))
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert found == dict.fromkeys(PROBES, (True, "passes"))
    attacks = dict(
        zip(
            ATTACKS, verdicts([Program(c, SORTS, "f") for c in ATTACKS.values()], memory=256, sandbox=name), strict=True
        )
    )
    assert {what: verdict for what, verdict in attacks.items() if verdict[0] is True} == {}
    assert attacks["exits at once"] == attacks["exits when asked"] == (False, "ends early")
    assert attacks["eats memory"][0] is False and attacks["forks for ever"] == (False, "wrong answer")
    assert host.read_text() == "untouched"


def test_a_program_without_end_is_killed_with_all_that_it_started() -> None:
    loops = (
        "while True: pass",
        "import time\ntime.sleep(900)",
        "from threading import Thread\nfor _ in range(4): Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n"
        "while True: pass",
    )
    for name in SANDBOXES:
        found = verdicts([Program(code, SORTS, "f") for code in loops], 1, wall_timeout=8, sandbox=name)
        assert found == [(False, "timed out")] * 3
    assert _sandboxed_processes(os.getpid()) == []


@pytest.mark.parametrize("name", SANDBOXES)
def test_a_killed_parent_takes_its_programs_along(name: Name) -> None:
    code = f"""
import threading
from fusemega.reward.code import *
program = Program("import time\\nprint(1)\\ntime.sleep(900)", "f()", "f")
thread = threading.Thread(target=lambda: check_code([program], CodeLimits(timeout=900, sandbox={name!r})))
thread.start()
thread.join()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        _until(lambda: len(_sandboxed_processes(parent.pid)) >= 4)
        started = _sandboxed_processes(parent.pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def _until(holds: object) -> None:
    end = time.monotonic() + 60
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def _sandboxed_processes(parent: int) -> list[int]:
    """The processes below `parent` that run something of a sandbox."""
    parents, below = {}, {parent}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1]), (folder / "cmdline").read_bytes()
            except OSError:
                continue
    found: list[int] = []
    grown = True
    while grown:
        new = [pid for pid, (above, _) in parents.items() if above in below and pid not in below]
        below.update(new)
        found += [pid for pid in new if b"inside.start" in parents[pid][1]]
        grown = bool(new)
    return found


def test_the_same_from_a_thread_and_from_asyncio() -> None:
    programs = [Program("def f(x): return sorted(x)", SORTS, "f"), Program("def f(x): return x", SORTS, "f")]
    found: list[object] = [check_code(programs)]
    thread = Thread(target=lambda: found.append(check_code(programs)))
    thread.start()
    thread.join()

    async def inside() -> None:
        found.append(check_code(programs))
        found.append(await asyncio.to_thread(check_code, programs))

    asyncio.run(inside())
    assert found == [[(True, "passes"), (False, "wrong answer")]] * 4


def test_nothing_runs_without_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bwrap that is there and does not work, or works and confines nothing, is not taken; with neither: refused."""
    find_sandbox.cache_clear()
    shell = shutil.which("sh")
    for name, script in {"bwrap": "echo no namespaces here >&2; exit 1", "setpriv": 'shift 2; exec "$@"'}.items():
        (tmp_path / name).write_text(f"#!{shell}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="bubblewrap: no namespaces here; unshare: unshare is not installed.*apt-get"):
        check_code([Program("open('/tmp/was_run', 'w')", "f()", "f")])
    # Runs what follows `--`, confined by nothing but the process's own limits.
    (tmp_path / "bwrap").write_text(f'#!{shell}\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n')
    monkeypatch.setattr(sandboxes, "_MOUNTED", str(Path(sandboxes.__file__).parent))
    find_sandbox.cache_clear()
    with pytest.raises(UserError, match="bubblewrap: lets a program read the host's files, write to its root folder"):
        find_sandbox("bubblewrap")
    find_sandbox.cache_clear()


def test_another_user_has_a_sandbox_too(tmp_path: Path) -> None:
    """As somebody who is not root, with the system's Python, which everybody can read."""
    python = shutil.which("python3", path="/usr/bin")
    if os.getuid() or not python or not shutil.which("setpriv"):
        pytest.skip("needs root, and /usr/bin/python3")
    package = tmp_path / "fusemega"
    shutil.copytree(Path(sandboxes.__file__).parent, package / "reward")
    shutil.copy(Path(sandboxes.__file__).parents[1] / "errors.py", package)
    (package / "__init__.py").write_text("")
    for place in (tmp_path, *tmp_path.parents):
        place.chmod(place.stat().st_mode | 0o055)
    code = (
        "from fusemega.reward.sandbox import *\nprint([find_sandbox(name).name for name in ('bubblewrap', 'unshare')])"
    )
    drop = [str(shutil.which("setpriv")), "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run([*drop, python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "['bubblewrap', 'unshare']\n", done.stderr


def test_code_of_a_response() -> None:
    assert code_of("x = 1") == "x = 1"
    two = "```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```\nprints\n```text\n1\n```"
    assert code_of(two) == "f()\n" and code_of(two, "f") == "def f(): pass\n"
    assert code_of("<think>\n```python\nbad\n```\n</think>\n```py\ngood\n```") == "good\n"
    assert code_of("```python\ncut = 1\n") == "cut = 1\n" and code_of("~~~\na = '```'\n~~~\n") == "a = '```'\n"
    assert code_of("```c\nint x;\n```") == "int x;\n"


def test_human_eval() -> None:
    """Canonical solutions are right, in both forms of its tests; mutated ones are wrong."""
    try:
        rows = [json.loads(line) for line in task_data().code.read_text().splitlines()][::8]
        asked = {row["id"]: row for row in map(json.loads, prompts(500).read_text().splitlines()) if "tests" in row}
    except AssetMissing as error:
        pytest.skip(str(error))
    right = [Program(r["canonical_solution"], r["test"], r["entry_point"], r["prompt"]) for r in rows]
    wrong = [Program("    return 'mutated'\n", r["test"], r["entry_point"], r["prompt"]) for r in rows]
    others = list(asked.values())[::12]
    nothing = [Program(f"```python\n{_block(row)}\n```", row["tests"], row["entry_point"]) for row in others]
    found = check_code([*right, *wrong, *nothing], workers=2)
    assert [tuple(v) for v in found[: len(rows)]] == [(True, "passes")] * len(rows)
    assert [v.correct for v in found[len(rows) :]] == [False] * (len(wrong) + len(nothing))


def _block(row: dict[str, object]) -> str:
    """The code of a chat prompt: a function that does nothing."""
    return code_of(row["prompt"][-1]["content"])  # type: ignore[index]
