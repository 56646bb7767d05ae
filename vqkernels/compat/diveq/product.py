"""ProductDIVEQ and ProductSFDIVEQ: each codebook quantizes a group of features."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import refuse
from vqkernels.compat.diveq import _replacement, _space
from vqkernels.compat.diveq._base import ALWAYS
from vqkernels.compat.diveq._several import STARTS, Pick, Several, SeveralCodes, SeveralCurves, Walk
from vqkernels.nn.quantizers.combined import chosen_points


class _Product(Several):
    independent = True

    def _part(self, dim: int, num_codebooks: int) -> int:
        if dim % num_codebooks:
            fix = "Pass a num_codebooks that divides it"
            refuse(ValueError, type(self).__name__, "embedding_dim", f"divide by {num_codebooks}", dim, fix)
        return dim // num_codebooks

    @property
    def pvq_dim(self) -> int:
        """Features of a group, D / Q."""
        return self.codebook.shape[2]

    def _walk(self, z: Tensor, pick: Pick) -> Walk:
        groups = z.detach().split(self.pvq_dim, dim=1)
        points, indices = [], []
        for q, (codes, group) in enumerate(zip(self.codebook.unbind(0), groups, strict=True)):
            choice, index = pick(group, codes, q)
            points.append(chosen_points(codes, choice))
            indices.append(index)
        return Walk(torch.cat(points, 1), indices, list(groups))


class ProductDIVEQ(_Product, SeveralCodes):
    """Product DiVeQ: z_q = z + |c - z| sg[u], c made of one code for each group of features (DiVeQ C.7).

    Args:
        num_embeddings: K of each codebook.
        embedding_dim: D, a multiple of Q.
        num_codebooks: Q groups of D / Q features.
        noise_var: standard deviation of the one noise of a row; see `DIVEQ`.
        replacement_iters, discard_threshold, perturb_eps, uniform_init, allow_warning, verbose, codebook_reset: as of
            `DIVEQ`, for each codebook.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.product_diveq.ProductDIVEQ", "product_diveq.ProductDIVEQ")
    differences = ALWAYS + _replacement.DIFFERENCES


class ProductSFDIVEQ(_Product, SeveralCurves):
    """Product SF-DiVeQ: as `ProductDIVEQ` in the warm-up, then with dithered points of one curve per group.

    Args:
        num_embeddings: K >= 2 of each codebook.
        embedding_dim: D, a multiple of Q.
        num_codebooks: Q groups of D / Q features.
        noise_var, skip_iters, avg_iters, replacement_iters, discard_threshold, perturb_eps, uniform_init,
            allow_warning, verbose, latents_on_cpu: as of `ResidualSFDIVEQ`.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.product_sf_diveq.ProductSFDIVEQ", "product_sf_diveq.ProductSFDIVEQ")
    differences = (*ALWAYS, *_replacement.DIFFERENCES, *_space.DIFFERENCES, STARTS)
