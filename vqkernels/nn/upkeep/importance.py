"""Importance replacement: unused codes move next to used ones."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import philox
from vqkernels.checks import check_number
from vqkernels.nn._random import all_sum, draw_seed
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.metrics import code_counts
from vqkernels.nn.upkeep.base import Upkeep
from vqkernels.nn.upkeep.recent import usable
from vqkernels.nn.upkeep.schedules import Schedule, check_schedule


class ImportanceReplacement(Upkeep):
    """Move unused codes next to used ones, drawn in proportion to their use (DiVeQ B.1).

    After each period, a code with fewer than threshold * rows / K rows becomes a copy of a code with more, plus
    noise * rms(that code) * N(0, I). Counts are of rows, over the whole period and all ranks.

    Args:
        schedule: when; such as `TwoPhase(total_steps)` or `Every(100)`.
        threshold: share of the mean use below which a code is replaced, in [0, 1].
        noise: size of the perturbation, relative to the root mean square of the copied code.
    """

    counts: Tensor

    def __init__(self, schedule: Schedule, *, threshold: float = 0.01, noise: float = 1e-3):
        super().__init__()
        name = "ImportanceReplacement"
        self.schedule = check_schedule(name, schedule)
        self.threshold = check_number(name, "threshold", threshold, up_to=1)
        self.noise = check_number(name, "noise", noise)

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        self.check_counted(num_codes, num_indices)
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        if indices is not None:
            # a row that is not finite has index 0 but used nothing
            used = torch.where(usable(x), indices, -1)
            self.counts += all_sum(code_counts(used, len(self.counts)))

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        if not self.schedule.due(step):
            return None
        counts = self.counts
        codes = codebook.codes()
        k, d = codes.shape
        # in float64, which holds counts exactly: a rounded mean would call codes of mean use dead
        dead = counts.double() < self.threshold * counts.sum().double() / k
        # cumulative use of the others: a code is drawn where a uniform number falls into its share
        share = torch.where(dead, 0, counts).cumsum(0)
        words = philox.words(
            draw_seed(codes.device), torch.arange(k, device=codes.device), 1 + (d + 3) // 4, philox.UPKEEP
        )
        drawn = (philox.uniforms(words[:, 0, 0]).double() * share[-1]).long()
        source = torch.searchsorted(share, drawn, right=True).clamp_max(k - 1)
        wide = torch.promote_types(codes.dtype, torch.float32)
        copied = codes[source].to(wide)
        jitter = philox.normals(words[:, 1:]).flatten(1)[:, :d].to(wide)
        codebook.assign(copied + self.spread(copied) * jitter, dead)
        self.counts.zero_()
        return dead

    def spread(self, copied: Tensor) -> Tensor:
        """Standard deviation of the perturbation of copied codes (..., D): (..., 1)."""
        return self.noise * copied.square().mean(-1, keepdim=True).sqrt()
