"""Hugging Face folder or hub id to Megatron folder: the same as `fusemega convert import`."""

from __future__ import annotations

import sys

from fusemega.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "import"]
    main()
