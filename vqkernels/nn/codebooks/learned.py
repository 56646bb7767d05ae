"""The learned codebook, and what every codebook has in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.checks import FLOATS, check_choice, check_count, refuse


class Codebook(nn.Module):
    """A learned codebook: a `(K, D)` parameter that the optimizer moves.

    The base of all codebooks. A subclass that makes its codes from something else overrides `codes`, and
    `num_codes` or `dim` where `weight` has another shape.

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
    # whether `assign` can write codes
    assignable = True
    # whether `observe` needs to know which code each row chose
    counts_codes = False

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

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.weight.device

    @property
    def learned(self) -> bool:
        """Whether codes take a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def codes(self) -> Tensor:
        """The (K, D) codes, differentiable where they are learned."""
        return self.weight

    def observe(self, x: Tensor, indices: Tensor) -> None:
        """Take note of a training batch: x (..., D) and indices (...), -1 for masked rows; changes no code."""

    def commit(self) -> None:
        """Change the codes by what was observed since the last commit."""

    @torch.no_grad()
    def assign(self, codes: Tensor, where: Tensor | None = None) -> None:
        """Overwrite codes, as `codes` shows them: all, or those of the (K,) mask `where`.

        Raises:
            ValueError: codes are made of something else and cannot be overwritten one by one.
        """
        if not self.assignable:
            fix = "Train it, or put its codes() into a Codebook"
            refuse(ValueError, "assign", "codebook", "be assignable", type(self).__name__, fix)
        codes = codes.to(self.weight.dtype)
        self.weight.copy_(codes if where is None else torch.where(where[:, None], codes, self.weight))

    def row_parameters(self) -> list[Tensor]:
        """Parameters with one row per code: an optimizer's moments of these rows end when codes are replaced."""
        return [self.weight] if isinstance(self.weight, nn.Parameter) else []

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}"
