"""Codebooks: where codes come from, and what they learn from being used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqkernels.checks import FLOATS, check_choice, check_count, check_number, refuse
from vqkernels.nn._random import all_sum
from vqkernels.ops import code_sums


class Codebook(nn.Module):
    """A learned codebook: a `(K, D)` parameter that the optimizer moves.

    Args:
        num_codes: K >= 1.
        dim: D >= 1.
        init: "uniform" draws U(-1/K, 1/K) (van den Oord et al. 2017), "normal" draws N(0, 1).
        dtype: of the codes; float32 when omitted, also for half-precision latents.
        device: where to put them.

    Raises:
        TypeError, ValueError: a size or `init` is not one of the above.
    """

    weight: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        init: str = "uniform",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        check_count(name, "num_codes", num_codes, minimum=1)
        check_count(name, "dim", dim, minimum=1)
        check_choice(name, "init", init, ("uniform", "normal"))
        if dtype not in FLOATS:
            refuse(TypeError, name, "dtype", "be a floating-point dtype", dtype, "Pass torch.float32")
        weight = torch.empty(num_codes, dim, dtype=dtype, device=device)
        if init == "uniform":
            nn.init.uniform_(weight, -1 / num_codes, 1 / num_codes)
        else:
            nn.init.normal_(weight)
        self._keep(weight)

    def _keep(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight)

    @property
    def num_codes(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def codes(self) -> Tensor:
        """The (K, D) codes, differentiable where they are learned."""
        return self.weight

    def observe(self, x: Tensor, indices: Tensor) -> None:
        """Take note of a training batch: x (..., D) and indices (...); changes no code."""

    def commit(self) -> None:
        """Change the codes by what was observed since the last commit."""

    @torch.no_grad()
    def assign(self, codes: Tensor, where: Tensor | None = None) -> None:
        """Overwrite codes in place: all, or the rows of the (K,) mask `where`."""
        codes = codes.to(self.weight.dtype)
        self.weight.copy_(codes if where is None else torch.where(where[:, None], codes, self.weight))

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}"


class EMACodebook(Codebook):
    """A codebook of exponential moving averages of the latents assigned to each code.

        h' = decay h + (1 - decay) n
        c' = c + (1 - decay) (sum x - n c) / h'    where n > 0        (DiVeQ eq. 3)

    h starts at 1 and a code that nobody chose stays where it is. The codes are a buffer: no optimizer moves them.
    Use it with an estimator that has no codebook loss, such as `STE(codebook_weight=0)`.

    Args:
        num_codes, dim, init, dtype, device: as of `Codebook`.
        decay: in [0, 1).

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

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
        self.assign(torch.where(n > 0, codes + step, codes))
        self.counts.zero_()
        self.sums.zero_()


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
