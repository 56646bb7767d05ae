"""ResidualDIVEQ and ResidualSFDIVEQ: each codebook quantizes what those before it left."""

from __future__ import annotations

from torch import Tensor

from vqkernels.compat.diveq import _replacement, _space
from vqkernels.compat.diveq._base import ALWAYS
from vqkernels.compat.diveq._several import STARTS, Pick, Several, SeveralCodes, SeveralCurves, Walk
from vqkernels.nn.quantizers.combined import chosen_points


class _Residual(Several):
    independent = False

    def _part(self, dim: int, num_codebooks: int) -> int:
        return dim

    def _walk(self, z: Tensor, pick: Pick) -> Walk:
        left, target = z.detach(), None
        indices, searched = [], []
        for q, codes in enumerate(self.codebook.unbind(0)):
            choice, index = pick(left, codes, q)
            point = chosen_points(codes, choice)
            searched.append(left)
            indices.append(index)
            target = point if target is None else target + point
            left = left - point.detach()
        return Walk(left if target is None else target, indices, searched)


class ResidualDIVEQ(_Residual, SeveralCodes):
    """Residual DiVeQ: z_q = z + |c - z| sg[u], c the sum of one code of each codebook (DiVeQ C.7).

    Args:
        num_embeddings: K of each codebook.
        embedding_dim: D.
        num_codebooks: Q.
        noise_var: standard deviation of the one noise of a row; see `DIVEQ`.
        replacement_iters, discard_threshold, perturb_eps, uniform_init, allow_warning, verbose, codebook_reset: as of
            `DIVEQ`, for each codebook.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.residual_diveq.ResidualDIVEQ", "residual_diveq.ResidualDIVEQ")
    differences = ALWAYS + _replacement.DIFFERENCES


class ResidualSFDIVEQ(_Residual, SeveralCurves):
    """Residual SF-DiVeQ: as `ResidualDIVEQ` in the warm-up, then with dithered points of one curve per codebook.

    Args:
        num_embeddings: K >= 2 of each codebook.
        embedding_dim: D.
        num_codebooks: Q.
        noise_var: standard deviation of the one noise of a row; see `DIVEQ`.
        skip_iters: the training forward from which rows go to the curves; before it they go to codes.
        avg_iters: of the last forwards of the warm-up: codes start anew at block means of what each codebook
            quantized in them; 0 keeps the codes of the warm-up.
        replacement_iters, discard_threshold, perturb_eps, verbose: as of `DIVEQ`, in the warm-up alone.
        uniform_init, allow_warning, latents_on_cpu: as of `SFDIVEQ`.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.residual_sf_diveq.ResidualSFDIVEQ", "residual_sf_diveq.ResidualSFDIVEQ")
    differences = (*ALWAYS, *_replacement.DIFFERENCES, *_space.DIFFERENCES, STARTS)
