"""The parts of the check are a package below `benchmarks`, where their command finds it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))
