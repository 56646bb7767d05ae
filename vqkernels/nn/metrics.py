"""What a codebook is doing, as device tensors; nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def code_counts(indices: Tensor, num_codes: int) -> Tensor:
    """Rows per code: (...) int64 -> (K,) int64; indices outside [0, K) count for nothing."""
    flat = indices.reshape(-1)
    inside = (flat >= 0) & (flat < num_codes)
    counts = torch.zeros(num_codes + 1, dtype=torch.int64, device=indices.device)
    return counts.index_add_(0, torch.where(inside, flat, num_codes), torch.ones_like(flat))[:-1]


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum_j p_j ln p_j), p = counts / sum (DiVeQ eq. 15): (K,) -> 0-d float32, 1 to K; nan without counts."""
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp().float()


def usage(counts: Tensor) -> Tensor:
    """Share of the codes used at least once: (K,) -> 0-d float32 in [0, 1]."""
    return (counts > 0).float().mean()
