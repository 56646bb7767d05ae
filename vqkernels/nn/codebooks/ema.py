"""Codes as exponential moving averages of the latents that chose them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqkernels.checks import check_number
from vqkernels.nn._random import all_sum
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.methods import Method, register
from vqkernels.ops import code_sums


class EMACodebook(Codebook):
    """A codebook of exponential moving averages of the latents assigned to each code.

        h' = decay h + (1 - decay) n
        c' = c + (1 - decay) (sum x - n c) / h'    where n > 0        (DiVeQ eq. 3)

    h starts at 1, also where a code is overwritten, and a code that nobody chose stays where it is. The codes are a
    buffer: no optimizer moves them. Use it with an estimator that has no codebook loss, such as
    `STE(codebook_weight=0)`.

    Args:
        num_codes, dim, init, dtype, device: as of `Codebook`.
        decay: in [0, 1).

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    counts_codes = True
    mass: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        init: str = "uniform",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_codes, dim, init=init, dtype=dtype, device=device)
        self.decay = check_number(type(self).__name__, "decay", decay, below=1)

    def _keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("mass", torch.ones_like(weight[:, 0], dtype=_wide(weight)))
        self.register_buffer("counts", torch.zeros_like(weight[:, 0], dtype=torch.int64))
        self.register_buffer("sums", torch.zeros_like(weight, dtype=_wide(weight)))

    def _apply(self, fn: Callable, recurse: bool = True) -> EMACodebook:
        mass, sums = self.mass, self.sums
        super()._apply(fn, recurse)
        # statistics move with the codes but are never narrowed to half precision
        if not (mass.is_meta or self.weight.is_meta):
            self.mass, self.sums = (t.to(self.weight.device, _wide(self.weight)) for t in (mass, sums))
        return self

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor) -> None:
        counts, sums = code_sums(x, indices, self.num_codes)
        # summed over ranks at once: whatever copies a rank's buffers then copies the truth
        self.counts += all_sum(counts)
        self.sums += all_sum(sums)

    @torch.no_grad()
    def commit(self) -> None:
        n, codes = self.counts[:, None], self.weight.to(self.sums.dtype)
        self.mass.mul_(self.decay).add_(self.counts, alpha=1 - self.decay)
        step = (1 - self.decay) * (self.sums - n * codes) / self.mass[:, None]
        # a code with no rows keeps its value even when it is not finite
        self.weight.copy_(torch.where(n > 0, codes + step, codes))
        self.counts.zero_()
        self.sums.zero_()

    @torch.no_grad()
    def assign(self, codes: Tensor, where: Tensor | None = None) -> None:
        super().assign(codes, where)
        # an average that starts anew has the mass it began with
        self.mass.copy_(torch.ones_like(self.mass) if where is None else torch.where(where, 1, self.mass))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


register(
    "ema",
    Method(
        "STE with codes that are moving averages; no codebook loss",
        source="DiVeQ eq. 3; van den Oord et al. 2017",
        codebook=lambda spec: EMACodebook(spec.num_codes, spec.dim),
        estimator=lambda spec: STE(codebook_weight=0),
    ),
)
