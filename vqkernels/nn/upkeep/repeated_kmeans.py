"""Codes that are fitted anew to recent latents, again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import check_count
from vqkernels.nn._random import draw_seed, of_first_rank
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.upkeep.base import Upkeep
from vqkernels.nn.upkeep.kmeans import kmeans
from vqkernels.nn.upkeep.recent import RecentLatents
from vqkernels.nn.upkeep.schedules import Schedule, check_schedule


class RepeatedKMeans(Upkeep):
    """Fit all codes anew to the most recent latents, by k-means++ and Lloyd (Lancucki et al. 2020; Huh table 1).

    All codes are in use after a fit, but they are other codes: a decoder must adapt to each, so stop early.

    Args:
        schedule: when; such as `Every(steps_per_epoch)`.
        iterations: of Lloyd after k-means++.
        latents_per_code: latents kept for each code, over all ranks.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    recent: RecentLatents

    def __init__(self, schedule: Schedule, *, iterations: int = 10, latents_per_code: int = 40):
        super().__init__()
        name = "RepeatedKMeans"
        self.schedule = check_schedule(name, schedule)
        self.iterations = check_count(name, "iterations", iterations)
        self.latents_per_code = check_count(name, "latents_per_code", latents_per_code, minimum=1)

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        self.recent = RecentLatents(num_codes * self.latents_per_code, dim)

    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        self.recent.add(x, indices)

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        if not self.schedule.due(step):
            return None
        latents = self.recent.in_order("RepeatedKMeans", codebook.num_codes)
        seed = draw_seed(latents.device)
        codes = kmeans(latents, codebook.num_codes, iterations=self.iterations, seed=seed)
        codebook.assign(of_first_rank(codes))
        return torch.ones(len(codes), dtype=torch.bool, device=codes.device)

    def extra_repr(self) -> str:
        return f"{self.schedule}, iterations={self.iterations}, latents_per_code={self.latents_per_code}"
