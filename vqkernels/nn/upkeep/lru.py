"""Least-recently-used replacement: codes that nobody chose for long become recent latents."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import philox
from vqkernels.checks import check_count
from vqkernels.nn._random import all_sum, draw_seed, rows_before
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.metrics import code_counts
from vqkernels.nn.upkeep.base import Upkeep
from vqkernels.nn.upkeep.recent import RecentLatents, usable
from vqkernels.ops.philox import philox_op


class LeastRecentlyUsed(Upkeep):
    """Replace a code that no row chose for `timeout` optimizer steps by a recent latent (Huh section 3).

    Each training forward keeps up to K latents, drawn at random over the batch of all ranks; smaller batches leave
    those of the steps before in place. Codes that are due take different ones where there are enough. Steps without a
    latent do not count.

    Args:
        timeout: in optimizer steps.

    Raises:
        TypeError, ValueError: `timeout` is not a positive int.
    """

    recent: RecentLatents
    unused: Tensor
    counts: Tensor
    seed: Tensor

    def __init__(self, timeout: int = 20):
        super().__init__()
        self.timeout = check_count("LeastRecentlyUsed", "timeout", timeout, minimum=1)

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        self.check_counted(num_codes, num_indices)
        self.recent = RecentLatents(num_codes, dim)
        # steps since each code was used, and rows that chose it since the last commit
        self.register_buffer("unused", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))
        # a forward that is run again must find torch's generator as it was, so commits draw for it
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        if indices is None:
            return
        good = usable(x, indices)
        self.counts += all_sum(code_counts(torch.where(good, indices, -1), len(self.counts)))
        room = len(self.counts)
        words, _ = philox_op(self.seed, 1, (room + 3) // 4, philox.UPKEEP, 0)
        self.recent.push(*_sample(x.reshape(-1, x.shape[-1]), good.flatten(), words.flatten()[:room]))
        self.seed += 1

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        used = self.counts > 0
        self.unused.copy_(torch.where(used, 0, self.unused + used.any()))
        self.counts.zero_()
        filled = self.recent.filled()
        dead = (self.unused >= self.timeout) & filled.any()
        self.unused.masked_fill_(dead, 0)
        seed = draw_seed(dead.device)
        self.seed.copy_(seed)
        # the codes that are due take the latents in a random order
        words, _ = philox_op(seed, 1, (len(dead) + 3) // 4, philox.UPKEEP, 1)
        order = torch.where(filled, words.flatten()[: len(dead)], 1 << 32).argsort(stable=True)
        turn = (dead.cumsum(0) - 1).clamp_min(0) % filled.sum().clamp_min(1)
        codebook.assign(self.recent.rows[order[turn]], dead)
        return dead

    def extra_repr(self) -> str:
        return f"timeout={self.timeout}"


def _sample(x: Tensor, good: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """One of each of `len(words)` equal parts of the good rows of all ranks, and which parts have one.

    The same on every rank, and the same as of one process on the joint batch.
    """
    upto = good.cumsum(0)
    before, total = rows_before(good.sum())
    bounds = torch.arange(len(words) + 1, device=x.device) * total // len(words)
    width = bounds.diff()
    number = bounds[:-1] + (words * width >> 32) - before
    mine = (width > 0) & (number >= 0) & (number < total - before)
    if not len(x):
        return all_sum(x.new_zeros(len(words), x.shape[1])), width > 0
    at = torch.searchsorted(upto, number, right=True)
    mine = mine & (at < len(x))
    rows = torch.where(mine[:, None], x[at.clamp_max(len(x) - 1)], 0)
    return all_sum(rows), width > 0
