"""The most recent latents of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn._random import all_rows


def usable(x: Tensor, indices: Tensor | None = None) -> Tensor:
    """Which rows of x (..., D) are finite and have no negative index (...): (...) bool."""
    # a nan wins a maximum; several times faster than to ask each number
    finite = x.abs().amax(-1) < torch.inf
    return finite if indices is None else finite & (indices >= 0)


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
        good = usable(x, indices).flatten()
        # not every backend of a process group gathers bools
        self.push(all_rows(x.reshape(-1, x.shape[-1])), all_rows(good.byte()).bool())

    @torch.no_grad()
    def push(self, rows: Tensor, good: Tensor) -> None:
        """Keep those of the rows (N, D) where good (N,) is True; called with the same on every rank."""
        room = len(self.rows) - 1
        rank, total = good.cumsum(0) - 1, good.sum()
        slot = torch.where(good & (rank >= total - room), (self.seen + rank) % room, room)
        self.rows.index_copy_(0, slot, rows.to(self.rows.dtype))
        # which of those came last differs between ranks
        self.rows[-1].zero_()
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
