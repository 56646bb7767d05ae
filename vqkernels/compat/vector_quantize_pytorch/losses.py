"""What the peer makes of the distances to all codes, some rows at a time; and the orthogonal loss.

Its logits are l_j = -|x - c_j|, the distance itself and not its square, or x . c_j of rows of length 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqkernels.nn._autocast import full_precision
from vqkernels.nn.estimators.base import finite_rows
from vqkernels.ops._logits import rows_at_once


def logits_of(x: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """The logits of x (n, D) and codes (K, D), (n, K) in the wider dtype of the two, float32 or better."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    x, codes = x.to(dtype), codes.to(dtype)
    with full_precision(x.device):
        if cosine:
            return x @ codes.t()
        # around their mean, so that a common offset of rows and codes costs no digits
        centre = codes.detach().mean(0)
        x, codes = x - centre, codes - centre
        squares = x.square().sum(1, keepdim=True) + codes.square().sum(1)
        return -torch.addmm(squares, x, codes.t(), alpha=-2).clamp_min(1e-8).sqrt()


def _by_rows(run: Callable[..., Tensor], rows: tuple[Tensor, ...], codes: Tensor) -> list[Tensor]:
    """`run` on some rows of each tensor at a time; backward makes what it needs again."""
    at_once = rows_at_once(len(codes), codes.device)
    parts = zip(*(tensor.split(at_once) for tensor in rows), strict=True)
    if not torch.is_grad_enabled():
        return [run(*part, codes) for part in parts]
    return [checkpoint(run, *part, codes, use_reentrant=False) for part in parts]


def cross_entropy(x: Tensor, codes: Tensor, targets: Tensor, cosine: bool) -> Tensor:
    """Mean cross entropy of targets (G, ...), -1 for none, by the logits of x (G, ..., D) to codes (G, K, D).

    Rows with a NaN or Inf have none.
    """

    def run(rows: Tensor, wanted: Tensor, table: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(rows, table, cosine), wanted, ignore_index=-1, reduction="sum")

    good = finite_rows(x)
    x, targets = torch.where(good, x, 0), torch.where(good[..., 0], targets, -1)
    total = x.new_zeros((), dtype=torch.float32)
    for rows, table, wanted in zip(x.flatten(1, -2), codes, targets.flatten(1), strict=True):
        total = total + sum(_by_rows(run, (rows, wanted), table))
    return total / (targets >= 0).sum().clamp_min(1)


def diversity(x: Tensor, codes: Tensor, mask: Tensor | None, cosine: bool, temperature: float) -> Tensor:
    """Minus the entropy of each position's code distribution over items and heads, a mean over positions.

        p_n = mean softmax(temperature l_n),   loss = mean_n sum_j p_nj ln max(p_nj, 1e-5)

    Rows that are masked or hold a NaN or Inf do not count, and neither do positions of such rows alone.

    Args:
        x: (G, ..., N, D), positions of an item for each of the leading dims.
        codes: (G, K, D).
        mask: (G, ..., N) bool, or None for all.
        cosine: whether logits are products.
        temperature: factor of the logits.
    """

    def run(some: Tensor, shares: Tensor, tables: Tensor) -> Tensor:
        p = some.new_zeros((), dtype=torch.float32)
        for rows, share, table in zip(some, shares, tables, strict=True):
            soft = (logits_of(rows.flatten(0, 1), table, cosine) * temperature).softmax(1)
            p = p + (soft.view(*rows.shape[:2], -1) * share).sum(0)
        return (p * p.clamp_min(1e-5).log()).sum()

    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    good = finite_rows(x)
    if mask is not None:
        good = good & mask[..., None]
    items, good = torch.where(good, x, 0).flatten(1, -3), good.flatten(1, -3)
    count = good.sum((0, 1), keepdim=True)  # (1, 1, N, 1)
    shares = good / count.clamp_min(1)
    at_once = max(1, rows_at_once(codes.shape[1], codes.device) // items.shape[1])
    some = zip(items.split(at_once, 2), shares.split(at_once, 2), strict=True)
    parts = [checkpoint(run, *part, codes, use_reentrant=False) for part in some]
    return torch.stack(parts).sum() / (count > 0).sum().clamp_min(1)


def soft_codes(x: Tensor, codes: Tensor, cosine: bool, temperature: float) -> Tensor:
    """softmax(l / temperature) C: x (G, ..., D), codes (G, K, D) -> (G, ..., D)."""

    def run(rows: Tensor, table: Tensor) -> Tensor:
        return (logits_of(rows, table, cosine) / temperature).softmax(1) @ table.float()

    groups = zip(x.flatten(1, -2), codes, strict=True)
    return torch.stack([torch.cat(_by_rows(run, (rows,), table)) for rows, table in groups]).view(x.shape)


@torch.no_grad()
def sample(x: Tensor, codes: Tensor, cosine: bool, temperature: float) -> Tensor:
    """Draw codes with probability softmax(l / temperature): x (G, ..., D), codes (G, K, D) -> (G, ...) int64."""

    def run(rows: Tensor, table: Tensor) -> Tensor:
        logits = logits_of(rows, table, cosine) / temperature
        return logits.sub_(torch.empty_like(logits).exponential_().log_()).argmax(1)

    groups = zip(x.flatten(1, -2), codes, strict=True)
    found = [torch.cat(_by_rows(run, (rows,), table)) for rows, table in groups]
    return torch.stack(found).view(x.shape[:-1])


@torch.no_grad()
def nearest_few(x: Tensor, codes: Tensor, count: int) -> Tensor:
    """The nearest codes of each row, nearest first: x (G, ..., D), codes (G, K, D) -> (G, ..., count) int64."""

    def run(rows: Tensor, table: Tensor) -> Tensor:
        return logits_of(rows.double(), table.double(), False).topk(count, dim=1).indices

    groups = zip(x.flatten(1, -2), codes, strict=True)
    found = [torch.cat(_by_rows(run, (rows,), table)) for rows, table in groups]
    return torch.stack(found).view(*x.shape[:-1], count)


def orthogonal(codes: Tensor) -> Tensor:
    """How far codes (G, K, D) are from orthonormal (Shin et al. 2021, eq. 2).

        |U U^T - I|^2 / (G K^2)

    U are the codes at length 1, and 0 for a code of 0.
    """
    groups, size, _ = codes.shape
    wide = torch.promote_types(codes.dtype, torch.float32)
    unit = F.normalize(codes.to(wide), dim=-1, eps=1e-6)
    # |U U^T| = |U^T U|, which is D x D and not K x K
    squares = (unit.mT @ unit).square().sum() - 2 * unit.square().sum() + groups * size
    return squares / (groups * size**2)
