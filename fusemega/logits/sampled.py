"""Ids drawn from every token's own distribution: an unbiased row of a teacher (random sampling knowledge distillation,
Anshumann et al., arXiv:2503.16870, with the teacher itself as proposal).

In S draws with replacement from p = softmax(logits / temperature), id v occurs c_v times, and E[c_v / S] = p_v. So a
loss that is linear in the target, as cross-entropy is, has the dense target's loss and gradient as its expectation. For
the k most probable ids this is not true: the other ids are always left out.

A draw is the inverse of the cumulative distribution in the order of ids, at a uniform number that the caller gives. It
is the same id for every split of the vocabulary over ranks, up to the rounding of float64.

Shape suffixes: T tokens, C tokens of a chunk, P supervised positions of a sample, H hidden size, V this rank's
vocabulary rows, K listed ids of a query, S draws, R ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits._head import MIB, ChunkedHead
from fusemega.logits._query import Query

_CUMULATED_BYTES = 64 * MIB


def uniforms(seed: int, key: bytes, positions: int, num_samples: int) -> np.ndarray:
    """float64 [P, S] in [0, 1), of one sample: a pure function of the seed, the sample's key, and the place.

    The bits are those of the counter-based generator Philox (Salmon et al., 2011), keyed by a hash of seed and key.
    """
    digest = hashlib.blake2b(b"%d:" % seed + key, digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(positions * num_samples)
    # The upper 53 bits, which a float64 holds exactly: times 2^-53 they stay below 1.
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(positions, num_samples)


@torch.no_grad()
def sample_ids(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    uniforms_TS: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One id of softmax(logits / temperature) for each uniform number, and the labels' log-probs.

    Args:
        uniforms_TS: float64 in [0, 1), the same on every rank of the group.
        labels_T: int64, the token that follows; from the same logits, so that the head is multiplied with once.
        (others): as in `fusemega.logits.vocab.sparse_log_probs`.

    Returns:
        ids_TS: int64, in the order of the uniform numbers; ids of probability 0 are never drawn.
        label_logp_T: log softmax(logits) at the labels, at temperature 1, fp32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    if uniforms_TS.dim() != 2 or len(uniforms_TS) != len(hidden_TH) or uniforms_TS.dtype != torch.float64:
        raise ValueError(f"uniforms {list(uniforms_TS.shape)} of {uniforms_TS.dtype}: expected float64 [T, S]")
    if not uniforms_TS.is_cpu:
        torch._assert_async(((uniforms_TS >= 0) & (uniforms_TS < 1)).all(), "uniforms outside 0 to below 1")
    elif uniforms_TS.numel() and not (uniforms_TS.min() >= 0 and uniforms_TS.max() < 1):
        raise ValueError("uniforms: expected numbers from 0 to below 1")
    head = ChunkedHead(
        hidden_TH,
        weight_VH,
        [Query(labels_T[:, None])],
        group=group,
        vocab_size=vocab_size,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
    )
    ids, labels = [], []
    for rows in head.chunks:
        logits_CV = head.logits(rows)
        (label,), (sums,) = head.reduce(logits_CV, [Query(labels_T[rows, None])])
        labels.append(label.logp_TK[:, 0])
        # Padding rows count too: every rank must make as many collective calls.
        at_once = max(1, _CUMULATED_BYTES // (8 * max(weight_VH.shape[0], 1)))
        columns = (logits_CV, sums.peak_C, uniforms_TS[rows])
        for logits, peak, uniform in zip(*(column.split(at_once) for column in columns), strict=True):
            ids.append(_draw(logits, peak, uniform, temperature, head))
    return torch.cat(ids), torch.cat(labels)


def _draw(logits_CV: Tensor, peak_C: Tensor, uniforms_CS: Tensor, temperature: float, head: ChunkedHead) -> Tensor:
    """Ids [C, S]. Collective: the ranks' masses are gathered, then the rank in which a draw falls gives its id."""
    weight_CV = logits_CV.double().sub_(peak_C[:, None]).div_(temperature).exp_()
    cumulated_CV = weight_CV.cumsum_(1)
    mass_C = cumulated_CV[:, -1] if cumulated_CV.shape[1] else cumulated_CV.new_zeros(len(cumulated_CV))
    until_RC1 = _gather(mass_C, head.group).cumsum(0)[..., None]
    target_CS = uniforms_CS * until_RC1[-1]
    # The first rank whose mass, with that of the ranks before it, exceeds the target: one that has mass.
    rank = dist.get_rank(head.group) if head.group is not None else 0
    mine_CS = (until_RC1 <= target_CS).sum(0) == rank
    if not cumulated_CV.shape[1]:  # a rank of padding rows
        ids_CS = torch.zeros_like(mine_CS, dtype=torch.int64)
    else:
        within_CS = target_CS - until_RC1[rank - 1] if rank else target_CS
        # Rounding may not carry a draw past this rank's last id that has mass.
        last_C1 = torch.nextafter(mass_C, torch.zeros_like(mass_C))[:, None]
        columns_CS = torch.searchsorted(cumulated_CV, torch.minimum(within_CS, last_C1), right=True)
        ids_CS = torch.where(mine_CS, columns_CS + head.first_id, 0)
    if head.group is not None and ids_CS.numel():
        dist.all_reduce(ids_CS, group=head.group)  # every draw is one rank's; the others add 0
    return ids_CS


def _gather(mass_C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or not mass_C.numel():
        return mass_C[None]
    parts = [torch.empty_like(mass_C) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mass_C.contiguous(), group=group)
    return torch.stack(parts)


def count_draws(ids_PS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids and how often each was drawn, of each position.

    Returns:
        ids_PS: int32, by falling count, equal counts by rising id; -1 behind them.
        counts_PS: int64, 0 behind them.
    """
    positions, draws = ids_PS.shape
    sorted_PS = np.sort(ids_PS, axis=1)
    new_PS = np.ones(ids_PS.shape, dtype=bool)
    new_PS[:, 1:] = sorted_PS[:, 1:] != sorted_PS[:, :-1]
    place_PS = new_PS.cumsum(1) - 1
    flat = (np.arange(positions)[:, None] * draws + place_PS).reshape(-1)
    counts_PS = np.bincount(flat, minlength=positions * draws).reshape(positions, draws)
    distinct_PS = np.full(ids_PS.shape, -1, dtype=np.int32)
    np.put_along_axis(distinct_PS, place_PS, sorted_PS.astype(np.int32), axis=1)
    order = np.argsort(-counts_PS, axis=1, kind="stable")
    return np.take_along_axis(distinct_PS, order, axis=1), np.take_along_axis(counts_PS, order, axis=1)
