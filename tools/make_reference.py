"""Writes docs/reference from the code. `python tools/make_reference.py`, after a key or an option has changed."""

from __future__ import annotations

from pathlib import Path

from fusemega.cli.reference import write
from fusemega.runtime.console import quiet_megatron

if __name__ == "__main__":
    quiet_megatron()
    write(Path(__file__).resolve().parents[1] / "docs" / "reference")
