"""Warm-up without quantization: codes start as means of recent latents."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import check_count
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.upkeep.base import Upkeep
from vqkernels.nn.upkeep.recent import RecentLatents


class LatentMeans(Upkeep):
    """Warm up without quantization, then start the codes as means of recent latents (DiVeQ A.5, eq. 14).

    For `steps` optimizer steps z = x. The codes then become the means of K consecutive blocks of the most recent
    latents, oldest first, so that neighbouring codes, which SF-DiVeQ joins by a line, start near each other.

    Args:
        steps: length of the warm-up, in optimizer steps.
        latents_per_code: latents averaged for each code; the paper suggests 20 to 40.

    Raises:
        TypeError, ValueError: a number is not a positive int.
    """

    recent: RecentLatents

    def __init__(self, steps: int, *, latents_per_code: int = 40):
        super().__init__()
        self.steps = check_count("LatentMeans", "steps", steps, minimum=1)
        self.latents_per_code = check_count("LatentMeans", "latents_per_code", latents_per_code, minimum=1)
        self.ready = False

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        self.recent = RecentLatents(num_codes * self.latents_per_code, dim)

    @property
    def idle(self) -> bool:
        return self.ready

    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        if not self.ready:
            # every rank keeps the latents of all, so that one can save and each can start the codes
            self.recent.add(x, indices)

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        if self.ready or step < self.steps:
            return None
        k, d = codebook.num_codes, codebook.dim
        # the one host sync of a training, between two steps
        latents = self.recent.in_order("LatentMeans", k)
        block = len(latents) // k
        codebook.assign(latents[: block * k].view(k, block, d).mean(1))
        self.ready = True
        self.recent.clear()
        return torch.ones(k, dtype=torch.bool, device=latents.device)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, latents_per_code={self.latents_per_code}, ready={self.ready}"
