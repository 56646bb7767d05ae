"""The rows that the certificate of nearest_code leaves open: their candidates, and the contract among them.

`candidates` searches the open rows a second time, with thresholds: every group that might hold the contract's choice,
by the bound of the first search, is written down. `settle` forms the contract's float64 distances of these few codes
only. A row with more candidates than fit, such as one of many equal codes, is compared with all codes.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import row_offsets
from vqkernels.kernels._points import load_point
from vqkernels.kernels._search import (
    NOTHING,
    first_of_group,
    halved,
    load_features,
    magnitude,
    scale_rows,
    smallest_of_groups,
)


@triton.jit
def _splits_of(groups, programs, tiles):
    # few open rows: the programs share the points, so that no row keeps one processor busy for long
    return tl.maximum(1, tl.minimum(tiles, programs // tl.maximum(groups, 1)))


@triton.jit(do_not_specialize=["inner", "num_points"])
def candidates(
    x,
    points,
    half_norms,
    centre,
    open_rows,
    thresholds,
    hits,
    lists,
    counters,
    inner,
    features,
    padded_features,
    num_points,
    capacity,
    x_outer,
    x_inner,
    x_feature,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """List, for each open row, the groups whose score does not exceed the row's threshold."""
    count = tl.minimum(tl.load(counters), capacity)
    groups = (count + BLOCK_N - 1) // BLOCK_N
    tiles = (num_points + BLOCK_K - 1) // BLOCK_K
    splits = _splits_of(groups, tl.num_programs(0), tiles)
    column = tl.arange(0, BLOCK_K)
    feature = tl.arange(0, BLOCK_D)
    slot_of_group = tl.arange(0, BLOCK_K // GROUP)
    for item in range(tl.program_id(0), groups * splits, tl.num_programs(0)):
        slot = (item // splits) * BLOCK_N + tl.arange(0, BLOCK_N)
        split = item % splits
        live = slot < count
        rows = tl.load(open_rows + slot, mask=live, other=0).to(tl.int64)
        start = x + row_offsets(rows, inner, x_outer, x_inner)
        largest = tl.zeros((BLOCK_N,), tl.float32)
        if SCALED:
            for first in range(0, padded_features, BLOCK_D):
                value = load_features(start, first + feature, features, x_feature, centre, SCALED, False)
                largest = tl.maximum(largest, magnitude(value))
        # a row's own scale is at least that of its tile, so that its copy is no worse and the bound still holds
        scale, ratio = scale_rows(largest, centre, padded_features, SCALED)
        most = tl.load(thresholds + slot, mask=live, other=float("-inf")) * scale
        for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
            index = tile * BLOCK_K + column
            score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for first in range(0, padded_features, BLOCK_D):
                value = load_features(start, first + feature, features, x_feature, centre, SCALED, False)
                at = points + index.to(tl.int64)[None, :] * padded_features + (first + feature)[:, None]
                score = tl.dot(halved(value, scale[:, None], SCALED), tl.load(at), score)
            half_norm = tl.load(half_norms + index)
            score = score + half_norm[None, :] * ratio[:, None]
            least = smallest_of_groups(score, GROUP, 1, BLOCK_N, BLOCK_K)
            hit = (least <= most[:, None]) & live[:, None]
            base = tile * BLOCK_K + first_of_group(slot_of_group, GROUP, 1, BLOCK_K)
            base = tl.broadcast_to(base[None, :], hit.shape)
            counts = tl.broadcast_to((hits + slot)[:, None], hit.shape)
            at = tl.atomic_add(counts, tl.full(hit.shape, 1, tl.int32), mask=hit, sem="relaxed")
            kept = hit & (at < LENGTH)
            tl.store(lists + slot.to(tl.int64)[:, None] * LENGTH + at, base, mask=kept)


@triton.jit
def _literal(
    start,
    codes,
    dither,
    index,
    features,
    x_feature,
    stride_code,
    stride_feature,
    live,
    DITHERED: tl.constexpr,
):
    """The contract's distances of rows (R, 1) and points that broadcast to them: ascending features, unfused."""
    dist = tl.zeros(index.shape, tl.float64) + tl.zeros(start.shape, tl.float64)
    for number in range(features):
        feature = tl.zeros((1, 1), tl.int64) + number
        value = tl.load(start + feature * x_feature).to(tl.float64)
        point = load_point(codes, dither, index, feature, stride_code, stride_feature, live, DITHERED)
        difference = value - point
        dist = dist + difference * difference
    return dist


@triton.jit
def _better(dist, index, least, code):
    """The least of each row of a tile, merged into what is known; the lower index wins a tie."""
    here = tl.min(dist, axis=1)
    lowest = tl.min(tl.where(dist == here[:, None], index, NOTHING), axis=1)
    wins = (here < least) | ((here == least) & (lowest < code))
    return tl.minimum(least, here), tl.where(wins, lowest, code)


@triton.jit
def _answer(indices, sq_dist, rows, least, code, mask):
    tl.store(indices + rows, code.to(tl.int64), mask=mask)
    tl.store(sq_dist + rows, least.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["inner", "num_points"])
def settle(
    x,
    codes,
    dither,
    half_norms,
    open_rows,
    hits,
    lists,
    counters,
    part_dist,
    part_code,
    arrived,
    indices,
    sq_dist,
    inner,
    features,
    num_points,
    capacity,
    x_outer,
    x_inner,
    x_feature,
    stride_code,
    stride_feature,
    DITHERED: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    LENGTH: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The contract for the open rows: among their listed candidates, or among all points by several programs."""
    programs = tl.num_programs(0)
    count = tl.load(counters)
    groups = (count + BLOCK_R - 1) // BLOCK_R
    tiles = (num_points + BLOCK_K - 1) // BLOCK_K
    splits = _splits_of(groups, programs, tiles)
    infinity = float("inf")
    lane = tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), groups * splits, programs):
        group = item // splits
        split = item % splits
        slot = group * BLOCK_R + tl.arange(0, BLOCK_R)
        live = slot < count
        rows = tl.load(open_rows + slot, mask=live, other=0).to(tl.int64)
        start = (x + row_offsets(rows, inner, x_outer, x_inner))[:, None]
        found = tl.load(hits + slot, mask=live & (slot < capacity), other=LENGTH + 1)
        listed = live & (found > 0) & (found <= LENGTH)
        if split == 0:
            least = tl.full((BLOCK_R,), infinity, tl.float64)
            code = tl.full((BLOCK_R,), NOTHING, tl.int32)
            most = tl.max(tl.where(listed, found, 0), axis=0)
            for first in range(0, most * GROUP, BLOCK_L):
                entry = (first + lane) // GROUP
                member = (first + lane) % GROUP
                wanted = listed[:, None] & (entry[None, :] < found[:, None])
                at = lists + slot.to(tl.int64)[:, None] * LENGTH + entry[None, :]
                index = tl.load(at, mask=wanted, other=0) + ((member & 1) + (member >> 1) * SPAN)[None, :]
                wanted = wanted & (index < num_points)
                index = tl.minimum(index, num_points - 1)
                wanted = wanted & (tl.load(half_norms + index) < FAR)
                dist = _literal(
                    start, codes, dither, index.to(tl.int64), features, x_feature, stride_code,
                    stride_feature, wanted, DITHERED,
                )  # fmt: skip
                dist = tl.where(wanted, dist, infinity)
                least, code = _better(dist, tl.where(wanted, index, NOTHING), least, code)
            _answer(indices, sq_dist, rows, least, code, listed)
        unlisted = live & (listed == 0)
        if tl.max(unlisted.to(tl.int32), axis=0) == 1:
            least = tl.full((BLOCK_R,), infinity, tl.float64)
            code = tl.full((BLOCK_R,), NOTHING, tl.int32)
            for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
                index = tile * BLOCK_K + column
                good = index < num_points
                index = tl.minimum(index, num_points - 1)
                good = good & (tl.load(half_norms + index) < FAR)
                dist = _literal(
                    start, codes, dither, index.to(tl.int64)[None, :], features, x_feature, stride_code,
                    stride_feature, good[None, :], DITHERED,
                )  # fmt: skip
                dist = tl.where(good[None, :], dist, infinity)
                least, code = _better(dist, tl.where(good, index, NOTHING)[None, :], least, code)
            part = slot * splits + split
            before = splits - 1
            if splits > 1:
                tl.store(part_dist + part, least, mask=unlisted)
                tl.store(part_code + part, code, mask=unlisted)
                # what all threads of all programs wrote must be there before the last of them reads it
                tl.debug_barrier()
                before = tl.atomic_add(arrived + group, 1, sem="acq_rel")
            if splits == 1:
                _answer(indices, sq_dist, rows, least, code, unlisted)
            elif before == splits - 1:
                tl.debug_barrier()
                least = tl.full((BLOCK_R,), infinity, tl.float64)
                code = tl.full((BLOCK_R,), NOTHING, tl.int32)
                for other in range(splits):
                    part = slot * splits + other
                    dist = tl.load(part_dist + part, mask=unlisted, other=infinity, cache_modifier=".cg")
                    index = tl.load(part_code + part, mask=unlisted, other=NOTHING, cache_modifier=".cg")
                    wins = (dist < least) | ((dist == least) & (index < code))
                    code = tl.where(wins, index, code)
                    least = tl.minimum(least, dist)
                _answer(indices, sq_dist, rows, least, code, unlisted)
