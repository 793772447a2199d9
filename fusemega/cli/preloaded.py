"""What the ranks of every command import, for the process that they are forked from (`launch`)."""

from fusemega.runtime.console import quiet_megatron

quiet_megatron()

import fusemega.scoring.evaluate  # noqa: E402  (after the filters are set)
import fusemega.scoring.teach  # noqa: E402
import fusemega.training.metrics  # noqa: E402
import fusemega.training.train  # noqa: E402, F401
