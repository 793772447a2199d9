"""The cache folder, for everything that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else `$FUSEMEGA_CACHE`, else `~/.cache/fusemega`; not created."""
    return Path(cache_dir or os.environ.get("FUSEMEGA_CACHE") or Path.home() / ".cache" / "fusemega")
