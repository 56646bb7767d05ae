"""Warm-up without quantization: codes start as means of recent latents."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import check_count, refuse
from vqkernels.nn._random import all_rows
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.upkeep.base import Upkeep


class LatentMeans(Upkeep):
    """Warm up without quantization, then start the codes as means of recent latents (DiVeQ A.5, eq. 14).

    For `steps` optimizer steps z = x. The codes then become the means of K consecutive blocks of the most recent
    latents, oldest first, so that neighbouring codes, which SF-DiVeQ joins by a line, start near each other.

    Args:
        steps: length of the warm-up, in optimizer steps.
        latents_per_code: latents averaged for each code; the paper suggests 20 to 40.
    """

    recent: Tensor
    seen: Tensor

    def __init__(self, steps: int, *, latents_per_code: int = 40):
        super().__init__()
        self.steps = check_count("LatentMeans", "steps", steps, minimum=1)
        self.latents_per_code = check_count("LatentMeans", "latents_per_code", latents_per_code, minimum=1)
        self.ready = False

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        # a ring, and one more row for what must not be kept
        self.register_buffer("recent", torch.zeros(num_codes * self.latents_per_code + 1, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def idle(self) -> bool:
        return self.ready

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        if self.ready:
            return
        # every rank keeps the latents of all, so that one can save and each can start the codes
        rows = all_rows(x.reshape(-1, x.shape[-1]).to(self.recent.dtype))
        room = len(self.recent) - 1
        good = rows.isfinite().all(1)
        rank, total = good.cumsum(0) - 1, good.sum()
        slot = torch.where(good & (rank >= total - room), (self.seen + rank) % room, room)
        self.recent.index_copy_(0, slot, rows)
        self.seen += total

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        if self.ready or step < self.steps:
            return None
        # the one host sync of a training, between two steps
        seen, room = int(self.seen), len(self.recent) - 1
        latents = self.recent[:-1].roll(-(seen % room), 0) if seen > room else self.recent[:seen]
        k, d = codebook.num_codes, codebook.dim
        if len(latents) < k:
            fix = "Warm up for more steps or with larger batches"
            refuse(
                RuntimeError, "LatentMeans", "warm-up", f"see at least {k} finite latents", len(latents), fix
            )
        block = len(latents) // k
        codebook.assign(latents[: block * k].view(k, block, d).mean(1))
        self.ready = True
        self.recent = self.recent.new_zeros(0, d)
        return torch.ones(k, dtype=torch.bool, device=latents.device)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        self.ready = bool(state)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # the ring is gone once the codes have started, so its size is part of what is loaded
        loaded = state_dict.get(prefix + "recent")
        if loaded is not None and loaded.shape[1:] == self.recent.shape[1:]:
            self.recent = self.recent.new_zeros(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, latents_per_code={self.latents_per_code}, ready={self.ready}"
