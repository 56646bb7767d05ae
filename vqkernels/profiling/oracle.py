"""What a contender must find: float64 before it is timed, and on many rows at the end."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.profiling.float64 import brute_force

# rows of each case that are compared with float64 brute force before anything is timed
CHECKED = 1024
# products of brute force that a CPU may spend on them
_PRODUCTS = 1 << 29
# a search that does not promise the float64 argmin must find it for most rows to be one, or miss it by little
PLAUSIBLE, REGRET = 0.5, 0.02


class Oracle:
    """Float64 brute force on rows spread over a batch; on a CPU all rows by our reference, held to these.

    Args:
        x: (N, D). codes: (K, D).
        whole: whether a CPU shall find all rows.
    """

    def __init__(self, x: Tensor, codes: Tensor, *, whole: bool = True):
        self.whole = whole
        many = CHECKED if x.is_cuda else max(16, min(CHECKED, _PRODUCTS // codes.numel()))
        self.rows = torch.linspace(0, len(x) - 1, min(many, len(x)), device=x.device).long()
        self.all, self.codes = x, codes
        self.x = x[self.rows]
        pairs = 1 << (26 if x.is_cuda else 20)
        self.indices, self.sq_dist = brute_force(self.x, codes, pairs=pairs)

    @cached_property
    def reference(self) -> Tensor | None:
        """Indices of all rows, where asking for them is cheap."""
        if self.all.is_cuda or not self.whole:
            return None
        found = vq.nearest_code(self.all, self.codes, backend="reference").indices
        if not torch.equal(found[self.rows], self.indices):
            raise ValueError("the reference search does not equal float64 brute force")
        return found

    def agreement(self, indices: Tensor) -> tuple[float, int]:
        """Share of the compared rows whose index is the float64 one, and how many were compared."""
        if self.reference is None:
            found, expected = indices[self.rows], self.indices
        else:
            found, expected = indices, self.reference
        return float((found.long() == expected).double().mean()), len(expected)

    def regret(self, indices: Tensor) -> float:
        """How much farther, in squared distance, the codes that were found are on average."""
        chosen = self.codes[indices[self.rows].long()].double()
        total = (self.x.double() - chosen).square().sum()
        return float(total / self.sq_dist.sum() - 1) if total else 0.0

    def check_search(self, indices: Tensor, exact: bool) -> tuple[float, int]:
        """`agreement`, or ValueError where it is not what was promised."""
        share, rows = self.agreement(indices)
        if share < (1.0 if exact else PLAUSIBLE) and (exact or self.regret(indices) > REGRET):
            raise ValueError(f"equals float64 on {share:.4%} of the checked rows")
        return share, rows
