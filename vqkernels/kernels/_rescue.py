"""What follows the search of nearest_code: certify each row, search the open ones in float64, merge.

The search returns scores t_j of s_j = x.p_j - |p_j|^2/2, and the contract minimises the float64 distance d_j
of |x|^2 - 2 s_j. With P = max |p|, B = P^2/2 and copies of the points off by at most r (0 without dither):

    |t_j - s_j|             <= |x| r + kappa (|x| (P + r) + B) + 4 (D + 2) 2^-126 (1 + |x| + P)
    |(d_j - |x|^2)/2 + s_j| <= (D + 4) 2^-52 (|x| + P)^2

The first term is Cauchy-Schwarz on the rounding of the points; rows are never rounded. The second is the
float32 product: kappa = ceil(D/16) 20 2^-24 + 4 2^-24 holds for any order of fused or unfused operations, of
bound n 2^-24 / (1 - n 2^-24) with n = D + 2, and for tensor cores, which align and truncate 17 addends:
2^-23 + 17 2^-24 for each 16 features. It also holds the roundings of half the squared norm and of the
difference. The third is underflow. With E the sum of both lines, a winner more than 2 E ahead of the rest is
the contract's; the arithmetic of E itself is covered by a factor of 1 + 2^-10.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import row_offsets
from vqkernels.kernels._points import load_point


@triton.jit
def _error_bound(row_norm, largest, lost, features):
    steps = (features + 15) // 16
    kappa = (steps * 20.0 + 4.0) * 5.9604644775390625e-08
    kappa = kappa / (1.0 - kappa)
    both = row_norm + largest
    score = row_norm * lost + kappa * (row_norm * (largest + lost) + 0.5 * largest * largest)
    underflow = 4.0 * (features + 2.0) * 1.1754943508222875e-38 * (1.0 + both)
    contract = (features + 4.0) * 2.220446049250313e-16 * both * both
    return (score + underflow + contract) * 1.0009765625


@triton.jit(do_not_specialize=["num_rows", "inner", "num_points", "splits"])
def finish(
    x,
    codes,
    dither,
    half_norms,
    largest_half_norm,
    largest_lost_square,
    best_score,
    next_score,
    best_pair,
    indices,
    sq_dist,
    open_rows,
    open_count,
    num_rows,
    inner,
    num_points,
    features,
    splits,
    x_outer,
    x_inner,
    x_feature,
    stride_code,
    stride_feature,
    EXACT: tl.constexpr,
    DITHERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the splits, decide the winning pair by the contract, list the rows that the bound leaves open."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    following = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    pair = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(splits):
        at = rows + split * num_rows.to(tl.int64)
        score = tl.load(best_score + at, mask=live, other=0.0)
        other = tl.load(next_score + at, mask=live, other=0.0)
        where = tl.load(best_pair + at, mask=live, other=0)
        following = tl.maximum(tl.maximum(following, other), tl.minimum(best, score))
        pair = tl.where(score > best, where, pair)
        best = tl.maximum(best, score)

    first = tl.minimum(2 * pair.to(tl.int64), num_points - 1)
    second = tl.minimum(first + 1, num_points - 1)
    start = x + row_offsets(rows, inner, x_outer, x_inner)
    square = tl.zeros((BLOCK_N,), tl.float64)
    first_dist = tl.zeros((BLOCK_N,), tl.float64)
    second_dist = tl.zeros((BLOCK_N,), tl.float64)
    for feature in range(features):
        value = tl.load(start, mask=live, other=0.0).to(tl.float64)
        square = square + value * value
        difference = value - load_point(
            codes, dither, first, feature, stride_code, stride_feature, live, DITHERED
        )
        first_dist = first_dist + difference * difference
        difference = value - load_point(
            codes, dither, second, feature, stride_code, stride_feature, live, DITHERED
        )
        second_dist = second_dist + difference * difference
        start += x_feature
    # a point that is not finite loses; the loads above saw it as it is
    infinity = float("inf")
    first_dist = tl.where(tl.load(half_norms + first) < infinity, first_dist, infinity)
    second_dist = tl.where(tl.load(half_norms + second) < infinity, second_dist, infinity)
    chosen = tl.where(second_dist < first_dist, second, first)
    least = tl.minimum(first_dist, second_dist)

    largest = tl.sqrt(2.0 * tl.load(largest_half_norm))
    lost = 0.0
    if DITHERED:
        lost = tl.sqrt(tl.load(largest_lost_square))
    norm = tl.sqrt(square)
    # beyond it a float32 sum may overflow; a comparison with nan leaves the row open as well
    certain = norm * (largest + lost) + 0.5 * largest * largest < 1.0e36
    if EXACT:
        bound = _error_bound(norm, largest, lost, features)
        certain = certain & (best.to(tl.float64) - following.to(tl.float64) > 2.0 * bound)
    else:
        certain = certain & (best > float("-inf"))
    finite = square < infinity
    tl.store(indices + rows, tl.where(finite, chosen, 0), mask=live)
    tl.store(sq_dist + rows, tl.where(finite, least, float("nan")).to(tl.float32), mask=live)

    is_open = (live & finite & (certain == 0)).to(tl.int32)
    found = tl.sum(is_open)
    if found > 0:
        slot = tl.atomic_add(open_count, found) + tl.cumsum(is_open) - is_open
        tl.store(open_rows + slot, rows, mask=is_open == 1)


@triton.jit
def _splits_of(count, programs, tiles, BLOCK_R: tl.constexpr):
    # few open rows: the programs share the points, so that no row keeps one processor busy for long
    groups = (count + BLOCK_R - 1) // BLOCK_R
    return groups, tl.maximum(1, tl.minimum(tiles, programs // tl.maximum(groups, 1)))


@triton.jit(do_not_specialize=["inner", "tiles"])
def rescue(
    x,
    points,
    half_norms,
    open_rows,
    open_count,
    part_dist,
    part_code,
    inner,
    features,
    padded_points,
    tiles,
    x_outer,
    x_inner,
    x_feature,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The contract for the open rows: each group of them against a share of the points, in float64."""
    programs = tl.num_programs(0)
    count = tl.load(open_count)
    groups, splits = _splits_of(count, programs, tiles, BLOCK_R)
    column = tl.arange(0, BLOCK_K)
    infinity = float("inf")
    for item in range(tl.program_id(0), groups * splits, programs):
        slot = (item // splits) * BLOCK_R + tl.arange(0, BLOCK_R)
        split = item % splits
        live = slot < count
        rows = tl.load(open_rows + slot, mask=live, other=0)
        start = x + row_offsets(rows, inner, x_outer, x_inner)
        least = tl.full((BLOCK_R,), infinity, tl.float64)
        code = tl.zeros((BLOCK_R,), tl.int32)
        for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
            index = tile * BLOCK_K + column
            dist = tl.zeros((BLOCK_R, BLOCK_K), tl.float64)
            at = start
            where = points + index
            for _ in range(features):
                value = tl.load(at, mask=live, other=0.0).to(tl.float64)
                point = tl.load(where).to(tl.float64)
                difference = value[:, None] - point[None, :]
                dist = dist + difference * difference
                at += x_feature
                where += padded_points
            good = tl.load(half_norms + index) < infinity
            dist = tl.where(good[None, :], dist, infinity)
            here = tl.min(dist, axis=1)
            lowest = tl.min(tl.where(dist == here[:, None], index[None, :], 2147483647), axis=1)
            code = tl.where(here < least, lowest, code)
            least = tl.minimum(least, here)
        tl.store(part_dist + slot.to(tl.int64) * splits + split, least, mask=live)
        tl.store(part_code + slot.to(tl.int64) * splits + split, code, mask=live)


@triton.jit(do_not_specialize=["programs", "tiles"])
def merge(
    open_rows,
    open_count,
    part_dist,
    part_code,
    indices,
    sq_dist,
    programs,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The least of each open row's shares; the lower share wins a tie, so the lowest index does."""
    count = tl.load(open_count)
    _, splits = _splits_of(count, programs, tiles, BLOCK_R)
    slot = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = slot < count
    if tl.program_id(0) * BLOCK_N < count:
        infinity = float("inf")
        least = tl.full((BLOCK_N,), infinity, tl.float64)
        code = tl.zeros((BLOCK_N,), tl.int32)
        for split in range(splits):
            dist = tl.load(part_dist + slot * splits + split, mask=live, other=0.0)
            share = tl.load(part_code + slot * splits + split, mask=live, other=0)
            code = tl.where(dist < least, share, code)
            least = tl.minimum(least, dist)
        rows = tl.load(open_rows + slot, mask=live, other=0)
        # without a finite point there is no distance
        none = least == infinity
        tl.store(indices + rows, tl.where(none, 0, code).to(tl.int64), mask=live)
        tl.store(sq_dist + rows, tl.where(none, float("nan"), least).to(tl.float32), mask=live)
