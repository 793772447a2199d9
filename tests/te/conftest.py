"""Nothing in `inside/` is for the main environment: `test_te.py` runs it in `.venv-te`."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("FUSEMEGA_IN_VENV_TE") else ["inside"]
