"""Unpacks the archives beside this file and installs what they hold, without a network.

    python unpack.py [FOLDER]

Run it with the Python that has torch and transformers. It needs only the standard library and pip. FOLDER
(default: fusemega-gpu) gets the project, the wheels, the model and data, and a virtual environment that sees this
Python's packages and never changes them. `FOLDER/run COMMAND` then runs a command with all of it. Everything is
checked by sha256. FOLDER is complete or not there; a second call finds it and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 20
MARKER = ".unpacking"

RUN = """#!/bin/sh
# run COMMAND...: the command in the project's folder, with the environment that was unpacked.
here=$(cd "$(dirname "$0")" && pwd) || exit
export FUSEMEGA_CACHE="$here/cache" FUSEMEGA_COMMIT=COMMIT HF_HUB_OFFLINE=1 PATH="$here/venv/bin:$PATH"
cd "$here/project" && exec "$@"
"""

# What of the image is installed in the environment too, and so hidden from the project: "name old -> new".
HIDDEN = """
import importlib.metadata as m, json, sys
place = sys.argv[1]
def found(inside):
    paths = [p for p in sys.path if p.startswith(place) == inside]
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions(path=paths)}
inside, image = found(True), found(False)
print(json.dumps([sorted(inside), sorted(f"{n} {image[n]} -> {inside[n]}" for n in inside if n in image)]))
"""


class Refused(Exception):
    """One line for the person at the terminal."""


class Joined:
    """The bytes of several files, one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = iter(paths)
        self._file: BinaryIO | None = None

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; fewer at the end of a file, none after the last."""
        while True:
            if self._file is not None and (block := self._file.read(size)):
                return block
            if self._file is not None:
                self._file.close()
            path = next(self._paths, None)
            if path is None:
                self._file = None
                return b""
            self._file = path.open("rb")


def sha256(path: Path) -> str:
    """The digest of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(archive: Path) -> dict[str, Any]:
    """`archive`/manifest.json, after a check that this Python and machine can use what it lists."""
    try:
        manifest: dict[str, Any] = json.loads((archive / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{archive / 'manifest.json'}: cannot be read: {error}") from None
    if manifest.get("format") != 1:
        raise Refused(f"{archive / 'manifest.json'}: format {manifest.get('format')!r}; this script reads 1")
    here, wanted = "{}.{}".format(*sys.version_info), manifest["python"]
    if here != wanted:
        raise Refused(
            f"these archives are for Python {wanted}, and {sys.executable} is {here}: "
            f"run python{wanted} unpack.py, or pack them again with --python {here}"
        )
    major, minor, machine = re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", manifest["platform"]).groups()  # type: ignore[union-attr]
    glibc = platform.libc_ver()
    has = tuple(map(int, glibc[1].split(".")[:2])) if glibc[0] == "glibc" else (0, 0)
    if platform.machine() != machine or has < (int(major), int(minor)):
        found = f"{platform.machine()} with {' '.join(filter(None, glibc)) or 'another C library'}"
        raise Refused(f"these archives are for {manifest['platform']}, and this machine is {found}")
    return manifest


def check_parts(archive: Path, manifest: dict[str, Any]) -> None:
    """Refuses missing and damaged archives, all of them in one line."""
    wrong = []
    for group in manifest["groups"].values():
        for part in group["parts"]:
            path = archive / part["name"]
            if not path.is_file():
                wrong.append(f"{part['name']} is missing")
            elif path.stat().st_size != part["bytes"] or sha256(path) != part["sha256"]:
                wrong.append(f"{part['name']} is damaged")
    if wrong:
        raise Refused(f"{archive}: {', '.join(wrong)}; copy them here again")


def extract(archive: Path, group: dict[str, Any], folder: Path) -> None:
    """Writes the files of a group below `folder`, each compared with the manifest."""
    expected = dict(group["files"])
    stream = gzip.GzipFile(fileobj=Joined([archive / part["name"] for part in group["parts"]]), mode="rb")  # type: ignore[call-overload]
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for entry in tar:
            wanted = expected.pop(entry.name, None)
            if wanted is None or not entry.isfile():
                raise Refused(f"{group['parts'][0]['name']}: the manifest does not list {entry.name!r}")
            target, digest = folder / entry.name, hashlib.sha256()
            if not target.resolve().is_relative_to(folder):
                raise Refused(f"{group['parts'][0]['name']}: {entry.name!r} lies outside the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(entry)
            assert source is not None
            with target.open("xb") as out:
                while block := source.read(BLOCK):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() != wanted["sha256"]:
                raise Refused(f"{group['parts'][0]['name']}: {entry.name} is not the file that was packed")
            target.chmod(0o755 if wanted["executable"] else 0o644)
    if expected:
        raise Refused(f"{group['parts'][0]['name']}: lacks {sorted(expected)[0]}")


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees this Python's packages after its own; its interpreter.

    Not venv's system_site_packages, which skips the packages of an environment that this Python may itself be.
    """
    place = folder / "venv"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(place)
    python = place / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
    (Path(own) / "image.pth").write_text("".join(lines), encoding="utf-8")
    return python


def pip_install(python: Path, folder: Path, constraints: Path, words: list[str]) -> str | None:
    """Installs from FOLDER/wheels alone, whatever pip's settings are on this machine; what went wrong, on one line."""
    command = [str(python), "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--no-index", "--no-cache-dir", "--find-links", str(folder / "wheels"), "-c", str(constraints)]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    # The build of the project is a pip of its own, which reads these.
    settings |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (folder / "wheels").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=settings)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    named = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return " ".join(named or lines[-1:] or [f"pip ended with status {done.returncode}"])


def installed(name: str) -> str | None:
    """The version of a package that this Python has."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(folder: Path, manifest: dict[str, Any]) -> None:
    """The project and what it needs, beside what this Python has. The packages that were taken for granted stay."""
    has = {name: installed(name) for name in manifest["base"]}
    python = make_environment(folder)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={has[name]}\n" for name in has if has[name]), encoding="utf-8")
    (folder / "wheels").mkdir(exist_ok=True)
    problem = pip_install(python, folder, constraints, ["--editable", str(folder / "project")])
    if problem is not None:
        others = ", ".join(f"no {name}" if has[name] is None else f"{name} {has[name]}" for name in list(has)[:4])
        raise Refused(f"pip: {problem} (the archives rely on {sys.executable}'s own packages, which has {others})")
    for name in manifest["also"]:
        if (problem := pip_install(python, folder, constraints, [name])) is not None:
            print(f"not installed, and not required: {name}: {problem}")
    place = str(folder / "venv")
    answer = subprocess.run([python, "-c", HIDDEN, place], capture_output=True, text=True, check=True, cwd=folder)
    names, hidden = json.loads(answer.stdout)
    if taken := sorted(set(names) & {name for name in has if has[name]}):
        raise Refused(f"pip installed {', '.join(taken)} although {sys.executable} has it; nothing was kept")
    print(f"installed in {place}: {', '.join(names)}")
    if hidden:
        print(f"there, instead of this Python's own, which stay as they are: {', '.join(hidden)}")


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """The block fills `folder`, which is complete at its end or gone. What a killed call left is removed first."""
    marker, new = folder / MARKER, not folder.exists()
    if not new and not folder.is_dir():
        raise Refused(f"{folder}: is not a folder")
    if not new and any(folder.iterdir()) and not marker.is_file():
        raise Refused(f"{folder}: exists and is not an empty folder; nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    with marker.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(f"{folder}: another unpack.py is at work there") from None
        try:
            _empty(folder)
            yield
        except BaseException:
            _empty(folder)
            marker.unlink()
            if new:
                folder.rmdir()
            raise
        marker.unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def unpack(archive: Path, folder: Path) -> None:
    """All of it; the last file that appears is `folder`/run."""
    manifest, text = read_manifest(archive), (archive / "manifest.json").read_bytes()
    kept, done = folder / "manifest.json", folder / "run"
    if done.is_file() and kept.is_file() and kept.read_bytes() == text:
        print(f"{folder}: unpacked before, nothing to do")
        return
    check_parts(archive, manifest)
    parts = [part for group in manifest["groups"].values() for part in group["parts"]]
    print(f"checked {len(parts)} archives, {sum(part['bytes'] for part in parts) / 1e6:.1f} MB")
    with making(folder):
        size = sum(file["bytes"] for group in manifest["groups"].values() for file in group["files"].values())
        # Wheels are there twice, once installed and about three times as large.
        wheels = sum(file["bytes"] for file in manifest["groups"].get("wheels", {"files": {}})["files"].values())
        if (free := shutil.disk_usage(folder).free) < size + 4 * wheels:
            raise Refused(f"{folder}: needs {(size + 4 * wheels) / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} free")
        for group in manifest["groups"].values():
            extract(archive, group, folder)
        print(f"unpacked commit {manifest['commit'][:12]} into {folder}")
        install(folder, manifest)
        kept.write_bytes(text)
        done.write_text(RUN.replace("COMMIT=COMMIT", f"COMMIT={manifest['commit']}"), encoding="utf-8")
        done.chmod(0o755)
    print("now:", *(f"    {shlex.quote(str(done))} {command}" for command in manifest["commands"]), sep="\n")


def main() -> int:
    """Returns 0; 2 with one line on stderr where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("fusemega-gpu"), help="what is made")
    arguments = parser.parse_args()
    try:
        unpack(Path(__file__).resolve().parent, arguments.folder.resolve())
    except (Refused, OSError, EOFError, tarfile.TarError, subprocess.CalledProcessError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
