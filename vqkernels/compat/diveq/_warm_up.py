"""The warm-up of the space-filling faces: codes start as means of consecutive blocks of latents."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vqkernels.nn._random import all_sum, distributed, of_first_rank
from vqkernels.ops import code_sums


class BlockMeans:
    """Means of K consecutive blocks of the latents of some iterations (DiVeQ A.5, eq. 14), without the latents.

    Of row n of N in iteration i of A, block floor(K (i + n / N) / A) is told; ranks divide an iteration in their
    order. A sum and a count for each block are all that is kept.

    Args:
        num_codes: K.
        iterations: A >= 1.
        on_cpu: keep the sums on the CPU.
    """

    def __init__(self, num_codes: int, iterations: int, *, on_cpu: bool):
        self.num_codes, self.iterations, self.on_cpu = num_codes, iterations, on_cpu
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, iteration: int) -> None:
        """Take note of the latents x (N, D) of an iteration, from 0; rows with a NaN or Inf have no part."""
        if not len(x):
            return
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
        k, n = self.num_codes, len(x)
        before, all_rows = (iteration * ranks + rank) * n, self.iterations * ranks * n
        first, last = k * before // all_rows, k * (before + n - 1) // all_rows
        block = k * (before + torch.arange(n, device=x.device)) // all_rows - first
        counts, sums = code_sums(x, block, last - first + 1)
        if self._sums is None or self._counts is None:
            device = torch.device("cpu") if self.on_cpu else x.device
            self._sums = torch.zeros(k, x.shape[1], dtype=sums.dtype, device=device)
            self._counts = torch.zeros(k, dtype=torch.int64, device=device)
        self._sums[first : last + 1] += sums.to(self._sums.device)
        self._counts[first : last + 1] += counts.to(self._counts.device)

    @torch.no_grad()
    def codes(self, device: torch.device, dim: int) -> tuple[Tensor, int] | None:
        """The codes (K, D) that a warm-up ends with and the number of latents; None without a latent.

        Where blocks are empty, as with fewer latents than codes, the codes are spread evenly over the line through
        the means of the others. Waits for the device; called on every rank.
        """
        sums, counts = self._sums, self._counts
        if sums is None or counts is None:
            # this rank has seen nothing, the others may have
            sums = torch.zeros(self.num_codes, dim)
            counts = torch.zeros(self.num_codes, dtype=torch.int64)
        sums, counts = all_sum(sums.to(device, copy=True)), all_sum(counts.to(device, copy=True))
        filled = counts > 0
        means = sums[filled] / counts[filled, None]
        if not len(means):
            return None
        return of_first_rank(resample(means, self.num_codes)), int(counts.sum())


def resample(points: Tensor, count: int) -> Tensor:
    """`count` points at equal steps along the numbers of a line of points (n, D), n >= 1; the same where n = count."""
    n = len(points)
    if n == count:
        return points
    at = torch.arange(count, device=points.device, dtype=torch.float64) * ((n - 1) / max(1, count - 1))
    first = at.long().clamp_max(n - 1)
    second = (first + 1).clamp_max(n - 1)
    return torch.lerp(points[first], points[second], (at - first)[:, None].to(points.dtype))
