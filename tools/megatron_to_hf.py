"""Megatron folder to Hugging Face folder: the same as `fusemega convert export`."""

from __future__ import annotations

import sys

from fusemega.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "export"]
    main()
