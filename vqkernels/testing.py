"""Inputs, oracles and error bounds shared by the tests and the benches.

The oracles are written from the papers and from the contract, independently of the ops: they know no backend.
"""

from __future__ import annotations

import itertools
import math
import os

import torch
from torch import Tensor

from vqkernels.profiling.float64 import NORMAL_ERROR as NORMAL_ERROR
from vqkernels.profiling.float64 import Family as Family
from vqkernels.profiling.float64 import brute_force as brute_force
from vqkernels.profiling.float64 import family as family
from vqkernels.profiling.float64 import family_bounds as family_bounds

# where tests put their tensors: VQKERNELS_TEST_DEVICE=cuda on a machine that has one
DEVICE = torch.device(os.environ.get("VQKERNELS_TEST_DEVICE", "cpu"))


def brute_force_segment(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `nearest_segment`, to the letter, one row and one segment at a time in Python floats.

    Args:
        x: (N, D). codes: (K, D).

    Returns:
        segments (N,) int64, positions and squared distances (N,) float64; 0, 0 and nan for a row that has none.
    """
    results = []
    for row in x.double().tolist():
        best = (0, 0.0, float("nan"))
        for s, (a, b) in enumerate(itertools.pairwise(codes.double().tolist())):
            if not all(map(math.isfinite, row + a + b)):
                continue
            along = length = total = 0.0
            for v, first, second in zip(row, a, b, strict=True):
                along += (v - first) * (second - first)
                length += (second - first) * (second - first)
            t = min(max(along / length, 0.0), 1.0) if length > 0 else 0.0
            for v, first, second in zip(row, a, b, strict=True):
                difference = v - (second if t == 1 else first + t * (second - first))
                total += difference * difference
            if not total >= best[2]:
                best = (s, t, total)
        results.append(best)
    segments, position, sq_dist = zip(*results, strict=True)
    return (
        torch.tensor(segments, device=x.device),
        torch.tensor(position, dtype=torch.float64, device=x.device),
        torch.tensor(sq_dist, dtype=torch.float64, device=x.device),
    )


def clusters(
    n: int, k: int, d: int, *, seed: int = 0, spread: float = 0.3, offset: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x (N, D) near codes (K, D), float32, such that every code is somebody's nearest when N >= K."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(k, d, generator=generator)
    x = codes[torch.arange(n) % k] + spread * torch.randn(n, d, generator=generator)
    return ((x * scale) + offset).to(DEVICE), ((codes * scale) + offset).to(DEVICE)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values (N, D) behind other strides: "contiguous", "sliced", "transposed" or "channels" (NCHW)."""
    n, d = x.shape
    if layout == "sliced":
        wide = torch.full((2 * n, d + 3), float("nan"), dtype=x.dtype, device=x.device)
        wide[::2, 1 : d + 1] = x
        return wide[::2, 1 : d + 1]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "channels":
        b = next(b for b in (5, 4, 3, 2, 1) if n % b == 0)
        return x.view(b, n // b, d).transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


LAYOUTS = ("contiguous", "sliced", "transposed", "channels")
