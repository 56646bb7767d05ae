"""What follows the search of nearest_segment: decide by the contract, certify, search the open rows in float64."""

# triton's stubs do not know what its compiler accepts
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._polyline import clamped, difference, segment_at


@triton.jit
def starts_of(rows, inner, stride_outer, stride_inner):
    """Element offset of each int64 row of a (B, M, D) tensor with M = `inner`."""
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner


@triton.jit
def _error_bound(norm, largest, features):
    """E of nearest_segment.py: of a score, of a and of the contract's own arithmetic."""
    kappa = ((features + 15) // 16 * 20.0 + 4.0) * 5.9604644775390625e-08
    kappa = kappa / (1.0 - kappa)
    product = norm * largest
    score = 3.0 * kappa * product + 5.9604644775390625e-08 * (16.0 * product + 32.0 * largest * largest)
    both = norm + 3.0 * largest
    underflow = 12.0 * (features + 2.0) * 1.1754943508222875e-38 * (1.0 + both) + 7.52316384526264e-37
    contract = (features + 16.0) * 2.220446049250313e-16 * both * both
    return (score + underflow + contract) * 1.0009765625


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes", "shares"])
def finish(
    x,
    codes,
    largest_square,
    best_score,
    next_score,
    best_group,
    segments,
    position,
    sq_dist,
    open_rows,
    open_count,
    num_rows,
    inner,
    num_codes,
    features,
    shares,
    x_outer,
    x_inner,
    x_feature,
    stride_code,
    stride_feature,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the shares, decide the winning group and the segment before it, list the rows left open."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    infinity = float("inf")
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    following = best
    group = tl.zeros((BLOCK_N,), tl.int32)
    for share in range(shares):
        at = rows + share * num_rows.to(tl.int64)
        score = tl.load(best_score + at, mask=live, other=0.0)
        other = tl.load(next_score + at, mask=live, other=0.0)
        where = tl.load(best_group + at, mask=live, other=0)
        following = tl.maximum(tl.maximum(following, other), tl.minimum(best, score))
        group = tl.where(score > best, where, group)
        best = tl.maximum(best, score)

    # one more than a group, of twice as many lanes
    lane = tl.arange(0, 2 * GROUP)
    segment = (group.to(tl.int64) * GROUP)[:, None] + (lane - 1)[None, :]
    wanted = live[:, None] & (lane <= GROUP)[None, :] & (segment >= 0) & (segment < num_codes - 1)
    start = x + starts_of(rows, inner, x_outer, x_inner)
    where = codes + segment * stride_code
    square = tl.zeros((BLOCK_N,), tl.float64)
    along = tl.zeros((BLOCK_N, 2 * GROUP), tl.float64)
    length = along
    for _ in range(features):
        value = tl.load(start, mask=live, other=0.0).to(tl.float64)
        c = tl.load(where, mask=wanted, other=0.0).to(tl.float64)
        end = tl.load(where + stride_code, mask=wanted, other=0.0).to(tl.float64)
        square = square + value * value
        step = end - c
        along = along + (value[:, None] - c) * step
        length = length + step * step
        start += x_feature
        where += stride_feature
    usable = wanted & (length < infinity)
    t = clamped(along, length)
    start = x + starts_of(rows, inner, x_outer, x_inner)
    where = codes + segment * stride_code
    total = tl.zeros((BLOCK_N, 2 * GROUP), tl.float64)
    for _ in range(features):
        value = tl.load(start, mask=live, other=0.0).to(tl.float64)
        c = tl.load(where, mask=wanted, other=0.0).to(tl.float64)
        end = tl.load(where + stride_code, mask=wanted, other=0.0).to(tl.float64)
        apart = difference(value[:, None], c, end, t)
        total = total + apart * apart
        start += x_feature
        where += stride_feature
    finite = square < infinity
    # a row without a distance may be nan, of which there is no minimum
    total = tl.where(usable & finite[:, None], total, infinity)
    least = tl.min(total, axis=1)
    chosen = tl.min(tl.where(total == least[:, None], segment, 9223372036854775807), axis=1)
    at_t = tl.max(tl.where(segment == chosen[:, None], t, 0.0), axis=1)

    largest = tl.sqrt(tl.load(largest_square))
    norm = tl.sqrt(square)
    # beyond it a float32 sum may overflow; a comparison with nan leaves the row open as well
    certain = (norm + largest) * largest < 1.0e36
    bound = _error_bound(norm, largest, features)
    certain = certain & (best.to(tl.float64) - following.to(tl.float64) > 3.0 * bound)
    tl.store(segments + rows, tl.where(finite, chosen, 0), mask=live)
    tl.store(position + rows, tl.where(finite, at_t, 0.0).to(tl.float32), mask=live)
    tl.store(sq_dist + rows, tl.where(finite, least, float("nan")).to(tl.float32), mask=live)

    is_open = tl.where(live & finite, tl.where(certain, 0, 1), 0)
    found = tl.sum(is_open)
    if found > 0:
        slot = tl.atomic_add(open_count, found) + tl.cumsum(is_open) - is_open
        tl.store(open_rows + slot, rows, mask=is_open == 1)


@triton.jit
def _splits_of(count, programs, tiles, BLOCK_R: tl.constexpr):
    # few open rows: the programs share the segments, so that no row keeps one processor busy for long
    groups = (count + BLOCK_R - 1) // BLOCK_R
    return groups, tl.maximum(1, tl.minimum(tiles, programs // tl.maximum(groups, 1)))


@triton.jit(do_not_specialize=["inner", "tiles"])
def rescue(
    x,
    starts,
    ends,
    half_norms,
    open_rows,
    open_count,
    part_dist,
    part_position,
    part_segment,
    inner,
    features,
    padded,
    tiles,
    x_outer,
    x_inner,
    x_feature,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The contract for the open rows: each few of them against a share of the segments, in float64."""
    programs = tl.num_programs(0)
    count = tl.load(open_count)
    groups, splits = _splits_of(count, programs, tiles, BLOCK_R)
    column = tl.arange(0, TILE)
    infinity = float("inf")
    for item in range(tl.program_id(0), groups * splits, programs):
        slot = (item // splits) * BLOCK_R + tl.arange(0, BLOCK_R)
        split = item % splits
        live = slot < count
        rows = tl.load(open_rows + slot, mask=live, other=0)
        row_start = x + starts_of(rows, inner, x_outer, x_inner)
        least = tl.full((BLOCK_R,), infinity, tl.float64)
        best_t = tl.zeros((BLOCK_R,), tl.float64)
        best = tl.zeros((BLOCK_R,), tl.int32)
        for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
            place = tile * TILE + column
            along = tl.zeros((BLOCK_R, TILE), tl.float64)
            length = tl.zeros((TILE,), tl.float64)
            start = row_start
            at = place.to(tl.int64)
            for _ in range(features):
                value = tl.load(start, mask=live, other=0.0).to(tl.float64)
                c = tl.load(starts + at).to(tl.float64)
                step = tl.load(ends + at).to(tl.float64) - c
                along = along + (value[:, None] - c[None, :]) * step[None, :]
                length = length + step * step
                start += x_feature
                at += padded
            t = clamped(along, tl.broadcast_to(length[None, :], (BLOCK_R, TILE)))
            total = tl.zeros((BLOCK_R, TILE), tl.float64)
            start = row_start
            at = place.to(tl.int64)
            for _ in range(features):
                value = tl.load(start, mask=live, other=0.0).to(tl.float64)
                c = tl.load(starts + at).to(tl.float64)
                end = tl.load(ends + at).to(tl.float64)
                apart = difference(value[:, None], c[None, :], end[None, :], t)
                total = total + apart * apart
                start += x_feature
                at += padded
            segment = tile * TILE + segment_at(column, TILE, GROUP)
            good = tl.load(half_norms + place) < infinity
            total = tl.where(good[None, :], total, infinity)
            here = tl.min(total, axis=1)
            lowest = tl.min(tl.where(total == here[:, None], segment[None, :], 2147483647), axis=1)
            here_t = tl.max(tl.where(segment[None, :] == lowest[:, None], t, 0.0), axis=1)
            best = tl.where(here < least, lowest, best)
            best_t = tl.where(here < least, here_t, best_t)
            least = tl.minimum(least, here)
        out = slot.to(tl.int64) * splits + split
        tl.store(part_dist + out, least, mask=live)
        tl.store(part_position + out, best_t.to(tl.float32), mask=live)
        tl.store(part_segment + out, best, mask=live)


@triton.jit(do_not_specialize=["programs", "tiles"])
def merge(
    open_rows,
    open_count,
    part_dist,
    part_position,
    part_segment,
    segments,
    position,
    sq_dist,
    programs,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The least of each open row's shares; the lower share wins a tie, so the lowest segment does."""
    count = tl.load(open_count)
    _, splits = _splits_of(count, programs, tiles, BLOCK_R)
    slot = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = slot < count
    if tl.program_id(0) * BLOCK_N < count:
        infinity = float("inf")
        least = tl.full((BLOCK_N,), infinity, tl.float64)
        best_t = tl.zeros((BLOCK_N,), tl.float32)
        best = tl.zeros((BLOCK_N,), tl.int32)
        for split in range(splits):
            at = slot * splits + split
            dist = tl.load(part_dist + at, mask=live, other=0.0)
            t = tl.load(part_position + at, mask=live, other=0.0)
            segment = tl.load(part_segment + at, mask=live, other=0)
            best = tl.where(dist < least, segment, best)
            best_t = tl.where(dist < least, t, best_t)
            least = tl.minimum(least, dist)
        rows = tl.load(open_rows + slot, mask=live, other=0)
        # without a usable segment there is no distance
        none = least == infinity
        tl.store(segments + rows, tl.where(none, 0, best).to(tl.int64), mask=live)
        tl.store(position + rows, tl.where(none, 0.0, best_t), mask=live)
        tl.store(sq_dist + rows, tl.where(none, float("nan"), least).to(tl.float32), mask=live)
