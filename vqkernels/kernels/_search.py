"""The search of nearest_code: half squared distances by tensor cores, groups of codes, the best group and the next.

A row x and a code c are multiplied as halves, xh and ch, and the accumulator starts at R + rho b, so that it ends as

    R + rho b - xh.ch,    b = |c|^2/2,    R = |x|^2/(2 rho) (1 + 2^-9),

half the squared distance in units of both scales (rho is their ratio; 1 where nothing is scaled) plus 2^-9 of the
row's own norm: not negative, so that its bits order as an integer does, and integers have a minimum of three.

Codes of one thread are reduced before they are compared: a group's minimum, its tile in the low bits, then the best
and the next group of each slot. The runner-up of a row is the next of its slot or the best of another, so nothing
that was not in the winning group is better than it. PACKED keeps the code itself in the low bits and the next code,
which costs more instructions and spares the finish a choice: for long rows and small codebooks.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite, row_offsets
from vqkernels.kernels._points import load_facts, scale_of

# a scale of rows beyond this many times that of the codes would gain nothing, and what is far would be inf
MOST = tl.constexpr(16777216.0)
# what half a squared distance is raised by, relative to the row's own norm
RAISE = tl.constexpr(1.001953125)
NOTHING = tl.constexpr(2147483647)
INFINITY_BITS = tl.constexpr(2139095040)


@triton.jit
def load_features(start, feature, features, x_feature, centre, SCALED: tl.constexpr, EVEN: tl.constexpr):
    """A tile of rows as they are, or in float32 less the centre; 0 beyond the last feature."""
    at = start[:, None] + feature.to(tl.int64)[None, :] * x_feature
    value = tl.load(at) if EVEN else tl.load(at, mask=(feature < features)[None, :], other=0.0)
    if SCALED:
        # behind the centre stands the scale
        mean = (
            tl.load(centre + feature)
            if EVEN
            else tl.load(centre + feature, mask=feature < features, other=0.0)
        )
        value = value.to(tl.float32) - mean[None, :]
    return value


@triton.jit
def scale_rows(largest, centre, padded_features, SCALED: tl.constexpr):
    """Scale of rows and its ratio to that of the codes, from their largest magnitude (or magnitudes)."""
    if SCALED:
        of_codes = tl.load(centre + padded_features)
        scale = scale_of(largest, of_codes * MOST)
        return scale, scale / of_codes
    else:
        # nothing is scaled
        return largest * 0.0 + 1.0, largest * 0.0 + 1.0


@triton.jit
def halved(value, scale, SCALED: tl.constexpr):
    """The halves that are multiplied: scaled and rounded to float16, or the row itself."""
    if SCALED:
        value = (value * scale).to(tl.float16)
    return value


@triton.jit
def magnitude(value):
    """Largest finite magnitude of each row of a tile."""
    # what is not finite is seen again, in float64, and must not spoil the scale
    value = tl.abs(value.to(tl.float32))
    return tl.max(tl.where(is_finite(value), value, 0.0), axis=1)


@triton.jit
def _square(value, scale):
    value = value.to(tl.float32) * scale
    return tl.sum(value * value, axis=1)


@triton.jit(do_not_specialize=["num_rows", "inner"])
def halve(
    x,
    centre,
    halves,
    scales,
    num_rows,
    inner,
    features,
    padded_features,
    x_outer,
    x_inner,
    x_feature,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scaled float16 copies (N, padded_features) of rows that are too long to stay on chip, a scale per BLOCK_N."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = x + row_offsets(tl.minimum(row, num_rows - 1), inner, x_outer, x_inner)
    column = tl.arange(0, BLOCK_D)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, padded_features, BLOCK_D):
        value = load_features(start, first + column, features, x_feature, centre, True, False)
        largest = tl.maximum(largest, magnitude(value))
    scale, _ = scale_rows(tl.max(largest, axis=0), centre, padded_features, True)
    tl.store(scales + tl.program_id(0), scale)
    for first in range(0, padded_features, BLOCK_D):
        value = load_features(start, first + column, features, x_feature, centre, True, False)
        at = halves + row[:, None] * padded_features + (first + column)[None, :]
        tl.store(at, halved(value, scale, True), mask=(row < num_rows)[:, None])


@triton.jit
def smallest_of_groups(
    score, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Minimum of each group: pairs of neighbouring columns as far apart as a part of the tile allows.

    The columns of a group belong to one thread wherever the threads that share a row are neighbours or, with PARTS
    of 2, hold a half of the tile each.
    """
    each: tl.constexpr = BLOCK_K // PARTS // GROUP
    score = tl.reshape(score, (BLOCK_N, PARTS, GROUP // 2, each, 2))
    return tl.reshape(tl.min(tl.min(score, axis=4), axis=2), (BLOCK_N, PARTS * each))


@triton.jit
def first_of_group(slot, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Column of the first code of a group; the others follow in pairs, 2 BLOCK_K / (GROUP PARTS) apart."""
    each: tl.constexpr = BLOCK_K // PARTS // GROUP
    return slot // each * (BLOCK_K // PARTS) + 2 * (slot % each)


@triton.jit
def _halves_of(value, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    each: tl.constexpr = WIDTH // PARTS // 2
    one, two = tl.split(tl.permute(tl.reshape(value, (BLOCK_N, PARTS, 2, each)), (0, 1, 3, 2)))
    return tl.reshape(one, (BLOCK_N, PARTS * each)), tl.reshape(two, (BLOCK_N, PARTS * each))


@triton.jit
def _second_smallest(
    score, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The second smallest of each group of 2 or 4."""
    one, two = tl.split(tl.reshape(score, (BLOCK_N, BLOCK_K // 2, 2)))
    following = tl.maximum(one, two)
    if GROUP == 4:
        one, two = _halves_of(tl.minimum(one, two), PARTS, BLOCK_N, BLOCK_K // 2)
        three, four = _halves_of(following, PARTS, BLOCK_N, BLOCK_K // 2)
        following = tl.minimum(tl.maximum(one, two), tl.minimum(three, four))
    return following


@triton.jit
def _update(
    score,
    best,
    following,
    number,
    mask,
    INTEGER: tl.constexpr,
    PACKED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Best and next of each slot after the tile `number` of this share."""
    if PACKED:
        # in the shape of the groups a tile has as many numbers as a group has members; an operand that is no constant
        # lets one instruction mask a score and number it
        shape: tl.constexpr = (BLOCK_N, PARTS, GROUP // 2, BLOCK_K // PARTS // GROUP, 2)
        member = tl.arange(0, GROUP // 2)[None, None, :, None, None] * 2
        member = member + tl.arange(0, 2)[None, None, None, None, :]
        bits = (tl.reshape(score.to(tl.int32, bitcast=True), shape) & mask) | (member + number * GROUP)
        bits = tl.reshape(bits, (BLOCK_N, BLOCK_K))
        if not INTEGER:
            bits = bits.to(tl.float32, bitcast=True)
        least = smallest_of_groups(bits, GROUP, PARTS, BLOCK_N, BLOCK_K)
        if CERTIFIED:
            second = _second_smallest(bits, GROUP, PARTS, BLOCK_N, BLOCK_K)
            following = tl.minimum(following, second)
    else:
        if INTEGER:
            score = score.to(tl.int32, bitcast=True)
        least = smallest_of_groups(score, GROUP, PARTS, BLOCK_N, BLOCK_K)
        if INTEGER:
            least = (least & mask) | number
        else:
            least = ((least.to(tl.int32, bitcast=True) & mask) | number).to(tl.float32, bitcast=True)
    if CERTIFIED:
        following = tl.minimum(following, tl.maximum(best, least))
    return tl.minimum(best, least), following


@triton.jit
def _value(bits):
    """The float of these bits, inf for what is not finite."""
    return tl.where(bits < INFINITY_BITS, bits.to(tl.float32, bitcast=True), float("inf"))


@triton.jit(do_not_specialize=["num_rows", "inner", "num_points", "mask", "programs"])
def search(
    x,
    points,
    half_norms,
    centre,
    scales,
    facts,
    merged,
    counters,
    best_out,
    next_out,
    base_out,
    num_rows,
    inner,
    features,
    padded_features,
    num_points,
    mask,
    programs,
    x_outer,
    x_inner,
    x_feature,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    INTEGER: tl.constexpr,
    PACKED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SECOND_D: tl.constexpr,
    THIRD_D: tl.constexpr,
    LOOP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of one share of the points, for each row: the best group, its score, and the score of the runner-up.

    Rows of up to BLOCK_D + SECOND_D + THIRD_D features stay on chip. With LOOP they are read again for every tile,
    and were scaled before, by `halve`; else their scale is found here, and written. Runners-up are kept only
    where they will be asked for (CERTIFIED). DESCRIBED points come as a tensor descriptor, which the copy engine of
    Hopper and later reads.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    tiles = (num_points + BLOCK_K - 1) // BLOCK_K
    begin = tiles * share // tl.num_programs(1)
    end = tiles * (share + 1) // tl.num_programs(1)
    # the last program repeats its last row: nothing in the loop needs a mask
    start = x + row_offsets(tl.minimum(row, num_rows - 1), inner, x_outer, x_inner)
    column = tl.arange(0, BLOCK_K)
    feature = tl.arange(0, BLOCK_D)
    ratio = 1.0
    if LOOP:
        if SCALED:
            ratio = tl.load(scales + tl.program_id(0)) / tl.load(centre + padded_features)
        square = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, padded_features, BLOCK_D):
            value = load_features(start, first + feature, features, x_feature, centre, False, EVEN)
            square += _square(value, 1.0)
    else:
        value = load_features(start, feature, features, x_feature, centre, SCALED, EVEN)
        largest = magnitude(value)
        if SECOND_D > 0:
            second_feature = BLOCK_D + tl.arange(0, SECOND_D)
            second_value = load_features(start, second_feature, features, x_feature, centre, SCALED, EVEN)
            largest = tl.maximum(largest, magnitude(second_value))
        if THIRD_D > 0:
            third_feature = BLOCK_D + SECOND_D + tl.arange(0, THIRD_D)
            third_value = load_features(start, third_feature, features, x_feature, centre, SCALED, EVEN)
            largest = tl.maximum(largest, magnitude(third_value))
        scale, ratio = scale_rows(tl.max(largest, axis=0), centre, padded_features, SCALED)
        square = _square(value, scale)
        value = halved(value, scale, SCALED)
        if SECOND_D > 0:
            square += _square(second_value, scale)
            second_value = halved(second_value, scale, SCALED)
        if THIRD_D > 0:
            square += _square(third_value, scale)
            third_value = halved(third_value, scale, SCALED)
        if SCALED and share == 0:
            tl.store(scales + tl.program_id(0), scale)
    raised = 0.5 * square / ratio * RAISE

    slots: tl.constexpr = BLOCK_K // GROUP
    if INTEGER:
        best = tl.full((BLOCK_N, slots), NOTHING, tl.int32)
    else:
        best = tl.full((BLOCK_N, slots), float("inf"), tl.float32)
    following = best
    # one wide address for a tile, narrow ones within it
    at = column[None, :] * padded_features + feature[:, None]
    tile_size = tl.full((), BLOCK_K, tl.int64) * padded_features
    norm_at = half_norms + column
    for tile in tl.range(begin, end, flatten=LOOP):
        half_norm = tl.load(norm_at + tile * BLOCK_K)
        if SCALED:
            half_norm *= ratio
        score = half_norm[None, :] + raised[:, None]
        if not DESCRIBED:
            here = points + tile_size * tile
        if LOOP:
            for first in range(0, padded_features, BLOCK_D):
                part = load_features(start, first + feature, features, x_feature, centre, False, EVEN)
                if DESCRIBED:
                    point = tl.trans(points.load([tile * BLOCK_K, first]))
                else:
                    point = tl.load(here + first + at)
                score = tl.dot(part, point, score)
        elif DESCRIBED:
            score = tl.dot(value, tl.trans(points.load([tile * BLOCK_K, 0])), score)
        else:
            score = tl.dot(value, tl.load(here + at), score)
            if SECOND_D > 0:
                where = column[None, :] * padded_features + second_feature[:, None]
                score = tl.dot(second_value, tl.load(here + where), score)
            if THIRD_D > 0:
                where = column[None, :] * padded_features + third_feature[:, None]
                score = tl.dot(third_value, tl.load(here + where), score)
        best, following = _update(
            score, best, following, tile - begin, mask, INTEGER, PACKED, CERTIFIED, GROUP, PARTS,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip

    if not INTEGER:
        best = best.to(tl.int32, bitcast=True)
        following = following.to(tl.int32, bitcast=True)
    slot = tl.arange(0, slots)
    winner = tl.min(best, axis=1)
    where = tl.min(tl.where(best == winner[:, None], slot[None, :], NOTHING), axis=1)
    runner_up = tl.min(tl.where(slot[None, :] == where[:, None], following, best), axis=1)
    number = winner & ~mask
    base = first_of_group(where, GROUP, PARTS, BLOCK_K)
    if PACKED:
        base += (begin + number // GROUP) * BLOCK_K
        base += (number % GROUP // 2) * (2 * BLOCK_K // GROUP // PARTS) + number % 2
    else:
        base += (begin + number) * BLOCK_K
    out = share * num_rows.to(tl.int64) + row
    live = row < num_rows
    if (tl.program_id(0) == 0) & (share == 0):
        # what the next kernels ask for, once
        tl.store(counters, 0)
        for fact in tl.static_range(5):
            tl.store(merged + fact, load_facts(facts, programs, fact, BLOCK_P))
    # the low bits held a number: the winner is at most this, the others are at least that
    tl.store(best_out + out, _value(winner | ~mask), mask=live)
    if CERTIFIED:
        tl.store(next_out + out, _value(runner_up & mask), mask=live)
    tl.store(base_out + out, base, mask=live)
