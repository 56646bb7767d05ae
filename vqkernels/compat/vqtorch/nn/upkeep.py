"""What changes codes inside a forward: their start, an inner optimizer, and the replacement of unused ones."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels import philox
from vqkernels.checks import check_count, check_number
from vqkernels.nn._random import all_rows, all_sum, draw_seed, draw_seed_aside, of_first_rank
from vqkernels.nn.metrics import code_counts
from vqkernels.nn.quantizers.base import recomputing
from vqkernels.nn.upkeep.kmeans import kmeans
from vqkernels.nn.upkeep.lru import _sample
from vqkernels.nn.upkeep.recent import usable
from vqkernels.ops import code_sums
from vqkernels.ops.philox import philox_op

if TYPE_CHECKING:
    from vqkernels.compat.vqtorch.nn.vq import VectorQuant


def lru_replacement(vq_module: VectorQuant, rho: float = 1e-4, timeout: int = 100) -> VectorQuant:
    """Let codes that no row chose in `timeout` training forwards become latents of the last one.

    Args:
        vq_module: a face, which gets the buffer `_counts` (K,), forwards left of each code.
        rho: standard deviation of the noise on such a latent, in units of its length.
        timeout: at least 2.

    Returns:
        `vq_module`.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    check_count("lru_replacement", "timeout", timeout, minimum=2)
    vq_module.replace_rho = check_number("lru_replacement", "rho", rho)
    vq_module.replace_freq = timeout
    weight = vq_module.codebook.weight
    vq_module.register_buffer("_counts", timeout * torch.ones(vq_module.num_codes, device=weight.device))
    return vq_module


@torch.no_grad()
def replace_unused(vq: VectorQuant, x: Tensor, indices: Tensor) -> None:
    """Count a training forward, and replace the codes whose time is over.

    Args:
        x: (S, n, D), what each of S codebooks searched for.
        indices: (S, n) codes of all codebooks together.
    """
    # drawn in a forward that is run again as well, so that torch's generator goes on as it did
    seed = draw_seed(x.device)
    if recomputing():
        return
    books, size = len(x), vq.group_size
    good = usable(x, indices)  # (S, n)
    used = all_sum(code_counts(torch.where(good, indices, -1), books * size)) > 0
    # a codebook that does not divide has fewer codes than counters
    left = vq._counts[: books * size]
    left.copy_(torch.where(used, vq.replace_freq, left - used.any().to(left.dtype)))
    # smaller than its neighbours, so that what is loaded by a hair too low is caught as well
    dead = (left <= 0).view(books, size)
    # where to look costs nothing; elsewhere the host would wait
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():
        return
    fresh, found = zip(
        *[
            _fresh(*each, seed, book, vq.replace_rho)
            for book, each in enumerate(zip(x, good, dead, strict=True))
        ],
        strict=True,
    )
    where = dead & torch.stack(found)[:, None]
    vq.assign(torch.stack(fresh), where)
    left.masked_fill_(where.flatten(), vq.replace_freq)


def _fresh(
    x: Tensor, good: Tensor, dead: Tensor, seed: Tensor, book: int, rho: float
) -> tuple[Tensor, Tensor]:
    """A latent with noise for each code (K, D) that is dead, and whether there was any."""
    count, dim = len(dead), x.shape[1]
    words, _ = philox_op(seed, 1, (2 * count + 3) // 4, philox.UPKEEP, book)
    pick, turn = words.flatten()[: 2 * count].chunk(2)
    rows, filled = _sample(x, good, pick)
    # codes take the latents in a random order, different ones where there are enough
    order = torch.where(filled, turn, 1 << 32).argsort(stable=True)
    rows = rows[order[(dead.cumsum(0) - 1).clamp_min(0) % filled.sum().clamp_min(1)]]
    _, noise = philox_op(seed, count, (dim + 3) // 4, philox.NOISE, book * count)
    noise = noise.flatten(1)[:, :dim].to(rows.dtype)
    return rows + rho * rows.norm(dim=1, keepdim=True) * noise, filled.any()


@torch.no_grad()
def centroids(x: Tensor, num_codes: int) -> Tensor:
    """Codes (K, D) by k-means on the rows x (n, D) of all ranks; on fewer rows than codes, these in turn with noise."""
    rows = all_rows(x.detach())
    rows = rows[usable(rows)]
    seed = draw_seed_aside(x.device)
    if len(rows) >= num_codes:
        return of_first_rank(kmeans(rows, num_codes, seed=seed))
    message = f"kmeans_init: {len(rows)} rows for {num_codes} codes. Pass a larger batch or fewer num_codes."
    warnings.warn(message, stacklevel=2)
    if not len(rows):
        return x.new_zeros(num_codes, x.shape[1])
    _, noise = philox_op(seed, num_codes, (x.shape[1] + 3) // 4, philox.NOISE, 0)
    turn = torch.arange(num_codes, device=x.device) % len(rows)
    return of_first_rank(rows[turn] + 1e-3 * noise.flatten(1)[:, : x.shape[1]].to(rows.dtype))


@torch.no_grad()
def inner_step(vq: VectorQuant, x: Tensor, indices: Tensor) -> None:
    """A step of the inner optimizer on mean (sg[x] - c_i)^2 over all ranks, groups and features.

    Args:
        x: (S, n, D), what each of S codebooks searched for.
        indices: (S, n) codes of all codebooks together.
    """
    optimizer, weight = vq.inplace_codebook_optimizer, vq.codebook.weight
    if optimizer is None or not weight.requires_grad:
        return
    codes = vq.get_codebook()
    counts, sums = code_sums(F.embedding(indices, codes) - x, indices, len(codes))
    rows = all_sum(counts.sum()).clamp_min(1)
    grad = 2 * all_sum(sums) / (rows * codes.shape[1])
    if hasattr(vq, "affine_transform"):
        scale, _ = vq.affine_transform.get_affine_params()
        blocks = grad.view(len(x), vq.affine_transform.num_groups, -1, grad.shape[1])
        grad = (scale * blocks).view_as(grad)
    # what the outer optimizer has gathered there is not ours
    kept, weight.grad = weight.grad, grad.to(weight.dtype)
    try:
        optimizer.step()
    finally:
        weight.grad = kept
