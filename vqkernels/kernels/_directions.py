"""What the directional kernels share: e = p - x, and the vector w whose direction is u."""

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite
from vqkernels.kernels._noise import normal_tile

NOISY = tl.constexpr(0)
DETACH = tl.constexpr(1)
RANDOM = tl.constexpr(2)


@triton.jit
def load_rows(start, feature, stride_feature, mask):
    """A float32 tile of rows that begin at `start`."""
    at = start[:, None] + feature.to(tl.int64)[None, :] * stride_feature
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def direction(
    value,
    codes,
    index,
    seed,
    number,
    first,
    feature,
    mask,
    noise_std,
    stride_code,
    stride_feature,
    STREAM: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a tile of rows whose features begin at `first`: the point p, e = p - x and w.

    w = noise_std n + e, e or n is along the direction u = w/|w|; n are the normals of the rows' numbers.
    """
    point = load_rows(codes + index * stride_code, feature, stride_feature, mask)
    e = point - value
    if DIRECTION == DETACH:
        w = e
    else:
        w = normal_tile(seed, number, first, STREAM, BLOCK_N, BLOCK_D)
        if DIRECTION == NOISY:
            w = noise_std * w + e
        w = tl.where(mask, w, 0.0)
    return point, e, w


@triton.jit
def wide_sum(a, b):
    """Sum of products of each row in float64, where 1e-30 squared survives."""
    return tl.sum(a.to(tl.float64) * b.to(tl.float64), axis=1)


@triton.jit
def any_not_finite(value):
    """1 for each row of a tile with a NaN or Inf, else 0."""
    return tl.max(tl.where(is_finite(value), 0, 1), axis=1)


@triton.jit
def pulled(e, strength, r):
    """strength e / r of each row of a tile, 0 where r = 0 (or NaN)."""
    # 1/r overflows where r is subnormal
    boost = tl.where(r < 1e-20, 18446744073709551616.0, 1.0)
    inverse = tl.where(r > 0, 1.0 / (r * boost), 0.0)
    along = strength[:, None] * ((e * boost[:, None]) * inverse[:, None])
    return tl.where((r > 0)[:, None], along, 0.0)
