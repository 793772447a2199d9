"""Archives of this project, and of all that it needs, for a GPU machine without a network.

    python tools/pack_for_gpu.py [--base LIST] [--python 3.12] [--platform manylinux_2_28_x86_64] [--out FOLDER]

FOLDER (default: dist/gpu) gets archives of less than 60 MB each, `manifest.json` with the sha256 of all, and
`unpack.py`. Copy them to one folder there, together or one after the other, and run `python unpack.py` with the
Python that has torch and transformers. In the archives are

    project   the files of a commit (--commit; default: HEAD, which is refused while there are uncommitted changes)
    wheels    what the project needs and the image lacks: --base lists the image's packages, as
              `pip list --format=freeze` prints them there (default: tools/gpu_base.txt, torch and transformers alone)
    model     SmolLM2-135M-Instruct
    data      chats and other texts, as fetched by `python -m fusemega.fixtures`

A second call packs only what has changed since. Packing needs a network for wheels and data it has not fetched before.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_parts import Item, drop_others, pack
from gpu_wheels import Image, declared, machine, read_base, wheels

from fusemega.errors import UserError, of_the_system
from fusemega.files.lock import locked
from fusemega.files.output import check_writable, disk_errors, write_durably
from fusemega.fixtures.data import DOMAINS, chat_data, domain_data, smollm2

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("project", "wheels", "model", "data")
MB = 1_000_000
MOST_MB = 60
ALSO = ("liger-kernel",)
"""Packages that the check compares with, if they can be installed."""
COMMANDS = ("fusemega env", "python benchmarks/gpu/check.py --quick", "python benchmarks/gpu/check.py")
DATA: tuple[Callable[[], Path], ...] = (
    lambda: chat_data().train.parent,
    *(partial(lambda domain: domain_data(domain).train.parent, domain) for domain in DOMAINS),
)


def git(repository: Path, *words: str) -> bytes:
    """What `git` prints.

    Raises:
        UserError: it fails.
    """
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True)
    except FileNotFoundError:
        raise UserError("needs the program git") from None
    if done.returncode != 0:
        raise UserError(f"{repository}: git {words[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def commit_of(repository: Path, revision: str | None) -> str:
    """The commit to pack. Without a revision HEAD, if nothing is uncommitted; with one, that is named on stderr.

    Raises:
        UserError: uncommitted changes, or no such commit.
    """
    changed = [line[3:] for line in git(repository, "status", "--porcelain").decode().splitlines()]
    some = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    if changed and revision is None:
        raise UserError(f"{repository}: uncommitted changes: {some}; commit them, or name a commit: --commit HEAD")
    if changed:
        print(f"not packed, as it is not committed: {some}", file=sys.stderr)
    return git(repository, "rev-parse", "--verify", f"{revision or 'HEAD'}^{{commit}}").decode().strip()


def project(repository: Path, commit: str) -> list[Item]:
    """The files of a commit.

    Raises:
        UserError: one of them is a link.
    """
    items = []
    with tarfile.open(fileobj=io.BytesIO(git(repository, "archive", "--format=tar", commit))) as tar:
        for entry in tar:
            if entry.isfile():
                file = tar.extractfile(entry)
                assert file is not None
                items.append(Item(f"project/{entry.name}", file.read(), bool(entry.mode & 0o100)))
            elif not entry.isdir():
                raise UserError(f"{repository}: {entry.name} is a link; only files can be packed")
    return items


def cache_items(folders: list[Path]) -> list[Item]:
    """Folders of the fixture cache, at the same places in the cache of the other machine."""
    return [
        Item(f"cache/{folder.name}/{path.relative_to(folder).as_posix()}", path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def wheel_items(files: dict[str, bytes], image: Image, also: list[str]) -> list[Item]:
    """The wheels that the image lacks, for the project whose files are given."""
    absent = [name for name in ("setup.py", "pyproject.toml", "constraints.txt") if name not in files]
    if absent:
        raise UserError(f"the commit has no {', '.join(absent)}")
    texts = [files[name].decode("utf-8") for name in ("setup.py", "pyproject.toml", "constraints.txt")]
    needed, build = declared(texts[0], texts[1])
    folder = wheels([*needed, *also], build, texts[2], image)
    return [Item(f"wheels/{path.name}", path) for path in sorted(folder.glob("*.whl"))]


def earlier(out: Path) -> dict[str, Any]:
    """The manifest of a folder that was packed before; empty where nothing is.

    Raises:
        UserError: the folder holds something else.
    """
    check_writable(out)
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return {"groups": {}}
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["format"] == 1 and isinstance(manifest["groups"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        # A first call that was killed has left nothing but parts.
        if out.is_dir() and all(re.search(r"\.part(\.tmp)?$|^unpack\.py$", path.name) for path in out.iterdir()):
            return {"groups": {}}
        raise UserError(f"{out}: exists and was not packed by this script; nothing is overwritten") from None
    return dict(manifest)


def pack_all(
    repository: Path, out: Path, commit: str, image: Image, *, also: list[str], most: int, groups: list[str]
) -> None:
    """Packs the groups into `out`; `manifest.json` is the last that appears, and names all that belongs to it."""
    before = earlier(out)
    of_commit = project(repository, commit)
    files = {item.name.partition("/")[2]: item.content for item in of_commit if isinstance(item.content, bytes)}
    make: dict[str, Callable[[], list[Item]]] = {
        "project": lambda: of_commit,
        "wheels": lambda: wheel_items(files, image, also),
        "model": lambda: cache_items([smollm2()]),
        "data": lambda: cache_items([fetch() for fetch in DATA]),
    }
    items = {group: make[group]() for group in groups}  # all fetched before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), disk_errors(out):
        packed = {group: pack(out, group, of, most, before["groups"].get(group)) for group, of in items.items()}
        manifest = {
            "format": 1,
            "commit": commit,
            "python": image.python,
            "platform": image.platform,
            "base": image.packages,
            "also": also,
            "commands": COMMANDS,
            "groups": packed,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        script = (Path(__file__).resolve().parent / "gpu_unpack.py").read_text(encoding="utf-8")
        for name, content in (("unpack.py", script), ("manifest.json", text)):
            if not (out / name).is_file() or (out / name).read_text(encoding="utf-8") != content:
                write_durably(out / name, content)
        drop_others(out, {part["name"] for group in packed.values() for part in group["parts"]})
    for group, of in packed.items():
        kept = "" if of is not before["groups"].get(group) else ", as before"
        size = sum(file["bytes"] for file in of["files"].values())
        print(f"{group}: {len(of['files'])} files, {size / MB:.1f} MB{kept}")
        for part in of["parts"]:
            print(f"    {part['name']}  {part['bytes'] / MB:.1f} MB")
    print(f"{out}: commit {commit[:12]}, for Python {image.python} on {image.platform}. There: python unpack.py")


def main() -> int:
    """Returns 0; 2 with one line on stderr where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu", help="folder of the archives")
    parser.add_argument("--commit", help="what is packed; default: HEAD, without uncommitted changes")
    parser.add_argument("--base", type=Path, default=ROOT / "tools" / "gpu_base.txt", help="packages of the image")
    here = "{}.{}".format(*sys.version_info)
    parser.add_argument("--python", default=here, help=f"the image's Python; default: {here}, as here")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64", help="newest wheels that the image can use")
    parser.add_argument("--also", nargs="*", default=list(ALSO), help="packages to install there if that is possible")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="what is packed")
    parser.add_argument("--most-mb", type=float, default=58, help=f"size of an archive in MB, less than {MOST_MB}")
    parser.add_argument("--repository", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if not 0 < arguments.most_mb < MOST_MB:
            raise UserError(f"--most-mb {arguments.most_mb}: must be above 0 and below {MOST_MB}")
        if not re.fullmatch(r"3\.\d+", arguments.python):
            raise UserError(f"--python {arguments.python}: expected 3.MINOR")
        if "project" not in arguments.groups:
            raise UserError("--groups: project is always packed; the others are for a machine that has them already")
        machine(arguments.platform)
        image = Image(arguments.python, arguments.platform, read_base(arguments.base))
        commit = commit_of(arguments.repository, arguments.commit)
        most = max(1, int(arguments.most_mb * MB))
        groups = [group for group in GROUPS if group in arguments.groups]
        pack_all(arguments.repository, arguments.out, commit, image, also=arguments.also, most=most, groups=groups)
    except (UserError, OSError) as error:
        line = error if isinstance(error, UserError) else of_the_system(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
