"""A sandbox for programs from anywhere: bubblewrap, or `unshare` where that is missing; never none.

Inside, a program sees an empty folder /tmp, Python's own files (read-only), a few devices and its own processes; it has
no network, no environment, no home and no privileges, and starts no other process. It ends with its process on the
host, in whatever way that one ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusemega.errors import UserError
from fusemega.reward.inside.confine import DEVICES, FILE_MIB, MIB

Name = Literal["auto", "bubblewrap", "unshare"]
_COMMANDS = {"bubblewrap": ("bwrap",), "unshare": ("unshare", "setpriv")}
_INSIDE = Path(__file__).with_name("inside")
_MOUNTED = "/sandbox"  # where it lies inside
_TRIAL_SECONDS, _TRIAL_MEMORY = 60.0, 512
_BOOT = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); from inside.start import main; main(json.loads(sys.argv[2]))"
)


@dataclass(frozen=True)
class Sandbox:
    """A way to confine processes that has been tried on this machine.

    Attributes:
        name: bubblewrap or unshare.
        command: path of its program.
    """

    name: str
    command: str

    @contextmanager
    def process(
        self, role: str, given: Mapping[str, Any], pipes: Sequence[int], seconds: float, memory: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process of `fusemega.reward.inside`, which is killed with all that belongs to it when the block ends.

        Args:
            role: see `inside.start`.
            given: what it reads (JSON-able), paths under "path" among it.
            pipes: open files that it is given.
            seconds: of processor time.
            memory: MiB of address space.
        """
        extra = list(given.get("path", ()))
        bound = self.name == "bubblewrap"
        root = None if bound else [*_needed(), *extra]
        settings = {"role": role, "pipes": list(pipes), "seconds": seconds, "memory": memory, "root": root}
        alive, held = os.pipe()
        settings["alive"] = alive
        python = [_python(), "-S", "-s", "-E", "-B", "-c", _BOOT]
        python += [_MOUNTED if bound else str(_INSIDE.parent), json.dumps(settings)]
        wrapped = [*self._bubblewrap(extra), *python] if bound else [*self._unshare(), *python]
        with os.fdopen(held, "wb"):
            with os.fdopen(alive), tempfile.TemporaryFile() as told:
                told.write(json.dumps(given).encode())
                told.seek(0)
                process = subprocess.Popen(
                    wrapped,
                    stdin=told,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE if role == "trial" else subprocess.DEVNULL,
                    pass_fds=(*pipes, alive),
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            try:
                yield process
            finally:
                # Its namespace of processes ends with its first one, and that one with this: the kernel kills them all.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _bubblewrap(self, extra: Sequence[str]) -> list[str]:
        paths: list[str] = []
        for path in (*_needed(), *extra):
            paths += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
        for device in DEVICES:
            paths += ["--dev-bind", device, device]
        return [
            *(self.command, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"),
            *("--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
            *paths,
            *("--ro-bind", str(_INSIDE), f"{_MOUNTED}/inside", "--proc", "/proc"),
            *("--size", str(FILE_MIB * MIB), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"),
        ]

    def _unshare(self) -> list[str]:
        # Unlike bubblewrap, unshare does not end with its parent by itself.
        tied = (str(shutil.which("setpriv")), "--pdeathsig", "KILL")
        spaces = ("--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup")
        return [*tied, self.command, *spaces, "--fork", "--kill-child=KILL", "--"]


@functools.cache
def find_sandbox(name: Name = "auto") -> Sandbox:
    """The sandbox of this machine: bubblewrap if it works, else unshare. Each is tried with a real process.

    Raises:
        UserError: there is none; says what was wrong with each.
    """
    failures = []
    for each in _COMMANDS if name == "auto" else (name,):
        missing = [command for command in _COMMANDS[each] if shutil.which(command) is None]
        if missing:
            failures.append(f"{each}: {missing[0]} is not installed")
            continue
        sandbox = Sandbox(each, str(shutil.which(_COMMANDS[each][0])))
        failure = _try(sandbox)
        if failure is None:
            return sandbox
        failures.append(f"{each}: {failure}")
    raise UserError(
        f"programs of responses are run in a sandbox alone, and this machine has none ({'; '.join(failures)}); install "
        "bubblewrap (apt-get install bubblewrap), on a system that lets this user make user namespaces"
    )


def _try(sandbox: Sandbox) -> str | None:
    """What is wrong with it, or None."""
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        os.fchmod(file.fileno(), 0o644)
        given = {"host_file": file.name, "port": listener.getsockname()[1]}
        answers, answer = os.pipe()
        with os.fdopen(answers, "rb") as reader:
            with os.fdopen(answer, "wb"):
                running = sandbox.process("trial", given, [answer], _TRIAL_SECONDS, _TRIAL_MEMORY)
                process = running.__enter__()
            try:
                _, errors = process.communicate(timeout=_TRIAL_SECONDS)
            except subprocess.TimeoutExpired:
                return f"did not answer in {_TRIAL_SECONDS:g} s"
            finally:
                running.__exit__(None, None, None)
            content = reader.read(1 << 16)
    if process.returncode != 0 or not content:
        return errors.decode("utf-8", "replace").strip().rpartition("\n")[2][:300] or f"status {process.returncode}"
    could = json.loads(content)
    return f"lets a program {', '.join(could)}" if could else None


@functools.cache
def _needed() -> tuple[str, ...]:
    """Paths of the host that Python needs: its program, its library, and the system's shared libraries."""
    base = os.path.realpath(sys.base_prefix)
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", f"{base}/lib", f"{base}/lib64", _python()]
    wanted.append(os.path.realpath(sysconfig.get_path("stdlib")))
    found: list[str] = []
    for path in sorted(set(wanted)):
        # Not again what lies in a folder that is there already.
        if os.path.lexists(path) and not any(path.startswith(f"{above}/") for above in found):
            found.append(path)
    return tuple(found)


def _python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(sys.executable)
