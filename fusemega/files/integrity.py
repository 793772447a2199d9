"""`integrity.json`: the size and hash of every file of a folder, so that damage is found before the files are used.

Sizes are compared whenever a folder is opened (one stat for each file). Hashes, which read everything, are compared by
`fusemega convert verify` and by a run that resumes. The hash is XXH3-128, as printed by `xxh128sum`. It finds damage at
the speed of memory; it does not stop an attacker, who could rewrite this file too. The module imports neither torch nor
numpy, because light processes use it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.opening import is_inside, open_regular

FILE = "integrity.json"
_FORMAT = "fusemega-integrity-1"
_BLOCK_BYTES = 1 << 22


def file_hash(path: Path) -> str:
    """32 hex digits of XXH3-128 over a file's bytes."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(_BLOCK_BYTES)
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_integrity(
    folder: Path, known: Mapping[str, str] | None = None, threads: int = 4, leave_out: Collection[str] = ()
) -> None:
    """Describe every file below `folder` in `folder/integrity.json`; to be called when all of them are written.

    Args:
        folder: what is described, subfolders included.
        known: hashes that the writer has taken already, by path relative to `folder` with forward slashes; such a file
            is not read again.
        threads: files hashed at once (hashing leaves Python's lock).
        leave_out: relative paths of files that will be removed.
    """
    known = known or {}
    names = [name for name in _files(folder) if name not in (FILE, *leave_out)]
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda name: known[name] if name in known else file_hash(folder / name), names)
        files = {
            name: {"size": (folder / name).stat().st_size, "xxh3_128": digest}
            for name, digest in zip(names, hashes, strict=True)
        }
    (folder / FILE).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")


def check_sizes(folder: Path) -> None:
    """Checks that every file that the manifest names is there with its size, and no other file. Reads no contents.

    Raises:
        UserError: names the first file that is missing, of another size or not listed, or says that the manifest is
            unreadable or lists nothing.
    """
    listed = _read(folder)
    for name in _others(folder, listed):
        raise UserError(f"{folder / name}: {FILE} does not list it, so it cannot be checked; move it away")
    for name, (size, _) in listed.items():
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise UserError(f"{folder / name}: listed in {FILE}, but cannot be read: {error.strerror}") from None
        found = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{folder / name}: listed in {FILE}, but not a regular file")
        if found != size:
            state = "truncated" if found < size else "too long"
            raise UserError(f"{folder / name}: {state}: {found} bytes, and {FILE} says {size}")


def recorded_hashes(folder: Path) -> dict[str, str]:
    """The hashes in the manifest, by relative path.

    Raises:
        UserError: the manifest is missing or malformed.
    """
    return {name: digest for name, (_, digest) in _read(folder).items()}


def damaged_files(folder: Path, threads: int = 4, share: tuple[int, int] = (0, 1)) -> list[str]:
    """The files, by relative path, whose bytes are not those that the manifest describes. Reads everything once.

    Args:
        folder: what is compared.
        threads: files hashed at once.
        share: (i, n): only every n-th file from the i-th on, where n processes share the reading.

    Raises:
        UserError: a file is missing or of another size, or the manifest cannot be read.
    """
    check_sizes(folder)
    recorded = dict(sorted(recorded_hashes(folder).items())[share[0] :: share[1]])
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: file_hash(folder / name), recorded)
        return [name for (name, digest), now in zip(recorded.items(), found, strict=True) if digest != now]


def check_contents(folder: Path, threads: int = 4) -> None:
    """Checks that every file has the hash in the manifest. Reads everything once.

    Raises:
        UserError: as `check_sizes`; or names a file that is damaged.
    """
    for name in damaged_files(folder, threads):
        raise UserError(f"{folder / name}: damaged: its hash differs from the one in {FILE}")


def unlisted(folder: Path) -> list[str]:
    """The files, by relative path, that the manifest does not list: all where there is none, or none that is sound."""
    try:
        return _others(folder, _read(folder))
    except UserError:
        return _others(folder, ())


def _others(folder: Path, listed: Collection[str]) -> list[str]:
    # NFS renames a file that is deleted while open to .nfs...; it goes when it is closed.
    names = [name for name in _files(folder) if not name.rpartition("/")[2].startswith(".nfs")]
    return [name for name in names if name not in listed and name != FILE]


def _read(folder: Path) -> dict[str, tuple[int, str]]:
    path = folder / FILE
    manifest = read_json(path)
    if manifest.get("format") != _FORMAT:
        found = manifest.get("format")
        raise UserError(f"{path}: not an integrity manifest: format is {found!r}, expected {_FORMAT!r}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{path}: not an integrity manifest: it has no table of files")
    if not files:
        raise UserError(f"{path}: lists no files, so the files there cannot be checked")
    for name, entry in files.items():
        if not is_inside(name):
            raise UserError(f"{path}: names a file outside the folder: {name!r}")
        size, digest = (entry.get("size"), entry.get("xxh3_128")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise UserError(f"{path}: not an integrity manifest: it has no size or no hash of {name}")
    return {name: (entry["size"], entry["xxh3_128"]) for name, entry in files.items()}


def _files(folder: Path) -> list[str]:
    """Relative paths with forward slashes, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
