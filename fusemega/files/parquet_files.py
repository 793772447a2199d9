"""Reads rows of parquet files from any source, a limited number of bytes at a time.

A text that repeats stands in such a file once, and pages are compressed: a file of 2 kB can have rows of gigabytes. How
large they are shows only when they are unpacked. So while that is done, the process may not grow beyond a limit.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.opening import MIB, open_regular

BATCH_ROWS = 256
BATCH_BYTES = 1024 * MIB
_ROOM = 4 * BATCH_BYTES  # for a batch while it is unpacked, its values in Python, and the library's own memory


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in order, as mappings of column names to Python values.

    Raises:
        UserError: it cannot be read, is not a whole parquet file, or has values that Python cannot hold.
    """
    import pyarrow.parquet  # slow to import, and needed only here

    with open_regular(path) as file:
        room = _ROOM + os.fstat(file.fileno()).st_size
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS)
            while True:
                with _limited(room):
                    batch = next(batches, None)
                    rows = [] if batch is None or batch.nbytes > BATCH_BYTES else batch.to_pylist()
                if batch is None:
                    return
                if batch.nbytes > BATCH_BYTES:
                    raise UserError(f"{path}: {batch.num_rows} rows of {batch.nbytes} bytes; allowed: {BATCH_BYTES}")
                names = batch.schema.names
                if len(set(names)) < len(names):
                    raise UserError(f"{path}: two columns have the same name, of {', '.join(names)}")
                yield from rows
        except UserError:
            raise
        except MemoryError:  # pyarrow's is one
            raise UserError(f"{path}: {BATCH_ROWS} rows of more than {BATCH_BYTES} bytes, which are allowed") from None
        except Exception as error:  # pyarrow's own types, and those of values that Python cannot hold
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: not a whole parquet file: {reason}") from None


@contextmanager
def _limited(room: int) -> Iterator[None]:
    """In the block, allocations fail once this process has grown by `room` bytes of address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + room
    if before[0] != resource.RLIM_INFINITY and before[0] <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
