"""Philox-4x32-10 and normals, as device functions; `vqkernels.philox` is their specification.

The words of four features cost 18 wide multiplies where the first two rounds of a row, and of a block of four
features, are made once for the tile; a pair of normals costs a logarithm, a root, a sine and a cosine.
"""

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
    """The four uint32 words of each pair of an int64 row and an int32 block, broadcast against each other.

    Of a column of rows and a row of blocks, what the first two rounds multiply depends on one of them alone:
    the operands are broadcast as late as the xor that mixes them.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.full((1,), stream, tl.uint32)
    for _ in tl.static_range(10):
        # a product of 64 bits is one instruction, its two halves would be two
        product_0 = c0.to(tl.uint64) * _MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def normal_pair(w0, w1):
    """Box-Muller: two float32 standard normals of two words.

    Errors, radius times angle within 2^-19 in all: the logarithm is off by 2^-21 absolute, or relative where
    it is small; the approximate root by 2^-23 relative; sine and cosine by 2^-24 (minimax polynomials).
    """
    # u' = 2^k f with f in [2/3, 4/3), so that f - 1 and the logarithm are exact to the last where u' nears 1
    u = 5.9604644775390625e-08 + (w0 >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    bits = u.to(tl.int32, bitcast=True)
    scale = (bits - 0x3F2AAAAB) & -8388608
    g = (bits - scale).to(tl.float32, bitcast=True) - 1.0
    # -2 ln(1 + g) / g
    log = 0.38815374562999413 + g * -0.34130488621690862
    log = -0.3960538835922790 + g * log
    log = 0.4968331670734309 + g * log
    log = -0.66675339247504428 + g * log
    log = 1.0000448494112398 + g * log
    log = -1.9999997118285814 + g * log
    # the power of two counts in units of its exponent's place; the exact root would be a function call
    radius = tl.sqrt(scale.to(tl.float32) * -1.6525916589735634e-07 + g * log)
    # the angle from its nearest half turn, in [-pi/2, pi/2], whose 23 bits are exact
    twice = ((w1 & 0xFFFFFF00) << 1).to(tl.int32, bitcast=True)
    t = twice.to(tl.float32) * 7.314590396335798e-10
    t2 = t * t
    sine = -1.9800897762105307e-04 + t2 * 2.590488499293331e-06
    sine = 8.332899823338666e-03 + t2 * sine
    sine = -0.16666647634638823 + t2 * sine
    sine = t * (0.9999999765898815 + t2 * sine)
    cosine = -1.385592717560117e-03 + t2 * 2.3194386314727422e-05
    cosine = 4.1663989453459935e-02 + t2 * cosine
    cosine = -0.4999993229298931 + t2 * cosine
    cosine = 1.0 + t2 * cosine
    # an odd half turn turns both round: one sign, of the radius
    odd = (w1.to(tl.int32, bitcast=True) ^ twice) & -2147483648
    radius = (radius.to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def normal_tile(seed, row, first_feature, stream: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Normals of BLOCK_D features from `first_feature` on, of int64 rows: (BLOCK_N, BLOCK_D) float32."""
    block = first_feature // 4 + tl.arange(0, BLOCK_D // 4)
    w0, w1, w2, w3 = philox_words(seed, row[:, None], block[None, :], stream)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    # (.., i, j) of the double join is word 2 i + j
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK_N, BLOCK_D))
