"""What the ranks of every command import, for the process that they are forked from (`launch`)."""

from fusemega.runtime.console import quiet_megatron

quiet_megatron()

import transformers.modeling_utils  # noqa: E402, F401  (AutoTokenizer imports it on first use, after the filters)

import fusemega.scoring.evaluate  # noqa: E402
import fusemega.scoring.teach  # noqa: E402
import fusemega.training.metrics  # noqa: E402
import fusemega.training.train  # noqa: E402, F401
