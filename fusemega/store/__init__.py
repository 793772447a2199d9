"""The sample store: what one scorer said about each sample, found by the sample's key.

manifest.py   who scored, and how
shard.py      one file: columns of rows, whole or absent
writer.py     appends shards; restartable
reader.py     rows by key, memory-mapped
"""

from fusemega.store.manifest import Manifest
from fusemega.store.reader import Store
from fusemega.store.shard import Row
from fusemega.store.writer import StoreWriter, check_store

__all__ = ["Manifest", "Row", "Store", "StoreWriter", "check_store"]
