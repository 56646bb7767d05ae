"""The finish of nearest_code: which rows the search decided, and what is found for them.

The search minimises t_j, an approximation of half the squared distance h_j = |x - c_j|^2/2 raised by a number of the
row, in units of the scales s_x of the row and s_c of the codes (rho = s_x/s_c, 1 where nothing is scaled). The
contract minimises d_j, the squared distance in float64 by ascending features. In those units, with X = |x|,
C = max |ch|, r = |x - xh|, l = max |c - ch|, B = rho max |c|^2/2 and R = X^2/(2 rho) (1 + 2^-8):

    |t_j - h_j| <= r C + X l                                     the copies are not the numbers: Cauchy-Schwarz
                 + kappa ((X + r) C + B + R) + 2^-23 (B + R)     the products, their sum, the start of the sum
                 + 4 (D + 2) 2^-126                              underflow
    |d_j/2 - h_j| <= (D + 4) 2^-52 (X/sqrt(rho) + (C + l) sqrt(rho))^2

kappa = 22 2^-24 ceil(D/16) is a tensor core that aligns and truncates 17 addends at a time, or twice 9; sequential
float32 sums keep it as well. With E the sum of both lines, a runner-up more than 2 E behind cannot be the contract's
choice. Every norm is measured, r and l too: halves of one type lose nothing (r = l = 0). The difference x - m is
itself rounded, by 2^-24 X, which r includes. What float32 does to the bound is covered by a factor.

The winning group is told apart by float32 distances, each within (D + 4) 2^-23 of itself, and a tie of those
leaves the row open too, as does a distance that another order of summation would round to another float32. Dithered
points are within 2^-21 of the largest code in float32.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite, row_offsets
from vqkernels.kernels._points import NO_POINT, load_facts, load_near_point, load_point, scale_of
from vqkernels.kernels._search import RAISE, load_features, magnitude

_ULP = tl.constexpr(5.9604644775390625e-08)


@triton.jit
def _error_bound(size, lost, kept, loss, half_norm, raised, ratio, features):
    """E of each row, float64, from X, r, C, l, B, R and rho."""
    kappa = ((features + 15) // 16) * (22.0 * _ULP)
    copies = lost * kept + size * loss
    products = kappa * ((size + lost) * kept + half_norm + raised) + 2.0 * _ULP * (half_norm + raised)
    underflow = 4.0 * (features + 2.0) * 1.1754943508222875e-38
    both = size / tl.sqrt(ratio) + (kept + loss) * tl.sqrt(ratio)
    contract = (features + 4.0) * 2.220446049250313e-16 * both * both
    return (copies + products + underflow + contract) * (1.001 + features * 2.0 * _ULP)


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


@triton.jit(do_not_specialize=["num_rows", "inner", "num_points", "splits", "mask", "programs", "tile_rows"])
def finish(
    x,
    codes,
    dither,
    half_norms,
    centre,
    scales,
    facts,
    best_score,
    next_score,
    base,
    indices,
    sq_dist,
    open_rows,
    thresholds,
    hits,
    counters,
    arrived,
    num_rows,
    inner,
    features,
    padded_features,
    num_points,
    splits,
    mask,
    programs,
    tile_rows,
    capacity,
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
    LENGTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge the shares, decide the winning group, certify it, list the rows that the bound leaves open."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    infinity = float("inf")
    best = tl.full((BLOCK_N,), infinity, tl.float32)
    following = tl.full((BLOCK_N,), infinity, tl.float32)
    first_code = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(splits):
        at = rows + split * num_rows.to(tl.int64)
        score = tl.load(best_score + at, mask=live, other=infinity)
        where = tl.load(base + at, mask=live, other=0)
        # scores were rounded up by the low bits of a number: a loser is at least this
        loser = tl.maximum(best, score)
        loser = (loser.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)
        if EXACT:
            other = tl.load(next_score + at, mask=live, other=infinity)
            following = tl.minimum(tl.minimum(following, other), loser)
        first_code = tl.where(score < best, where, first_code)
        best = tl.minimum(best, score)

    start = x + row_offsets(tl.minimum(rows, num_rows - 1), inner, x_outer, x_inner)
    column = tl.arange(0, BLOCK_D)
    first_good = tl.zeros((BLOCK_N,), tl.float64) + load_facts(facts, programs, 4, BLOCK_P)
    some_good = first_good < NO_POINT
    unit = tl.full((BLOCK_N,), 1.0, tl.float32)
    of_codes = 1.0
    if SCALED:
        of_codes = tl.load(centre + padded_features)
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
        own = scale.to(tl.float64)
        size = tl.sqrt(square.to(tl.float64)) / own * unit.to(tl.float64)
        gone = tl.sqrt(lost.to(tl.float64))
        # where the search began, by the same formula; sums in another order differ by less than `top` allows for
        began = (half_square if COPIED else square).to(tl.float64)
        if SCALED:
            # beside a row of 2^75 times its size a row vanishes, and its squares with it: 2^-62 for each feature
            size += (features + 1.0) * 2.168404344971009e-19
            gone += size * _ULP + (features + 1.0) * 2.168404344971009e-19
        ratio = unit.to(tl.float64) / of_codes
        raised = 0.5 * size * size / ratio * 1.00390625
        kept = tl.sqrt(load_facts(facts, programs, 0, BLOCK_P))
        loss = tl.sqrt(load_facts(facts, programs, 1, BLOCK_P))
        half_norm = load_facts(facts, programs, 2, BLOCK_P) * ratio
        bound = _error_bound(size, gone, kept, loss, half_norm, raised, ratio, features)
        # below 0 integers order the other way; the bound forbids it but for rows of 2^14 features and more
        ordered = (best >= 0.0) & (half_norm + raised < 0.1 * FAR)
        certain = ordered & (following.to(tl.float64) - best.to(tl.float64) > 2.0 * bound)
        if MEMBERS > 1:
            spread = (features + 4.0) * (2.0 * _ULP)
            margin = 2.0 * spread * second
            if DITHERED:
                off = tl.sqrt(load_facts(facts, programs, 3, BLOCK_P)).to(tl.float32) * (8.0 * _ULP)
                margin += 4.0 * off * (tl.sqrt(second) + off)
            apart = (second - nearest > margin + 1e-33) | (second == infinity)
            certain = certain & apart & (nearest < 1e38)
        # another order of the sum must not round to another float32
        slack = least * (features + 4.0) * 2.220446049250313e-16
        certain = certain & ((least - slack).to(tl.float32) == (least + slack).to(tl.float32))
        is_open = (live & answered & (certain == 0)).to(tl.int32)
        found = tl.sum(is_open)
        if found > 0:
            if not SCALED:
                began = began / own / own
            began = 0.5 * began / ratio * RAISE
            top = best.to(tl.float64) - began + 2.0 * bound + raised * (features + 8.0) * (4.0 * _ULP)
            slot = tl.atomic_add(counters, found) + tl.cumsum(is_open) - is_open
            taken = is_open == 1
            tl.store(open_rows + slot, rows.to(tl.int32), mask=taken)
            known = taken & (slot < capacity)
            top = top / unit.to(tl.float64)
            top += tl.abs(top) * 0.000001
            usable = ordered & (tl.abs(top) > 1e-30) & (tl.abs(top) < 1e38)
            tl.store(thresholds + slot, tl.where(usable, top, float("-inf")).to(tl.float32), mask=known)
            # what has no threshold is searched whole
            tl.store(hits + slot, tl.where(usable, 0, LENGTH + 1), mask=known)
            tl.store(arrived + slot // TOGETHER, tl.zeros((BLOCK_N,), tl.int32), mask=taken)
