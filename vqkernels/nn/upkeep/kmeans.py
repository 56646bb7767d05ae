"""k-means on our own search: starts by k-means++, then Lloyd's iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import philox
from vqkernels.checks import check_count, check_pair, check_rows, check_seed, refuse
from vqkernels.nn.upkeep.recent import usable
from vqkernels.ops import code_sums, nearest_code
from vqkernels.ops.philox import philox_op

# most candidates drawn from one distribution, and elements of x that one pass over rows takes at a time
_CANDIDATES, _CHUNK = 256, 1 << 22


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    iterations: int = 10,
    seed: Tensor | int | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Cluster latents: k-means++ (Arthur and Vassilvitskii 2007), then iterations of Lloyd.

        i(x) = argmin_j |x - c_j|^2,   c_j' = mean {x : i(x) = j}

    The start is the plain one (no greedy choice among several candidates): each next code is a row drawn with
    probability D^2(x) / sum D^2, D^2 the squared distance to the nearest code so far. Rows are proposed in batches
    from a D^2 that is out of date and accepted with probability D^2 now / D^2 then, which leaves that law exact and
    costs about one search of all codes in place of K passes over x.

    Codes without rows move to the rows farthest from their codes. Rows with a NaN or Inf have no part. The result is
    a function of x and the seed, whatever the number of threads; on a GPU, to the bit only where torch is asked
    for deterministic algorithms. It waits for the device a few times, for each batch of candidates.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64.
        num_codes: K >= 1.
        iterations: of Lloyd; 0 returns the start.
        seed: of the start, an int or a 0-d int64 tensor; by default drawn from torch's generator of x's device.
        start: (K, D) finite codes to start from, in place of k-means++.

    Returns:
        codes (K, D) float32, float64 for float64 x; units of x.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: x has fewer finite rows than K, or a shape, a size or the start does not fit.
    """
    op = "kmeans"
    check_rows(op, x)
    check_count(op, "num_codes", num_codes, minimum=1)
    check_count(op, "iterations", iterations)
    if start is not None:
        _check_start(op, x, num_codes, start)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[usable(rows)].to(wide)
    if len(rows) < num_codes:
        fix = "Pass more rows or ask for fewer codes"
        refuse(ValueError, op, "x", f"have at least {num_codes} finite rows, one per code", len(rows), fix)
    scale = _scale(rows)
    scaled = rows * scale
    if start is None:
        codes = rows[_plus_plus(scaled, num_codes, check_seed(op, seed, x.device))]
    else:
        codes = start.to(wide)
    if iterations == 0:
        return codes
    codes = codes * scale
    for _ in range(iterations):
        codes = _lloyd(scaled, codes)
    return codes / scale


def _check_start(op: str, x: Tensor, num_codes: int, start: Tensor) -> None:
    check_pair(op, x, start)
    if len(start) != num_codes:
        refuse(ValueError, op, "start", f"have {num_codes} codes", len(start), "Pass one row per code")


def _scale(x: Tensor) -> Tensor:
    """A power of two after which squared distances neither overflow nor vanish, 0-d."""
    _, exponent = torch.frexp(x.abs().amax())
    most = 1000 if x.dtype == torch.float64 else 120
    # written as the bits of a float64: a power function may round
    bits = (1023 - exponent.long().clamp(-most, most)) << 52
    return bits.view(torch.float64).to(x.dtype)


def _plus_plus(x: Tensor, num_codes: int, seed: Tensor) -> Tensor:
    """Rows drawn by the law of k-means++, (K,) int64."""
    n = len(x)
    shares = torch.ones(n, dtype=torch.int64, device=x.device)
    drawn = _draw(shares, philox_op(seed, 1, 1, philox.UPKEEP, 0)[0])
    least = nearest_code(x, x[drawn]).sq_dist
    chosen, proposed = [drawn], 1
    left = num_codes - 1
    while left > 0:
        most = least.amax()
        # integers, so that their sums are exact in any order
        shares = (least.double() / most * 2.0 ** (62 - n.bit_length())).long()
        # where all rows coincide with codes, one is as good as another
        shares = torch.where(most > 0, shares, 1)
        count = min(num_codes - left, _CANDIDATES)
        words, _ = philox_op(seed, count, 1, philox.UPKEEP, proposed)
        proposed += count
        drawn = _draw(shares, words)
        accepted = _accepted(x[drawn].double(), least[drawn].double(), words[:, 0, 2], most)
        drawn = drawn[accepted][:left]
        least = torch.minimum(least, nearest_code(x, x[drawn]).sq_dist)
        chosen.append(drawn)
        left -= len(drawn)
    return torch.cat(chosen)


def _draw(shares: Tensor, words: Tensor) -> Tensor:
    """A row for each of the words (B, 1, 4), in proportion to its share (N,)."""
    upto = shares.cumsum(0)
    position = ((words[:, 0, 0] << 16) + (words[:, 0, 1] >> 16)).double() * 2.0**-48
    return torch.searchsorted(upto, (position * upto[-1]).long(), right=True).clamp_max(len(shares) - 1)


def _accepted(candidates: Tensor, then: Tensor, words: Tensor, most: Tensor) -> Tensor:
    """Which candidates (B, D), drawn by the D^2 of before, stand by the D^2 that accepted ones leave, (B,) bool."""
    now, limit = then, words.double() * 2.0**-32 * then
    accepted = []
    for number, candidate in enumerate(candidates):
        accept = limit[number] < now[number]
        nearer = torch.minimum(now, (candidates - candidate).square().sum(1))
        now = torch.where(accept, nearer, now)
        accepted.append(accept)
    return torch.stack(accepted) | (most == 0)


def _lloyd(x: Tensor, codes: Tensor) -> Tensor:
    indices, sq_dist = nearest_code(x, codes)
    counts = torch.zeros(len(codes), dtype=torch.int64, device=x.device)
    sums = torch.zeros_like(codes, dtype=torch.float64)
    step = max(1, _CHUNK // x.shape[1])
    for rows, at in zip(x.split(step), indices.split(step), strict=True):
        # sums of what is left over stay small where the rows are far from zero
        found = code_sums(rows - codes[at], at, len(codes))
        counts, sums = counts + found.counts, sums + found.sums
    means = codes + sums / counts[:, None]
    empty = counts == 0
    farthest = sq_dist.topk(len(codes)).indices
    moved = x[farthest[(empty.cumsum(0) - 1).clamp_min(0)]]
    return torch.where(empty[:, None], moved, means.to(x.dtype))
