"""Checks that a Hugging Face folder is as fusemega wrote it, with its `integrity.json`.

Other programs ignore that file, and a user may edit the folder (a README, another template). So damaged weights are
refused; small files that matter and were changed are named; other files are not checked. A folder without
`integrity.json`, as other programs write it, is used as it is.
"""

from __future__ import annotations

from fusemega.errors import UserError
from fusemega.files.integrity import FILE, file_hash, recorded_hashes
from fusemega.hf.folder import HFFolder
from fusemega.hf.side_files import is_side_file, side_files
from fusemega.runtime.console import warn


def check_written(folder: HFFolder) -> None:
    """Compares the weights with `integrity.json`. One process.

    Reads them all, unless this process or another has done so and they were not touched since.

    Raises:
        UserError: weights were changed.
    """
    if not (folder.path / FILE).is_file():
        return
    for name in damaged_weights(folder):
        raise UserError(
            f"{folder.path / name}: damaged, or written by another program: its hash differs from the one in {FILE} "
            f"(to use these weights, delete {FILE})"
        )
    if others := changed_files(folder):
        warn(f"{folder.path}: {', '.join(others)}: changed after fusemega wrote them ({FILE}); used as they are")


def damaged_weights(folder: HFFolder, again: bool = False) -> list[str]:
    """The files of weights, by relative path, whose hash is not the one in `integrity.json`.

    Args:
        again: read them even if their hashes are cached.
    """
    recorded = recorded_hashes(folder.path)
    # The first of the files is config.json.
    hashes = {path: file_hash(path) if again else folder.hashes()[path]["file"] for path in folder.files()[1:]}
    found = {path.relative_to(folder.path).as_posix(): digest for path, digest in hashes.items()}
    return sorted(name for name, digest in found.items() if recorded.get(name) != digest)


def changed_files(folder: HFFolder) -> list[str]:
    """The files of configuration, tokenizer and the like that were changed, removed or added."""
    there = {name: file_hash(folder.path / name) for name in side_files(folder.path)}
    listed = {name: digest for name, digest in recorded_hashes(folder.path).items() if is_side_file(name)}
    return sorted(name for name in there.keys() | listed.keys() if there.get(name) != listed.get(name))
