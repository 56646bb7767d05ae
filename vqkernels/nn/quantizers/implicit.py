"""What quantizers with an implicit codebook have in common: codes are points of a grid, indices their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqkernels.checks import check_below, check_count, refuse
from vqkernels.nn._autocast import full_precision
from vqkernels.nn._linear import finite_linear
from vqkernels.nn.estimators.base import Context, finite_rows, gather, mark, no_loss
from vqkernels.nn.quantizers.base import Quantized, Quantizer, check_decodable

# codebooks of up to this many codes are decoded from their table, which rounds alike for any number of rows
_TABLE = 1 << 16
# a table of more codes than this fits nowhere
_EXPORTED = 1 << 28


class ImplicitQuantizer(Quantizer):
    """Base of FSQ, LFQ and BSQ: a straight-through estimator onto a grid that needs no search and learns nothing.

    Where x has another number of features than the grid, linear layers lead there and back.

    A subclass writes `num_codes`, `points`, `snap` and `constants`, and `penalty` where it has a loss.

    Args:
        dim: D, features of x.
        grid_dim: features of the grid.
        channel_dim: dimension of x that holds the D features.
    """

    def __init__(self, dim: int, grid_dim: int, *, channel_dim: int = -1):
        name = type(self).__name__
        super().__init__(check_count(name, "dim", dim, minimum=1), channel_dim=channel_dim)
        self.grid_dim = grid_dim
        self.project_in = self.project_out = None
        if dim != grid_dim:
            self.project_in, self.project_out = nn.Linear(dim, grid_dim), nn.Linear(grid_dim, dim)

    def constants(self) -> dict[str, Tensor]:
        """Buffers that follow from the arguments, by name, on the CPU: a state_dict does not hold them."""
        raise NotImplementedError

    def keep_constants(self) -> None:
        """Register them; the last thing a constructor does."""
        for name, value in self.constants().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> ImplicitQuantizer:
        lost = [name for name in self.constants() if getattr(self, name).is_meta]
        super()._apply(fn, recurse)
        # a module made on the meta device, to load a state later, has no values that could move
        for name in lost:
            if not getattr(self, name).is_meta:
                getattr(self, name).copy_(self.constants()[name])
        return self

    @property
    def bits_per_latent(self) -> float:
        """log2 K."""
        return math.log2(self.num_codes)

    def snap(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest points of the grid, (..., d) with the straight-through gradient, and their numbers (...)."""
        raise NotImplementedError

    def points(self, indices: Tensor) -> Tensor:
        """The points of the grid with these numbers: int64 (...) -> (..., d) float32."""
        raise NotImplementedError

    def penalty(self, y: Tensor, counted: Tensor, context: Context) -> Tensor:
        """The loss of y (..., d), over the rows that are `counted` (...)."""
        return no_loss(y)

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before the grid, NaN in rows that are not finite, and which rows are: (..., 1)."""
        y = x if self.project_in is None else finite_linear(x, self.project_in)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        finite = finite_rows(y)
        return mark(y, finite), finite

    def _outside(self, points: Tensor) -> Tensor:
        if self.project_out is None:
            return points
        with full_precision(points.device):
            return finite_linear(points, self.project_out)

    def train_rows(self, x: Tensor, context: Context) -> Quantized:
        y, finite = self._inside(x)
        q, indices = self.snap(y)
        counted = finite.squeeze(-1) if context.mask is None else finite.squeeze(-1) & context.mask
        # 0 * nan is nan, also in a gradient
        loss = self.penalty(torch.where(counted[..., None], y, 0), counted, context)
        indices = torch.where(finite.squeeze(-1), indices, 0)
        z = self._outside(q).to(x.dtype)
        if context.mask is not None:
            z = torch.where(context.mask[..., None], z, 0)
            indices = torch.where(context.mask, indices, -1)
        return Quantized(z, indices[..., None], loss)

    def evaluate_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = self.encode_rows(x)
        return self._decode(indices).to(x.dtype), indices

    def encode_rows(self, x: Tensor) -> Tensor:
        y, finite = self._inside(x)
        return torch.where(finite, self.snap(y)[1][..., None], 0)

    def decode(self, indices: Tensor) -> Tensor:
        check_decodable(indices, 1)
        check_below("decode", "indices", indices, self.num_codes)
        return self._decode(indices)

    def _decode(self, indices: Tensor) -> Tensor:
        if self.num_codes <= _TABLE:
            return gather(self._table(indices.device), indices.squeeze(-1))
        rows = self._outside(self.points(indices.squeeze(-1).clamp_min(0)))
        return torch.where(indices >= 0, rows, 0)

    def _table(self, device: torch.device) -> Tensor:
        return self._outside(self.points(torch.arange(self.num_codes, device=device)))

    def export(self) -> Tensor:
        if self.num_codes > _EXPORTED:
            requirement = f"be at most {_EXPORTED} to export a table"
            fix = "Call decode on the indices that you have"
            refuse(ValueError, type(self).__name__, "num_codes", requirement, self.num_codes, fix)
        return self._table(self._device()).detach().clone()
