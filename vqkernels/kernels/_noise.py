"""Philox-4x32-10 and normals, as device functions; `vqkernels.philox` is their specification."""

# triton's stubs do not know what its compiler accepts
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# the streams of the noise of a row's first and second point
FIRST = tl.constexpr(0)
SECOND = tl.constexpr(1)
_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox_words(seed, row, block, stream: tl.constexpr):
    """The four uint32 words of each pair of an int64 row and an int32 block, broadcast against each other."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    row, block = tl.broadcast(row, block)
    c0 = block.to(tl.uint32)
    c1 = (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.full(c0.shape, stream, tl.uint32)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, _MULTIPLIER_0)
        high_1 = tl.umulhi(c2, _MULTIPLIER_1)
        low_0 = c0 * _MULTIPLIER_0
        low_1 = c2 * _MULTIPLIER_1
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def normal_pair(w0, w1):
    """Box-Muller: two float32 standard normals of two words."""
    u = ((w0 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    # the approximate root is off by 2^-23, for which 2^-18 has room; the exact one is a function call
    radius = tl.sqrt(-2.0 * tl.log(u))
    # the angle in quarter turns is exact: nearest quarter, and what is left in [-1/2, 1/2]; the library's
    # cosine would bring a reduction for huge angles, and its stack, along
    turn = (w1 >> 8).to(tl.float32) * 2.384185791015625e-07
    quarter = tl.floor(turn + 0.5)
    t = (turn - quarter) * 1.5707963267948966
    t2 = t * t
    # taylor: the first terms left out are below 2^-25 on [-pi/4, pi/4]
    sine = t2 * (-1.984126984126984e-04 + t2 * 2.7557319223985893e-06)
    sine = t * (1.0 + t2 * (-0.16666666666666666 + t2 * (0.008333333333333333 + sine)))
    cosine = t2 * (-0.001388888888888889 + t2 * 2.48015873015873e-05)
    cosine = 1.0 + t2 * (-0.5 + t2 * (0.041666666666666664 + cosine))
    q = quarter.to(tl.int32)
    odd = (q & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((q + 1) & 2) == 2, -c, c)
    s = tl.where((q & 2) == 2, -s, s)
    return radius * c, radius * s


@triton.jit
def normal_tile(seed, row, first_feature, stream: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Normals of BLOCK_D features from `first_feature` on, of int64 rows: (BLOCK_N, BLOCK_D) float32."""
    block = first_feature // 4 + tl.arange(0, BLOCK_D // 4)
    w0, w1, w2, w3 = philox_words(seed, row[:, None], block[None, :], stream)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    # (.., i, j) of the double join is word 2 i + j
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK_N, BLOCK_D))
