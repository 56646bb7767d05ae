"""The contracts in float64, written from the papers and independently of the ops: what is timed is held to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import philox

# absolute error of a normal that every backend keeps
NORMAL_ERROR = 2.0**-18


def brute_force(x: Tensor, codes: Tensor, *, pairs: int = 1 << 20) -> tuple[Tensor, Tensor]:
    """The contract of `nearest_code`, to the letter: float64, features ascending, nothing fused, lowest index.

    Args:
        x: (N, D). codes: (K, D). pairs: rows times codes held at a time.

    Returns:
        indices (N,) int64 and squared distances (N,) float64; 0 and nan for a row without a finite distance.
    """
    codes = codes.double()
    bad = ~codes.isfinite().all(1)
    columns = codes.t().contiguous()
    indices, least = [], []
    for rows in x.split(max(1, pairs // len(codes))):
        rows = rows.double()
        total = rows.new_zeros(len(rows), len(codes))
        for column, code in zip(rows.t(), columns, strict=True):
            t = column[:, None] - code
            total += t * t
        # a code that is not finite loses even to an infinite distance
        total[:, bad] = torch.nan
        best = torch.where(total.isnan(), torch.inf, total).amin(1)
        index = (total == best[:, None]).int().argmax(1)
        lost = ~rows.isfinite().all(1) | bad.all()
        indices.append(torch.where(lost, 0, index))
        least.append(torch.where(lost, torch.nan, best))
    return torch.cat(indices), torch.cat(least)


class Family(NamedTuple):
    """The directional family in float64, for rows (N, D) and M selected points."""

    z: Tensor
    e: list[Tensor]
    r: list[Tensor]
    u: list[Tensor]
    weights: list[Tensor]
    w_norm: list[Tensor]


def family(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    direction: str,
    noise_std: float,
    seed: int,
    position: Tensor | None = None,
    row_offset: int = 0,
) -> Family:
    """Float64 transcription of DiVeQ eq. 7, 8, 12 and 16, differentiable by autograd in x and codebook."""
    n, d = x.shape
    x, codebook = x.double(), codebook.double()
    at = None if position is None else position.double()[:, None]
    weights = [torch.ones(n, 1, device=x.device).double()] if at is None else [1 - at, at]
    rows = torch.arange(n, device=x.device) + row_offset
    z, e, r, u, w_norm = x, [], [], [], []
    for m, weight in enumerate(weights):
        error = codebook[indices + m] - x
        v = philox.normals(philox.words(torch.tensor(seed, device=x.device), rows, -(-d // 4), m))
        v = v.flatten(1)[:, :d].double()
        along = {"noisy": noise_std * v + error, "detach": error, "random": v}[direction].detach()
        unit = torch.nn.functional.normalize(along, dim=1, eps=1e-300)
        # the derivative of a norm at 0 is taken as 0
        length = torch.where(error.eq(0).all(1, keepdim=True), 0, error).square().sum(1, keepdim=True)
        length = torch.where(length > 0, length, 1).sqrt() * (length > 0)
        z = z + weight * length * unit
        for kept, value in zip(
            (e, r, u, w_norm), (error, length, unit, along.norm(dim=1, keepdim=True)), strict=True
        ):
            kept.append(value.detach())
    return Family(z, e, r, u, weights, w_norm)


def family_bounds(
    f: Family,
    x: Tensor,
    grad: Tensor,
    *,
    direction: str,
    noise_std: float,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Largest error of z, of dL/dx and of each dL/dp_m of one row, (N, 1), for arithmetic in `dtype`.

    e is one rounding; v carries NORMAL_ERROR in each feature, so a unit direction is off by at most
    2 |dw| / |w|; a dot product of D terms rounds D times; the result is stored in `stored`.
    """
    d = x.shape[1]
    eps, store = torch.finfo(dtype).eps, torch.finfo(stored).eps
    scale = {"noisy": noise_std, "detach": 0.0, "random": 1.0}[direction]
    g = grad.double().norm(dim=1, keepdim=True)
    size = x.double().norm(dim=1, keepdim=True)
    z_bound, x_bound, p_bounds = 4 * eps * size, 4 * eps * g, []
    for r, w, weight in zip(f.r, f.w_norm, f.weights, strict=True):
        drift = eps * r + scale * d**0.5 * NORMAL_ERROR + 2 * eps * w
        turn = torch.where(w > 0, 2 * drift / w, 0).clamp_max(2.0)
        z_bound = z_bound + weight * (r * turn + 8 * eps * (r + size))
        p_bounds.append(weight * g * (turn + (d + 12) * eps))
        x_bound = x_bound + p_bounds[-1]
    z_bound = z_bound + store * (size + sum(f.r))
    return z_bound, x_bound + store * g * (1 + len(f.r)), p_bounds
