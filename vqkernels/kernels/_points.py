"""The points that a search compares rows with: codes, or codes dithered along the curve through them.

Tensor cores multiply halves. Where rows and codes are halves of one type their products are exact, and the points
are the codes. Everything else is searched in float16: centred by the mean m of the codes, which moves every
distance alike, and scaled by powers of two. Exact points are formed again, in float64, where they decide.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite

# what a program of `prepare` reports: squared norm and squared loss of the searched copies, half norm, squared norm
# of both codes of a dithered point, and the lowest index of a finite point
NUM_FACTS = tl.constexpr(5)
# beyond every index, and a float32: constants reach float64 by way of it
NO_POINT = tl.constexpr(2147483648)


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


@triton.jit
def load_near_point(codes, dither, index, feature, stride_code, stride_feature, live, DITHERED: tl.constexpr):
    """Points at `feature` in float32: exact codes, or dithered points within 2^-21 of the norm of their codes."""
    where = codes + index * stride_code + feature * stride_feature
    point = tl.load(where, mask=live, other=0.0).to(tl.float32)
    if DITHERED:
        weight = tl.load(dither + index, mask=live, other=0.0).to(tl.float32)
        following = tl.load(where + stride_code, mask=live, other=0.0).to(tl.float32)
        point = (1.0 - weight) * point + weight * following
    return point


@triton.jit
def scale_of(largest, limit):
    """The power of two that brings `largest` into [2^14, 2^15), where float16 is most precise; at most `limit`."""
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15), 254)
    return tl.minimum(((268 - exponent) << 23).to(tl.float32, bitcast=True), limit)


@triton.jit(do_not_specialize=["num_codes"])
def survey(
    codes,
    sums,
    largest,
    num_codes,
    features,
    padded_features,
    stride_code,
    stride_feature,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of the codes a program sees: sums by feature, and the largest magnitude; what is not finite counts as 0."""
    column = tl.arange(0, BLOCK_D)
    most = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, padded_features, BLOCK_D):
        feature = (first + column).to(tl.int64)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for block in range(tl.program_id(0) * BLOCK_K, num_codes, tl.num_programs(0) * BLOCK_K):
            index = block + tl.arange(0, BLOCK_K).to(tl.int64)
            live = (index < num_codes)[:, None] & (feature < features)[None, :]
            at = codes + index[:, None] * stride_code + feature[None, :] * stride_feature
            value = tl.load(at, mask=live, other=0.0).to(tl.float32)
            value = tl.where(is_finite(value), value, 0.0)
            most = tl.maximum(most, tl.max(tl.abs(value), axis=1))
            total += tl.sum(value, axis=0)
        tl.store(sums + tl.program_id(0) * padded_features + feature, total)
    tl.store(largest + tl.program_id(0), tl.max(most, axis=0))


@triton.jit(do_not_specialize=["num_points", "num_codes", "surveys"])
def prepare(
    codes,
    dither,
    sums,
    largest,
    points,
    half_norms,
    centre,
    facts,
    num_points,
    num_codes,
    surveys,
    features,
    padded_features,
    padded_points,
    stride_code,
    stride_feature,
    DITHERED: tl.constexpr,
    SCALED: tl.constexpr,
    SURVEYS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Negated half copies of the points, half their squared norms, and what a search must know of all of them.

    `centre` holds the mean that was taken from them and, after it, the scale. A point with a NaN or Inf becomes 0
    with the half norm FAR, as does the padding: it loses against every other.
    """
    column = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, SURVEYS)
    scale = tl.full((1,), 1.0, tl.float32)
    if SCALED:
        seen = tl.load(largest + lane, mask=lane < surveys, other=0.0)
        scale = scale_of(tl.full((1,), 2.0, tl.float32) * tl.max(seen, axis=0), float("inf"))
    wide_scale = scale.to(tl.float64)
    norm = tl.zeros((BLOCK_K,), tl.float64)
    loss = tl.zeros((BLOCK_K,), tl.float64)
    half_norm = tl.zeros((BLOCK_K,), tl.float64)
    reach = tl.zeros((BLOCK_K,), tl.float64)
    lowest = tl.full((BLOCK_K,), NO_POINT, tl.int64)
    for block in range(tl.program_id(0) * BLOCK_K, padded_points, tl.num_programs(0) * BLOCK_K):
        index = block + tl.arange(0, BLOCK_K).to(tl.int64)
        bad = tl.zeros((BLOCK_K,), tl.int32)
        own_reach = tl.zeros((BLOCK_K,), tl.float64)
        for first in range(0, features, BLOCK_D):
            feature = (first + column).to(tl.int64)
            live = (index < num_points)[:, None] & (feature < features)[None, :]
            point = load_point(
                codes, dither, index[:, None], feature[None, :], stride_code, stride_feature, live, DITHERED
            )
            bad = tl.maximum(bad, tl.max(tl.where(is_finite(point), 0, 1), axis=1))
            if DITHERED:
                at = codes + index[:, None] * stride_code + feature[None, :] * stride_feature
                one = tl.load(at, mask=live, other=0.0).to(tl.float64)
                two = tl.load(at + stride_code, mask=live, other=0.0).to(tl.float64)
                own_reach += tl.sum(one * one + two * two, axis=1)
        good = (bad == 0) & (index < num_points)
        square = tl.zeros((BLOCK_K,), tl.float64)
        kept_square = tl.zeros((BLOCK_K,), tl.float64)
        lost_square = tl.zeros((BLOCK_K,), tl.float64)
        for first in range(0, padded_features, BLOCK_D):
            feature = (first + column).to(tl.int64)
            live = good[:, None] & (feature < features)[None, :]
            point = load_point(
                codes, dither, index[:, None], feature[None, :], stride_code, stride_feature, live, DITHERED
            )
            if SCALED:
                at = sums + lane.to(tl.int64)[:, None] * padded_features + feature[None, :]
                mean = tl.sum(tl.load(at, mask=(lane < surveys)[:, None], other=0.0), axis=0) / num_codes
                mean = tl.where(is_finite(mean), mean, 0.0)
                if tl.program_id(0) == 0:
                    tl.store(centre + feature, mean)
                point = tl.where(live, (point - mean.to(tl.float64)[None, :]) * wide_scale[:, None], 0.0)
            kept = point.to(tl.float32).to(points.dtype.element_ty)
            tl.store(points + index[:, None] * padded_features + feature[None, :], -kept)
            square += tl.sum(point * point, axis=1)
            if SCALED:
                wide = kept.to(tl.float64)
                kept_square += tl.sum(wide * wide, axis=1)
                lost_square += tl.sum((point - wide) * (point - wide), axis=1)
        # a finite point keeps its distance from the others' half norm, which is no inf: a number in its low bits
        # would make a nan of it
        narrow = tl.minimum(0.5 * square, 0.5 * FAR).to(tl.float32)
        tl.store(half_norms + index, tl.where(good, narrow, FAR))
        if not SCALED:
            kept_square = square
        norm = tl.maximum(norm, kept_square)
        loss = tl.maximum(loss, lost_square)
        half_norm = tl.maximum(half_norm, 0.5 * square)
        reach = tl.maximum(reach, tl.where(good, own_reach, 0.0))
        lowest = tl.minimum(lowest, tl.where(good, index, NO_POINT))
    out = facts + tl.program_id(0) * NUM_FACTS
    tl.store(out, tl.max(norm, axis=0))
    tl.store(out + 1, tl.max(loss, axis=0))
    tl.store(out + 2, tl.max(half_norm, axis=0))
    tl.store(out + 3, tl.max(reach, axis=0))
    tl.store(out + 4, tl.min(lowest, axis=0).to(tl.float64))
    if tl.program_id(0) == 0:
        tl.store(centre + padded_features + tl.arange(0, 1), scale)


@triton.jit
def load_facts(facts, programs, number, BLOCK_P: tl.constexpr):
    """One of the facts that the programs of `prepare` wrote: the maximum, or of the index the minimum."""
    program = tl.arange(0, BLOCK_P)
    found = tl.load(facts + program * NUM_FACTS + number, mask=program < programs, other=0.0)
    if number == 4:
        found = tl.where(program < programs, found, NO_POINT)
        return tl.min(found, axis=0)
    return tl.max(found, axis=0)
