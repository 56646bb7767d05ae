"""What the directional kernels share: e = p - x, the vector w whose direction is u, and lengths in float32.

Every function takes tiles (BLOCK_N, BLOCK_D) that are already in registers, so that a kernel which holds rows and
their codes for another reason can go on with them.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.kernels._noise import normal_tile

NOISY = tl.constexpr(0)
DETACH = tl.constexpr(1)
RANDOM = tl.constexpr(2)
# bits of 2^-100 and of 2^100 less these: between them a float32 sum of squares has lost nothing to underflow
_LEAST = tl.constexpr(27 << 23)
_RANGE = tl.constexpr(200 << 23)


@triton.jit
def direction(
    e,
    seed,
    number,
    features,
    noise_std,
    STREAM: tl.constexpr,
    DIRECTION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """w = noise_std n + e, e or n, along the direction u = w/|w|; n are the normals of the rows' numbers.

    EVEN says that every feature of the tile exists.
    """
    if DIRECTION == DETACH:
        return e
    else:
        w = normal_tile(seed, number, 0, STREAM, BLOCK_N, BLOCK_D)
        if DIRECTION == NOISY:
            w = noise_std * w + e
        if not EVEN:
            w = tl.where((tl.arange(0, BLOCK_D) < features)[None, :], w, 0.0)
        return w


@triton.jit
def any_not_finite(value):
    """1 for each row of a tile with a NaN or Inf, else 0."""
    # one multiply-add per element where a comparison, a choice and a maximum would be three instructions
    return tl.where(tl.sum(value * 0.0, axis=1) == 0.0, 0, 1)


@triton.jit
def _beyond(total):
    """Over _RANGE for a float32 sum below 2^-100 or above 2^100, or NaN: one that may have under- or overflowed."""
    return (total.to(tl.int32, bitcast=True) - _LEAST).to(tl.uint32, bitcast=True)


@triton.jit
def power_of(tile):
    """Of each row the power of two that brings its largest magnitude into [1, 4), as far as possible."""
    exponent = tl.max(tl.abs(tile), axis=1).to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(power):
    """1 / power, exactly."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled_length(tile, power):
    """power |a| of each row a."""
    scaled = tile * power[:, None]
    return tl.sqrt(tl.sum(scaled * scaled, axis=1))


@triton.jit
def step(value, e, w, weight, live, alive):
    """Of whole rows x: x and w again, and a factor with z = x + factor w, weight |e| / |w|.

    z is 0 in rows that are not alive and NaN in rows with a NaN or Inf. Sums of squares are float32. Where one may
    have left its range (rows on their code, differences below 1e-15, NaN), or a row is not alive, the tile is
    looked at again, scaled by powers of two.
    """
    e_square = tl.sum(e * e, axis=1)
    w_square = tl.sum(w * w, axis=1)
    factor = weight * (tl.sqrt(e_square) * tl.rsqrt(w_square))
    beyond = tl.where(alive, tl.maximum(_beyond(e_square), _beyond(w_square)), 0xFFFFFFFF)
    if tl.max(tl.where(live, beyond, 0), axis=0) > _RANGE:
        # only these rows change: what a row becomes must not depend on its neighbours
        lost = beyond > _RANGE
        power = power_of(e)
        distance = _scaled_length(e, power) * inverse_of(power)
        w_power = tl.where(lost, power_of(w), 1.0)
        length = _scaled_length(w, w_power)
        # a distance that is nan stays nan, a vector of length 0 moves nothing
        other = weight * distance * tl.where(length > 0, 1.0 / length, 0.0)
        other = tl.where(alive, tl.where(any_not_finite(value) == 1, float("nan"), other), 0.0)
        factor = tl.where(lost, other, factor)
        w = tl.where(alive[:, None], w * w_power[:, None], 0.0)
        value = tl.where(alive[:, None], value, 0.0)
    return value, w, factor


@triton.jit
def pull(value, g, e, w, weight, live, alive):
    """Of whole rows: g again, and two factors with weight (g . u) e / |e| = (e first) second.

    The second is 0 where |e| = 0 or |w| = 0, NaN in rows with a NaN or Inf; g and it are 0 in rows not alive.
    Sums as in `step`.
    """
    e_square = tl.sum(e * e, axis=1)
    w_square = tl.sum(w * w, axis=1)
    g_w = tl.sum(g * w, axis=1)
    first = tl.full(weight.shape, 1.0, tl.float32)
    ratio = (g_w * tl.rsqrt(w_square)) * tl.rsqrt(e_square)
    second = weight * ratio
    bad = tl.zeros_like(live.to(tl.int32))
    beyond = tl.maximum(_beyond(e_square), _beyond(w_square))
    beyond = tl.maximum(beyond, tl.maximum(_beyond(tl.abs(g_w)), _beyond(tl.abs(ratio))))
    beyond = tl.where(alive, beyond, 0xFFFFFFFF)
    if tl.max(tl.where(live, beyond, 0), axis=0) > _RANGE:
        lost = beyond > _RANGE
        bad = any_not_finite(value)
        first = tl.where(lost, power_of(e), 1.0)
        distance = _scaled_length(e, first)
        unit = w * power_of(w)[:, None]
        length = tl.sqrt(tl.sum(unit * unit, axis=1))
        g_power = power_of(g)
        g_w = tl.sum((g * g_power[:, None]) * unit, axis=1)
        strength = weight * (g_w / length) * inverse_of(g_power)
        other = tl.where((distance > 0) & (length > 0), strength / distance, 0.0)
        other = tl.where(alive, tl.where(bad == 1, float("nan"), other), 0.0)
        second = tl.where(lost, other, second)
        g = tl.where(alive[:, None], g, 0.0)
    return g, first, second, bad


@triton.jit
def pulled(e, first, second):
    """weight (g . u) e / |e| of a tile by the factors of `pull`."""
    return tl.where((second != 0.0)[:, None], (e * first[:, None]) * second[:, None], 0.0)
