"""A data set's samples in the windows of a store's scorer, for commands that look at both."""

from __future__ import annotations

from fusemega.config import validate
from fusemega.files.cache import cache_folder
from fusemega.store.reader import Store
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.tokenizer import Tokenizer


def scored_samples(store: Store, data: str, tokenizer: Tokenizer, **settings: str | int | None) -> TokenizedDataset:
    """The samples of `data`, read from the cache or tokenized into it.

    Args:
        data: a file, folder or glob of rows.
        tokenizer: the scorer's.
        settings: further keys of a run file's `data`, with which the store was taught; None: the default.

    Raises:
        UserError: the store is of another tokenizer, template or mask; or the data cannot be read.
    """
    store.check({"tokenizer": tokenizer.content_hash, "template": tokenizer.template_hash, "mask_policy": MASK_POLICY})
    given = {key: value for key, value in settings.items() if value is not None}
    config = validate(DataConfig, {"path": data, "seq_length": store.manifest.truncation, **given}, "data")
    return prepare(config, tokenizer, cache_folder() / "data", vocab_size=store.manifest.vocab_size, progress=True)
