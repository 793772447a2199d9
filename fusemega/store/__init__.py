"""The sample store: one scorer's rows, found by the key of a sample.

manifest.py   the scorer and its settings
row.py        what the scorer says about one sample
checks.py     whether a row agrees with the manifest
coding.py     the compact encoding of a row
shard.py      one file of rows, complete or absent
writer.py     appends shards; restartable
reader.py     rows by key, memory-mapped
missing.py    why a sample has no row
samples.py    a data set in the windows of a store's scorer
inspect.py, merge.py, verify.py    the verbs of `fusemega store`
"""

from fusemega.store.manifest import Manifest
from fusemega.store.reader import Store
from fusemega.store.row import Row
from fusemega.store.writer import StoreWriter, check_store

__all__ = ["Manifest", "Row", "Store", "StoreWriter", "check_store"]
