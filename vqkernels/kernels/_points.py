"""The points that a search compares rows with: codes, or codes dithered along the curve through them."""

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite


@triton.jit
def load_point(codes, dither, index, feature, stride_code, stride_feature, live, DITHERED: tl.constexpr):
    """Points at `feature` in float64: c, or (1 - l) c_s + l c_{s+1} in kernels compiled unfused."""
    where = codes + index * stride_code + feature * stride_feature
    point = tl.load(where, mask=live, other=0.0).to(tl.float64)
    if DITHERED:
        weight = tl.load(dither + index, mask=live, other=0.0).to(tl.float64)
        following = tl.load(where + stride_code, mask=live, other=0.0).to(tl.float64)
        point = (1.0 - weight) * point + weight * following
    return point


@triton.jit(do_not_specialize=["num_points"])
def prepare(
    codes,
    dither,
    searched,
    exact,
    half_norms,
    wide_half_norms,
    lost_squares,
    num_points,
    features,
    padded_features,
    padded_points,
    stride_code,
    stride_feature,
    DITHERED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Transposed padded copies of the points, |p|^2/2, and what the searched copy lost by rounding.

    Points with a NaN or Inf become 0 with the half norm inf, as does the padding: their score is -inf.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_D)
    bad = tl.zeros((BLOCK_K,), tl.int32)
    square = tl.zeros((BLOCK_K,), tl.float64)
    lost = tl.zeros((BLOCK_K,), tl.float64)
    for first in range(0, features, BLOCK_D):
        feature = (first + column).to(tl.int64)
        live = (index < num_points)[:, None] & (feature < features)[None, :]
        point = load_point(
            codes, dither, index[:, None], feature[None, :], stride_code, stride_feature, live, DITHERED
        )
        bad = tl.maximum(bad, tl.max(tl.where(is_finite(point), 0, 1), axis=1))
        square += tl.sum(point * point, axis=1)
        if DITHERED:
            rest = point - point.to(tl.float32).to(tl.float64)
            lost += tl.sum(rest * rest, axis=1)
    good = (bad == 0) & (index < num_points)
    half = 0.5 * square
    tl.store(wide_half_norms + index, tl.where(good, half, 0.0))
    # a finite code keeps a finite half norm: only the others are inf
    narrow = tl.minimum(half, 3.0e38).to(tl.float32)
    tl.store(half_norms + index, tl.where(good, narrow, float("inf")))
    if DITHERED:
        tl.store(lost_squares + index, tl.where(good, lost, 0.0))
    for first in range(0, padded_features, BLOCK_D):
        feature = (first + column).to(tl.int64)
        live = good[:, None] & (feature < features)[None, :]
        point = load_point(
            codes, dither, index[:, None], feature[None, :], stride_code, stride_feature, live, DITHERED
        )
        at = feature[None, :] * padded_points + index[:, None]
        tl.store(searched + at, point.to(tl.float32).to(searched.dtype.element_ty))
        if DITHERED:
            tl.store(exact + at, point)
