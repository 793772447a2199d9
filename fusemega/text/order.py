"""Which samples (or groups) make up a step: a pure function of (seed, step), so a resumed run needs only its step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def sample_ids(step: int, global_batch_size: int, num_samples: int, seed: int) -> np.ndarray:
    """int64 [global_batch_size]: the samples of step `step` (from 0); of grouped data, the groups.

    The run is an endless sequence of epochs, each a permutation of all samples drawn from (seed, epoch). Step n takes
    the places [n * global_batch_size, (n + 1) * global_batch_size) of this sequence, across the border of two epochs if
    needed. So step = consumed_samples // global_batch_size.

    >>> first_epoch = [*sample_ids(0, 2, 4, seed=1), *sample_ids(1, 2, 4, seed=1)]
    >>> sorted(int(i) for i in first_epoch)
    [0, 1, 2, 3]
    """
    if num_samples < 1:
        raise ValueError("no samples to order")
    places = np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, num_samples)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = _permutation(num_samples, seed, int(epoch))[within[here]]
    return ids


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Sorted raw bits of a counter-based generator: numpy guarantees these streams, but not those of `permutation`.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    permutation = np.argsort(bits, kind="stable")
    permutation.flags.writeable = False
    return permutation
