"""The sample store: what one scorer said about each sample, found by the sample's key.

manifest.py   who scored, and how
row.py        what is said about one sample
checks.py     whether a row is what the manifest says
coding.py     a row's positions as a few bytes each
shard.py      one file of rows, whole or absent
writer.py     appends shards; restartable
reader.py     rows by key, memory-mapped
missing.py    why there is no row of a sample
inspect.py, merge.py, verify.py    what `fusemega store` does
"""

from fusemega.store.manifest import Manifest
from fusemega.store.reader import Store
from fusemega.store.row import Row
from fusemega.store.writer import StoreWriter, check_store

__all__ = ["Manifest", "Row", "Store", "StoreWriter", "check_store"]
