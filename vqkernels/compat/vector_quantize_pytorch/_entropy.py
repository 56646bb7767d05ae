"""Entropies of soft assignments to all codes, in bounded memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqkernels.nn._random import all_sum, distributed

# probabilities that are kept at a time
_CHUNK = 1 << 22
# below it the logarithm of a probability is that of this one, as in the peer
_LEAST = 1e-5


def entropies(y: Tensor, codes: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of rows, and entropy of the mean, of the softmax over codes.

        p_n = softmax_j(2 inv_temperature y_n . c_j),   H(p) = -sum_j p_j ln max(p_j, 1e-5)

    Args:
        y: (N, C, b) latents of C codebooks.
        codes: (K, b).
        inv_temperature: of the softmax.

    Returns:
        E[H(p_n)] and H(E[p_n]), 0-d, means over codebooks; E of the second is over the rows of all processes.
    """
    step = max(1, _CHUNK // (y.shape[1] * len(codes)))
    if len(y) <= step:
        single, total = _sums(y, codes, inv_temperature)
    else:
        single, total = y.new_zeros(()), y.new_zeros(y.shape[1], len(codes))
        for part in y.split(step):
            given = part, codes, inv_temperature
            found = checkpoint(_sums, *given, use_reentrant=False, preserve_rng_state=False)
            entropy, share = cast("tuple[Tensor, Tensor]", found)
            single, total = single + entropy, total + share
    mean = total / len(y)
    if distributed():
        # each rank's own with its gradient, the others' as numbers
        world = torch.distributed.get_world_size()
        mean = mean + (all_sum(mean.detach().clone()) / world - mean.detach())
    return single / (len(y) * y.shape[1]), _entropy(mean).mean()


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=_LEAST).log()).sum(-1)


def _sums(y: Tensor, codes: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Sum over rows of entropies, 0-d, and of probabilities, (C, K)."""
    p = (2 * inv_temperature * (y @ codes.t())).softmax(-1)  # (n, C, K)
    return _entropy(p).sum(), p.sum(0)
