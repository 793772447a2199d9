"""Reads rows of parquet files from any source, a limited number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.opening import MIB, open_regular

BATCH_ROWS = 256
BATCH_BYTES = 1024 * MIB


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in order, as mappings of column names to Python values.

    Raises:
        UserError: it cannot be read, is not a whole parquet file, or has values that Python cannot hold.
    """
    import pyarrow.parquet  # slow to import, and needed only here

    with open_regular(path) as file:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
                if batch.nbytes > BATCH_BYTES:
                    raise UserError(f"{path}: {batch.num_rows} rows of {batch.nbytes} bytes; allowed: {BATCH_BYTES}")
                names = batch.schema.names
                if len(set(names)) < len(names):
                    raise UserError(f"{path}: two columns have the same name, of {', '.join(names)}")
                yield from batch.to_pylist()
        except UserError:
            raise
        except Exception as error:  # pyarrow's own types, and those of values that Python cannot hold
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: not a whole parquet file: {reason}") from None
