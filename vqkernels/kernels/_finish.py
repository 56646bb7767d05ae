"""The finish of nearest_code: the code of each winning group, its distance, and the measures of the row."""

# triton's stubs do not know what its compiler accepts
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite, row_offsets
from vqkernels.kernels._points import NO_POINT, load_near_point, load_point, scale_of
from vqkernels.kernels._search import load_features, magnitude


@triton.jit
def _halves_and_loss(value, scale, HALF: tl.constexpr):
    """Squared norms in float32 of a tile of rows, of its halves, and of what rounding to them takes."""
    value = value * scale[:, None]
    square = tl.sum(value * value, axis=1)
    if HALF:
        half = value.to(tl.float16).to(tl.float32)
        rest = value - half
        return square, tl.sum(half * half, axis=1), tl.sum(rest * rest, axis=1)
    else:
        return square, square, square * 0.0


@triton.jit
def _rows_not_finite(value):
    return tl.max(tl.where(is_finite(value), 0, 1), axis=1)


@triton.jit(do_not_specialize=["num_rows", "inner", "num_points", "splits", "tile_rows"])
def finish(
    x,
    codes,
    dither,
    half_norms,
    centre,
    scales,
    merged,
    best_score,
    base,
    indices,
    sq_dist,
    measures,
    exact_dist,
    num_rows,
    inner,
    features,
    padded_features,
    num_points,
    splits,
    tile_rows,
    x_outer,
    x_inner,
    x_feature,
    stride_code,
    stride_feature,
    EXACT: tl.constexpr,
    DITHERED: tl.constexpr,
    SCALED: tl.constexpr,
    COPIED: tl.constexpr,
    WHOLE: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPAN: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Decide the winning group of each row and measure what `certify` asks of it.

    Everything here is done by feature. `measures` are squared norms of the scaled row, of its halves and of what they
    lose, the scale, and the nearest and second nearest distance in the group; (6, N) float32.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    infinity = float("inf")
    best = tl.full((BLOCK_N,), infinity, tl.float32)
    first_code = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(splits):
        at = rows + split * num_rows.to(tl.int64)
        score = tl.load(best_score + at, mask=live, other=infinity)
        where = tl.load(base + at, mask=live, other=0)
        first_code = tl.where(score < best, where, first_code)
        best = tl.minimum(best, score)

    start = x + row_offsets(tl.minimum(rows, num_rows - 1), inner, x_outer, x_inner)
    column = tl.arange(0, BLOCK_D)
    first_good = tl.zeros((BLOCK_N,), tl.float64) + tl.load(merged + 4)
    some_good = first_good < NO_POINT
    unit = tl.full((BLOCK_N,), 1.0, tl.float32)
    if SCALED:
        unit = tl.load(scales + rows // tile_rows, mask=live, other=1.0)

    bad = tl.zeros((BLOCK_N,), tl.int32)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    half_square = tl.zeros((BLOCK_N,), tl.float32)
    lost = tl.zeros((BLOCK_N,), tl.float32)
    if WHOLE:
        seen = (column < features)[None, :]
        value = load_features(start, column, features, x_feature, centre, False, False).to(tl.float32)
        bad = _rows_not_finite(value)
        if EXACT:
            centred = value
            if SCALED:
                centred = value - tl.load(centre + column, mask=column < features, other=0.0)[None, :]
            largest = magnitude(centred)
            # where nothing is scaled the squares still must not underflow
            scale = unit if SCALED else scale_of(largest, infinity)
            square, half_square, lost = _halves_and_loss(centred, scale, SCALED)
    else:
        for first in range(0, features, BLOCK_D):
            value = load_features(start, first + column, features, x_feature, centre, False, False)
            bad = tl.maximum(bad, _rows_not_finite(value.to(tl.float32)))
            if EXACT and not SCALED:
                largest = tl.maximum(largest, magnitude(value))
        if EXACT:
            scale = unit if SCALED else scale_of(largest, infinity)
            for first in range(0, padded_features, BLOCK_D):
                value = load_features(start, first + column, features, x_feature, centre, SCALED, False)
                more, of_halves, rest = _halves_and_loss(value.to(tl.float32), scale, SCALED)
                square += more
                half_square += of_halves
                lost += rest
    finite = bad == 0

    nearest = tl.full((BLOCK_N,), infinity, tl.float32)
    second = tl.full((BLOCK_N,), infinity, tl.float32)
    chosen = tl.minimum(first_code, num_points - 1).to(tl.int64)
    if MEMBERS > 1:
        for member in range(MEMBERS):
            index = first_code + member % 2 + member // 2 * SPAN
            good = index < num_points
            index = tl.minimum(index, num_points - 1).to(tl.int64)
            good = good & (tl.load(half_norms + index) < FAR)
            if WHOLE:
                point = load_near_point(
                    codes, dither, index[:, None], column.to(tl.int64)[None, :], stride_code, stride_feature,
                    seen, DITHERED,
                )  # fmt: skip
                dist = tl.sum((value - point) * (value - point), axis=1)
            else:
                dist = tl.zeros((BLOCK_N,), tl.float32)
                for first in range(0, features, BLOCK_D):
                    feature = first + column
                    part = load_features(start, feature, features, x_feature, centre, False, False)
                    point = load_near_point(
                        codes, dither, index[:, None], feature.to(tl.int64)[None, :], stride_code,
                        stride_feature, (feature < features)[None, :], DITHERED,
                    )  # fmt: skip
                    difference = part.to(tl.float32) - point
                    dist += tl.sum(difference * difference, axis=1)
            dist = tl.where(good, dist, infinity)
            second = tl.minimum(second, tl.maximum(nearest, dist))
            chosen = tl.where(dist < nearest, index, chosen)
            nearest = tl.minimum(nearest, dist)
    if not EXACT:
        # a code with a nan never wins while another exists, even where every score overflowed
        usable = tl.load(half_norms + chosen) < FAR
        chosen = tl.where(usable, chosen, tl.minimum(first_good, NO_POINT).to(tl.int64))
    chosen = tl.where(some_good, chosen, 0)

    if WHOLE:
        point = load_point(
            codes,
            dither,
            chosen[:, None],
            column.to(tl.int64)[None, :],
            stride_code,
            stride_feature,
            seen,
            DITHERED,
        )
        difference = tl.where(seen, value.to(tl.float64) - point, 0.0)
        least = tl.sum(difference * difference, axis=1)
    else:
        least = tl.zeros((BLOCK_N,), tl.float64)
        for first in range(0, features, BLOCK_D):
            feature = first + column
            seen = (feature < features)[None, :]
            value = load_features(start, feature, features, x_feature, centre, False, False)
            point = load_point(
                codes, dither, chosen[:, None], feature.to(tl.int64)[None, :], stride_code, stride_feature,
                seen, DITHERED,
            )  # fmt: skip
            difference = tl.where(seen, value.to(tl.float64) - point, 0.0)
            least += tl.sum(difference * difference, axis=1)
    answered = finite & some_good
    tl.store(indices + rows, tl.where(answered, chosen, 0), mask=live)
    tl.store(sq_dist + rows, tl.where(answered, least, float("nan")).to(tl.float32), mask=live)
    if EXACT:
        out = measures + rows
        step = num_rows.to(tl.int64)
        tl.store(out, square, mask=live)
        if COPIED:
            tl.store(out + step, half_square, mask=live)
        # a row without an answer stays as it is
        tl.store(out + 2 * step, tl.where(answered, lost, -1.0), mask=live)
        tl.store(out + 3 * step, scale, mask=live)
        if MEMBERS > 1:
            tl.store(out + 4 * step, nearest, mask=live)
            tl.store(out + 5 * step, second, mask=live)
        tl.store(exact_dist + rows, least, mask=live)
