"""The segments of a polyline through the codes, as the search and the float64 pass of nearest_segment need them."""

# triton's stubs do not know what its compiler accepts
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._common import is_finite

# segments of a tile, and neighbours of them that are searched as one
TILE = 64
GROUP = 8


@triton.jit
def segment_at(position, TILE: tl.constexpr, GROUP: tl.constexpr):
    """The segment at a position of a tile: groups of neighbours lie GROUPS positions apart, TILE = GROUP GROUPS.

    A thread holds every eighth column of a product on tensor cores, so a group's maximum stays within the thread.
    """
    groups: tl.constexpr = TILE // GROUP
    return (position % groups) * GROUP + position // groups


@triton.jit
def load_code(codes, index, feature, num_codes, features, stride_code, stride_feature):
    """A float64 tile of codes, 0 beyond the last."""
    at = codes + index[:, None] * stride_code + feature.to(tl.int64)[None, :] * stride_feature
    return tl.load(at, mask=(index < num_codes)[:, None] & (feature < features)[None, :], other=0.0).to(
        tl.float64
    )


@triton.jit
def _bad(value):
    return tl.max(tl.where(is_finite(value), 0, 1), axis=1)


@triton.jit(do_not_specialize=["num_codes"])
def prepare(
    codes,
    starts,
    ends,
    half_norms,
    constants,
    squares,
    num_codes,
    features,
    padded_features,
    padded,
    stride_code,
    stride_feature,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Transposed padded copies of the first and second codes of the segments, and four constants of each.

    `half_norms` are |c_s|^2 / 2, inf for a segment with a NaN or Inf; `constants` (4, padded) are c_s.d_s, 1 / L_s, L_s / 2
    and the a at which a segment is left to the next (see nearest_segment.py). Codes with a NaN or Inf become 0.
    """
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    segment = tl.program_id(0).to(tl.int64) * TILE + segment_at(tl.arange(0, TILE), TILE, GROUP)
    column = tl.arange(0, BLOCK_D)
    bad = tl.zeros((TILE,), tl.int32)
    bad_end = bad
    bad_after = bad
    square = tl.zeros((TILE,), tl.float64)
    across = square
    length = square
    for first in range(0, features, BLOCK_D):
        feature = first + column
        c = load_code(codes, segment, feature, num_codes, features, stride_code, stride_feature)
        end = load_code(codes, segment + 1, feature, num_codes, features, stride_code, stride_feature)
        after = load_code(codes, segment + 2, feature, num_codes, features, stride_code, stride_feature)
        bad = tl.maximum(bad, _bad(c))
        bad_end = tl.maximum(bad_end, _bad(end))
        bad_after = tl.maximum(bad_after, _bad(after))
        step = end - c
        square += tl.sum(c * c, axis=1)
        across += tl.sum(c * step, axis=1)
        length += tl.sum(step * step, axis=1)
    usable = (bad == 0) & (bad_end == 0) & (segment < num_codes - 1)
    tl.store(squares + place, tl.where((bad == 0) & (segment < num_codes), square, 0.0))
    # a finite code keeps a finite half norm: only the others are inf
    tl.store(
        half_norms + place, tl.where(usable, tl.minimum(0.5 * square, 3.0e38).to(tl.float32), float("inf"))
    )
    tl.store(constants + place, tl.where(usable, across, 0.0).to(tl.float32))
    inverse = tl.minimum(1.0 / length, 1.329227995784916e36)
    tl.store(constants + padded + place, tl.where(usable, inverse, 0.0).to(tl.float32))
    tl.store(constants + 2 * padded + place, tl.where(usable, 0.5 * length, 0.0).to(tl.float32))
    left = usable & (segment % GROUP == GROUP - 1) & (segment + 2 < num_codes) & (bad_after == 0)
    tl.store(constants + 3 * padded + place, tl.where(left, length.to(tl.float32), float("inf")))
    for first in range(0, padded_features, BLOCK_D):
        feature = first + column
        c = load_code(codes, segment, feature, num_codes, features, stride_code, stride_feature)
        end = load_code(codes, segment + 1, feature, num_codes, features, stride_code, stride_feature)
        at = feature.to(tl.int64)[None, :] * padded + place[:, None]
        kind = starts.dtype.element_ty
        tl.store(starts + at, tl.where((bad == 0)[:, None], c, 0.0).to(tl.float32).to(kind))
        tl.store(ends + at, tl.where((bad_end == 0)[:, None], end, 0.0).to(tl.float32).to(kind))


@triton.jit
def clamped(along, length):
    """t of the contract from (x - c).d and |d|^2."""
    t = tl.where(length > 0, along / tl.where(length > 0, length, 1.0), 0.0)
    return tl.minimum(tl.maximum(t, 0.0), 1.0)


@triton.jit
def difference(value, c, end, t):
    """x minus the point at t, as the contract forms it; in kernels compiled unfused."""
    return value - tl.where(t == 1.0, end, c + t * (end - c))
