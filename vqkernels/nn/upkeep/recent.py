"""The most recent latents of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn._random import all_rows


class RecentLatents(nn.Module):
    """A ring of the last `room` latents that are finite and not masked, the same on every rank.

    Args:
        room: how many are kept.
        dim: D.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, room: int, dim: int):
        super().__init__()
        # one more row for what must not be kept
        self.register_buffer("rows", torch.zeros(room + 1, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, x: Tensor, indices: Tensor | None = None) -> None:
        """Keep the latents x (..., D) of all ranks, but for rows with a NaN or Inf or a negative index (...)."""
        rows = x.reshape(-1, x.shape[-1]).to(self.rows.dtype)
        if indices is not None:
            rows = torch.where((indices >= 0).reshape(-1, 1), rows, torch.nan)
        rows = all_rows(rows)
        self.push(rows, rows.isfinite().all(1))

    @torch.no_grad()
    def push(self, rows: Tensor, good: Tensor) -> None:
        """Keep those of the rows (N, D) where good (N,) is True; called with the same on every rank."""
        room = len(self.rows) - 1
        rank, total = good.cumsum(0) - 1, good.sum()
        slot = torch.where(good & (rank >= total - room), (self.seen + rank) % room, room)
        self.rows.index_copy_(0, slot, torch.where(good[:, None], rows, 0).to(self.rows.dtype))
        self.seen += total

    def filled(self) -> Tensor:
        """Which of the `room` rows hold a latent, (room,) bool."""
        return torch.arange(len(self.rows) - 1, device=self.rows.device) < self.seen

    def in_order(self, op: str, at_least: int) -> Tensor:
        """The latents, oldest first, (n, D); waits for the device.

        Raises:
            RuntimeError: there are fewer than `at_least`, says `op`.
        """
        seen, room = int(self.seen), len(self.rows) - 1
        if min(seen, room) < at_least:
            fix = "Wait for more steps or use larger batches"
            refuse(RuntimeError, op, "training", f"see at least {at_least} finite latents", seen, fix)
        return self.rows[:-1].roll(-(seen % room), 0) if seen > room else self.rows[:seen]

    def clear(self) -> None:
        """Forget all, and give the memory back; nothing can be kept any more."""
        self.rows = self.rows.new_zeros(0, self.rows.shape[1])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # a cleared ring is empty, so its size is part of what is loaded
        loaded = state_dict.get(prefix + "rows")
        if loaded is not None and loaded.shape[1:] == self.rows.shape[1:]:
            self.rows = self.rows.new_zeros(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
