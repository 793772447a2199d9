"""All rows: those of `table.py`, and `TABLE` of every module `table_*.py` beside it."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.bad_inputs.run import Bad

_MODULES = sorted(path.stem for path in Path(__file__).parent.glob("table*.py"))
ROWS: list[Bad] = [bad for name in _MODULES for bad in importlib.import_module(f"tests.bad_inputs.{name}").TABLE]
