"""Indices as places among those codes that a file lists as used."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from vqkernels.checks import refuse
from vqkernels.compat.face import Face

Remap = str | PathLike | Tensor | None


class Remapped(Face):
    """Base of the faces that take `remap` and `unknown_index`."""

    used: Tensor

    def _keep_used(self, num_codes: int, remap: Remap, unknown_index: str | int) -> None:
        self.remap, self.re_embed = remap, num_codes
        if remap is None:
            return
        if unknown_index not in ("random", "extra") and (
            isinstance(unknown_index, bool) or not isinstance(unknown_index, int)
        ):
            requirement = "be 'random', 'extra' or an int"
            refuse(
                ValueError,
                type(self).__name__,
                "unknown_index",
                requirement,
                repr(unknown_index),
                "Pass one of these",
            )
        used = remap if isinstance(remap, Tensor) else _loaded(remap)
        self.register_buffer("used", used)
        self.re_embed = len(used)
        self.unknown_index = unknown_index
        if unknown_index == "extra":
            self.unknown_index = len(used)
            self.re_embed = len(used) + 1

    def _num_codes(self) -> int:
        raise NotImplementedError

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """The place of each code among the used ones; `unknown_index`, or a random place, for others.

        Args:
            inds: (B, ...) int64.

        Raises:
            ValueError: it has one dimension alone.
        """
        self._check_batched("remap_to_used", inds)
        count, last = len(self.used), self._num_codes()
        places = torch.arange(count, device=inds.device)
        table = torch.full((last + 1,), count, device=inds.device)
        table = table.scatter_reduce(0, self.used.to(inds), places, "amin")
        # what is no code at all is unknown too
        new = table[torch.where((inds >= 0) & (inds < last), inds, last)]
        if self.unknown_index == "random":
            other = torch.randint(0, self.re_embed, inds.shape, device=inds.device)
        else:
            other = torch.full_like(inds, int(self.unknown_index))
        return torch.where(new == count, other, new)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The code that stands at each place among the used ones; the first one for an extra place.

        Args:
            inds: (B, ...) int64, which stay as they are.

        Raises:
            ValueError: it has one dimension alone.
        """
        self._check_batched("unmap_to_all", inds)
        if self.re_embed > len(self.used):
            inds = torch.where(inds >= len(self.used), 0, inds)
        return self.used.to(inds)[inds]

    def _check_batched(self, method: str, inds: Tensor) -> None:
        if inds.dim() < 2:
            fix = "Call inds[None]"
            refuse(ValueError, method, "inds", "have 2 dimensions or more", f"shape {tuple(inds.shape)}", fix)

    @staticmethod
    def _remap_options(peer: Any) -> dict[str, object]:
        if peer.remap is None:
            return {}
        extra = peer.re_embed > len(peer.used)
        return {"remap": peer.used, "unknown_index": "extra" if extra else peer.unknown_index}


def _loaded(path: str | PathLike) -> Tensor:
    # torch works without numpy, and so does this package where there is no file to read
    import numpy as np

    return torch.tensor(np.load(fspath(path)))
