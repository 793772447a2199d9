"""Which requests are computed together: a pure function of all that are wanted, whatever is there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusemega.sampling.engine import SampleRequest


def plan_batches(
    requests: Sequence[SampleRequest], lengths: Mapping[str, int], batch_size: int
) -> list[list[SampleRequest]]:
    """Batches of neighbours in length, the longest first: what does not fit into memory shows at once.

    Args:
        requests: in any order; the result does not depend on it.
        lengths: key -> tokens of the prompt.
        batch_size: requests in a batch.
    """
    ordered = sorted(requests, key=lambda request: (-lengths[request.key], request.key, request.sample))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
