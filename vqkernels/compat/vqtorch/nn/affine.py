"""The affine map that vqtorch puts between a codebook and the latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.checks import check_count, check_number
from vqkernels.compat.face import unserved


class AffineTransform(nn.Module):
    """A learned scale and bias of each feature that all codes of a group share (Huh et al. 2023, eq. 15 and A.1).

        c' = (1 + lr_scale s) c + lr_scale b

    Args:
        feature_size: D.
        use_running_statistics: only False, as from the layers of vqtorch, none of which can ask for True.
        momentum: of running statistics: without effect.
        lr_scale: how much faster s and b learn.
        num_groups: A; each of A blocks of consecutive codes has an s and a b.

    Raises:
        UnservedOption: `use_running_statistics` is True.
        TypeError, ValueError: a size or `lr_scale` is out of range.
    """

    def __init__(
        self,
        feature_size: int,
        use_running_statistics: bool = False,
        momentum: float = 0.1,
        lr_scale: float = 1,
        num_groups: int = 1,
    ):
        super().__init__()
        name = "AffineTransform"
        if use_running_statistics:
            fix = "Use vqkernels.nn.AffineEMACodebook"
            unserved(name, "use_running_statistics", use_running_statistics, fix)
        check_count(name, "feature_size", feature_size, minimum=1)
        self.use_running_statistics = False
        self.momentum = momentum
        self.lr_scale = check_number(name, "lr_scale", lr_scale)
        self.num_groups = check_count(name, "num_groups", num_groups, minimum=1)
        self.scale = nn.Parameter(torch.zeros(num_groups, feature_size))
        self.bias = nn.Parameter(torch.zeros(num_groups, feature_size))

    def get_affine_params(self) -> tuple[Tensor, Tensor]:
        """Scale and bias, each (A, 1, D)."""
        return (1.0 + self.lr_scale * self.scale)[:, None], (self.lr_scale * self.bias)[:, None]

    def forward(self, codebook: Tensor) -> Tensor:
        """The codes (..., K, D) as the latents meet them."""
        scale, bias = self.get_affine_params()
        return (scale * codebook.unflatten(-2, (self.num_groups, -1)) + bias).flatten(-3, -2)

    @torch.no_grad()
    def inverse(self, codes: Tensor, old: Tensor) -> Tensor:
        """The codebook (..., K, D) that shows as `codes`; a feature of scale 0 keeps its `old` value."""
        scale, bias = (each.double() for each in self.get_affine_params())
        found = (codes.double().unflatten(-2, (self.num_groups, -1)) - bias) / scale
        found = torch.where(scale == 0, old.double().unflatten(-2, (self.num_groups, -1)), found)
        return found.flatten(-3, -2).to(old.dtype)
