"""The affine map between the moments of codes and those of rows, kept in the peer's buffers (Huh et al. 2023, A.12).

    c' = (c - mean_c) sqrt(max(var_x, 1e-5) / max(var_c, 1e-5)) + mean_x

Moments are averages over training batches; the first takes them as they are, and before it the map is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.nn._random import all_sum, distributed
from vqkernels.nn.estimators.base import finite_rows


class Affine(NamedTuple):
    """How moments are kept.

    Attributes:
        sync: whether those of rows are of all ranks.
        batch_decay: of the moments of rows.
        codebook_decay: of the moments of codes.
    """

    sync: bool
    batch_decay: float
    codebook_decay: float


class Kept(nn.Module):
    """Codes (G, K, D) and the buffers of moments (G, 1, D), those of rows None before the first batch."""

    embed: Tensor
    batch_mean: Tensor | None
    batch_variance: Tensor | None
    codebook_mean: Tensor
    codebook_variance: Tensor


def register(book: Kept, groups: int, dim: int) -> None:
    """Give a codebook the peer's buffers."""
    for name in ("batch_mean", "batch_variance"):
        book.register_buffer(name, None)
    for name in ("codebook_mean", "codebook_variance"):
        book.register_buffer(f"{name}_needs_init", torch.tensor(True))
        book.register_buffer(name, torch.zeros(groups, 1, dim))


def expect(book: Kept, state: dict, prefix: str) -> None:
    """Make room for the moments that a state_dict holds."""
    for name in ("batch_mean", "batch_variance"):
        held = state.get(prefix + name)
        if held is not None and getattr(book, name) is None:
            setattr(book, name, torch.zeros_like(held, device=book.embed.device))


@torch.no_grad()
def learn(book: Kept, affine: Affine, x: Tensor, mask: Tensor | None) -> None:
    """Take the moments of the codes and of rows x (G, ..., D), but those that are masked (G, ...) or not finite."""
    codes = book.embed.float()
    _average(book, "codebook_mean", codes.mean(1, keepdim=True), affine.codebook_decay)
    variance = codes.var(1, unbiased=False, keepdim=True)
    _average(book, "codebook_variance", variance, affine.codebook_decay)
    rows = x.float().flatten(1, -2)
    good = finite_rows(rows)
    if mask is not None:
        good = good & mask.flatten(1)[..., None]
    sync = affine.sync and distributed()
    count = good.sum(1, keepdim=True).float()
    total = torch.where(good, rows, 0).sum(1, keepdim=True)
    if sync:
        all_sum(count)
        all_sum(total)
    # without rows, what is known stays, and else the map is the identity
    some = count > 0
    mean = torch.where(some, total / count, book.codebook_mean)
    squares = torch.where(good, rows - mean, 0).square_().sum(1, keepdim=True)
    if sync:
        all_sum(squares)
    variance = torch.where(some, squares / count, book.codebook_variance)
    _average(book, "batch_mean", mean, affine.batch_decay, some)
    _average(book, "batch_variance", variance, affine.batch_decay, some)


def outward(book: Kept, codes: Tensor) -> Tensor:
    """Codes (G, K, D) in place of those that are kept, differentiable."""
    if book.batch_mean is None or book.batch_variance is None:
        return codes
    return (codes.float() - book.codebook_mean) / _ratio(book, book.batch_variance) + book.batch_mean


def inward(book: Kept, sums: Tensor, counts: Tensor) -> Tensor:
    """Sums (G, K, D) of as many rows as `counts` (G, K) says, as sums of rows mapped back to what is kept."""
    if book.batch_mean is None or book.batch_variance is None:
        return sums
    counts = counts[..., None]
    return (sums - counts * book.batch_mean) * _ratio(book, book.batch_variance) + counts * book.codebook_mean


def _ratio(book: Kept, variance: Tensor) -> Tensor:
    """Deviation of codes over that of rows."""
    return (book.codebook_variance.clamp_min(1e-5) / variance.clamp_min(1e-5)).sqrt()


def _average(book: Kept, name: str, new: Tensor, decay: float, where: Tensor | None = None) -> None:
    old = getattr(book, name)
    if old is None:
        setattr(book, name, new.clone())
        return
    moved = old * decay + new * (1 - decay)
    waits = getattr(book, f"{name}_needs_init", None)
    if waits is not None:
        # asked on the device, so that the host does not wait
        moved = torch.where(waits, new, moved)
        waits.fill_(False)
    old.copy_(moved if where is None else torch.where(where, moved, old))
