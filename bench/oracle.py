"""What a contender must find: float64 on some rows before it is timed, and on many at the end."""

from __future__ import annotations

import torch
from peers import Contender
from torch import Tensor

from vqkernels.testing import brute_force

# rows of each case that are compared with float64 brute force before anything is timed
CHECKED = 1024


class Oracle:
    """Float64 brute force on rows spread over a batch."""

    def __init__(self, x: Tensor, codes: Tensor):
        self.rows = torch.linspace(0, len(x) - 1, min(CHECKED, len(x)), device=x.device).long()
        self.x, self.codes = x[self.rows], codes
        pairs = 1 << (26 if x.is_cuda else 20)
        self.indices, self.sq_dist = brute_force(self.x, codes, pairs=pairs)

    def agreement(self, indices: Tensor) -> float:
        """Share of the rows whose index is the float64 one."""
        return float((indices[self.rows].long() == self.indices).double().mean())

    def check_step(self, z: Tensor) -> None:
        """A row quantized by DiVeQ is as far from its latent as the nearest code is; raises where one is not."""
        step = (z[self.rows].double() - self.x.double()).norm(dim=1)
        reach = self.sq_dist.sqrt()
        # z is stored in its dtype: an error of eps in each feature
        slack = 4 * torch.finfo(z.dtype).eps * (self.x.double().norm(dim=1) + reach) + 1e-5 * reach
        wrong = int(((step - reach).abs() > slack).sum())
        if wrong:
            raise ValueError(f"{wrong} of {len(reach)} checked rows do not move as far as they must")


def differing(contender: Contender, x: Tensor, codes: Tensor, expected: Tensor) -> int:
    """Rows for which a search finds another index."""
    return int((contender.make(codes, [x])(x).long() != expected).sum())
