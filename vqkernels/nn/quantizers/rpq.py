"""Random-projection quantization: targets for self-supervised learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_count
from vqkernels.nn._autocast import full_precision
from vqkernels.nn.estimators.base import finite_rows, nearest
from vqkernels.nn.quantizers.base import check_channel_dim, latent_rows
from vqkernels.ops import unit_rows


class RPQ(nn.Module):
    """Number latents by a frozen random projection and frozen random codes (BEST-RQ, Chiu et al. 2022, eq. 1).

        i_q = argmin_j | c_qj/|c_qj| - A_q x/|A_q x| |,   A Xavier-uniform, c standard normal

    It only makes indices, the targets of a masked prediction: nothing is learned, and there is nothing to decode. The
    paper normalises x to mean 0 and variance 1 before.

    Args:
        dim: D, features of x.
        num_codes: K of each codebook.
        code_dim: features of a code; 16 in the paper.
        codebooks: Q independent projections and codebooks, searched in one call.
        channel_dim: dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        TypeError, ValueError: a size is below 1, or `channel_dim` is not an int.
    """

    projection: Tensor
    weight: Tensor

    def __init__(
        self, dim: int, num_codes: int, *, code_dim: int = 16, codebooks: int = 1, channel_dim: int = -1
    ):
        super().__init__()
        sizes = {"dim": dim, "num_codes": num_codes, "code_dim": code_dim, "codebooks": codebooks}
        for name, size in sizes.items():
            check_count("RPQ", name, size, minimum=1)
        self.dim, self.channel_dim = dim, check_channel_dim("RPQ", channel_dim)
        projection = torch.empty(codebooks, code_dim, dim)
        for one in projection:
            nn.init.xavier_uniform_(one)
        self.register_buffer("projection", projection)
        self.register_buffer("weight", F.normalize(torch.randn(codebooks, num_codes, code_dim), dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices of x: int64 (..., Q), without the channel dimension; 0 for rows that are not finite, -1 for masked.

        Args:
            x: any shape with D features in `channel_dim`.
            mask: bool, the shape of x without `channel_dim`: False where a row takes no part.

        Raises:
            TypeError, ValueError: x or the mask does not fit.
        """
        rows = latent_rows("RPQ", x, self.dim, self.channel_dim, mask)
        with full_precision(x.device):
            y = F.linear(rows.to(self.projection.dtype), self.projection.flatten(0, 1))
            y = unit_rows(y.unflatten(-1, self.projection.shape[:2]))  # (..., Q, code_dim)
        indices = torch.where(finite_rows(rows), nearest(y, self.weight), 0)
        return indices if mask is None else torch.where(mask[..., None], indices, -1)

    def extra_repr(self) -> str:
        codebooks, num_codes, code_dim = self.weight.shape
        return f"dim={self.dim}, num_codes={num_codes}, code_dim={code_dim}, codebooks={codebooks}"
