"""The certificate of nearest_code: which rows the search decided, and the list of those that it left open.

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

from vqkernels.kernels._search import RAISE

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


@triton.jit(do_not_specialize=["num_rows", "splits", "mask", "tile_rows"])
def certify(
    centre,
    scales,
    merged,
    best_score,
    next_score,
    measures,
    exact_dist,
    open_rows,
    thresholds,
    hits,
    counters,
    arrived,
    num_rows,
    features,
    padded_features,
    splits,
    mask,
    tile_rows,
    capacity,
    DITHERED: tl.constexpr,
    SCALED: tl.constexpr,
    COPIED: tl.constexpr,
    MEMBERS: tl.constexpr,
    LENGTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Certify each row by what the search and the finish left, one row for a thread, and list the open ones."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    infinity = float("inf")
    best = tl.full((BLOCK_N,), infinity, tl.float32)
    following = tl.full((BLOCK_N,), infinity, tl.float32)
    for split in range(splits):
        at = rows + split * num_rows.to(tl.int64)
        score = tl.load(best_score + at, mask=live, other=infinity)
        # scores were rounded up by the low bits of a number: a loser is at least this
        loser = tl.maximum(best, score)
        loser = (loser.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)
        other = tl.load(next_score + at, mask=live, other=infinity)
        following = tl.minimum(tl.minimum(following, other), loser)
        best = tl.minimum(best, score)
    step = num_rows.to(tl.int64)
    square = tl.load(measures + rows, mask=live, other=0.0)
    lost = tl.load(measures + rows + 2 * step, mask=live, other=0.0)
    scale = tl.load(measures + rows + 3 * step, mask=live, other=1.0)
    if MEMBERS > 1:
        nearest = tl.load(measures + rows + 4 * step, mask=live, other=0.0)
        second = tl.load(measures + rows + 5 * step, mask=live, other=0.0)
    least = tl.load(exact_dist + rows, mask=live, other=0.0)
    answered = lost != -1.0
    unit = tl.full((BLOCK_N,), 1.0, tl.float32)
    of_codes = 1.0
    if SCALED:
        of_codes = tl.load(centre + padded_features)
        unit = tl.load(scales + rows // tile_rows, mask=live, other=1.0)

    own = scale.to(tl.float64)
    size = tl.sqrt(square.to(tl.float64)) / own * unit.to(tl.float64)
    gone = tl.sqrt(lost.to(tl.float64))
    # where the search began, by the same formula; sums in another order differ by less than `top` allows for
    began = square.to(tl.float64)
    if COPIED:
        began = tl.load(measures + rows + step, mask=live, other=0.0).to(tl.float64)
    if SCALED:
        # beside a row of 2^75 times its size a row vanishes, and its squares with it: 2^-62 for each feature
        size += (features + 1.0) * 2.168404344971009e-19
        gone += size * _ULP + (features + 1.0) * 2.168404344971009e-19
    ratio = unit.to(tl.float64) / of_codes
    raised = 0.5 * size * size / ratio * 1.00390625
    kept = tl.sqrt(tl.load(merged))
    loss = tl.sqrt(tl.load(merged + 1))
    half_norm = tl.load(merged + 2) * ratio
    bound = _error_bound(size, gone, kept, loss, half_norm, raised, ratio, features)
    # below 0 integers order the other way; the bound forbids it but for rows of 2^14 features and more
    ordered = (best >= 0.0) & (half_norm + raised < 0.1 * FAR)
    certain = ordered & (following.to(tl.float64) - best.to(tl.float64) > 2.0 * bound)
    if MEMBERS > 1:
        spread = (features + 4.0) * (2.0 * _ULP)
        margin = 2.0 * spread * second
        if DITHERED:
            off = tl.sqrt(tl.load(merged + 3)).to(tl.float32) * (8.0 * _ULP)
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
