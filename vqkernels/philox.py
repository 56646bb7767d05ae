"""Counter-based random numbers in plain torch: the oracle of all noise in this package.

Philox-4x32-10 of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), words in Random123's order.
Word q of block b of row n is a pure function of (seed, stream, n, b, q), so every backend draws the same noise
and a backward pass draws it again instead of storing it.

    key     = (seed mod 2^32, seed >> 32)
    counter = (b, n mod 2^32, n >> 32, stream)
    U(w)    = (w >> 8) 2^-24           in [0, 1)
    U'(w)   = ((w >> 8) + 1) 2^-24     in (0, 1]
    normals = sqrt(-2 ln U'(w0)) (cos, sin)(2 pi U(w1)), the same from (w2, w3)
    gumbels = -ln max(-ln U'(w), 2^-25)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# what each stream of one seed is for
NOISE, NOISE_NEXT, DITHER, GUMBEL, SAMPLING, UPKEEP = range(6)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold uint32 values; returns the four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the product wraps in int64, its 64 bits are right all the same
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: Tensor, rows: Tensor, blocks: int, stream: int) -> Tensor:
    """Random words for some rows.

    Args:
        seed: 0-d int64.
        rows: (R,) int64, the row numbers, >= 0.
        blocks: blocks of four words per row.
        stream: which of the independent streams of this seed.

    Returns:
        (R, blocks, 4) int64 holding uint32 values.
    """
    block = torch.arange(blocks, device=rows.device).expand(rows.numel(), -1)
    row = rows[:, None].expand(-1, blocks)
    counter = (block, row & _MASK, row >> 32 & _MASK, torch.full_like(block, stream))
    return torch.stack(philox(counter, (seed & _MASK, seed >> 32 & _MASK)), dim=-1)


def uniforms(words: Tensor) -> Tensor:
    """U(w) of each word: float32 in [0, 1), a multiple of 2^-24, exact on every backend."""
    return (words >> 8).float() * 2.0**-24


def normals(words: Tensor) -> Tensor:
    """Box-Muller on the words of (..., 4): float32 standard normals of the same shape."""
    u = (words >> 8).double() * 2.0**-24
    radius = torch.sqrt(-2 * torch.log(u[..., 0::2] + 2.0**-24))
    angle = 2 * math.pi * u[..., 1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2).float()


def gumbels(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Gumbel(0, 1) of each word, -ln max(-ln U'(w), 2^-25), of the same shape in float32 or float64.

    U' is never 0. Where it is 1, the exponential variable -ln U' is taken as 2^-25, half of its next smaller step, so
    that every value is finite: between -ln(24 ln 2) = -2.8 and 25 ln 2 = 17.3.
    """
    uniform = (words >> 8).to(dtype).add_(1).mul_(2.0**-24)
    return uniform.log_().neg_().clamp_min_(2.0**-25).log_().neg_()
