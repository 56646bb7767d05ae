"""SFDIVEQ and SFDIVEQDetach: one codebook, each row to the curve through the codes."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.compat.diveq._base import ALWAYS, no_seed, spread
from vqkernels.compat.diveq._options import check_noise_var, warn_unusual
from vqkernels.compat.diveq._space import DIFFERENCES, SpaceFilling
from vqkernels.nn.estimators.base import Choice, Context
from vqkernels.nn.estimators.diveq import move
from vqkernels.nn.upkeep.recent import usable
from vqkernels.ops.diveq import dithered_segment


class _SingleCurve(SpaceFilling):
    """One codebook (K, D)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        skip_iters: int,
        avg_iters: int,
        uniform_init: bool,
        allow_warning: bool,
        latents_on_cpu: bool,
    ):
        shape = (num_embeddings, embedding_dim)
        super().__init__(*shape, shape, uniform_init=uniform_init, allow_warning=allow_warning)
        self._keep_warm_up(skip_iters, avg_iters, 1, on_cpu=latents_on_cpu)
        if allow_warning:
            warn_unusual(type(self).__name__, skip_iters=skip_iters, avg_iters=avg_iters)

    def _cross(self, z: Tensor, choice: Choice, context: Context) -> Tensor:
        """z_q of a training forward."""
        return move(z, self.codebook, choice, context, "detach").z

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Quantize to a dithered point of the curve, differentiably in z and the codes; in the warm-up return z.

        In eval mode as `inference` does, with the gradient of eq. 16; before the codes have started, z.

        Args:
            z: (N, D) float16, bfloat16, float32 or float64.

        Returns:
            z_q (N, D) in z's dtype; indices (N,) int64, segments in training; perplexity a float,
            on accelerators 0-d float32. In the warm-up both are 0.

        Raises:
            TypeError, ValueError: z is not floating-point or not (N, D).
        """
        self._check(z)
        if not self.training:
            return self._passed(z) if self.warming else self._evaluate(z)
        iteration = self._advance()
        if iteration < self.skip_iters:
            passed = self._passed(z)
            self._collect([z], iteration)
            return passed
        context = self._context(z)
        segments, position = dithered_segment(z, self.codebook, context.seed, None)
        z_q = self._cross(z, Choice(segments, position), context)
        return z_q, segments, spread(self._counts(segments, usable(z.detach())))

    @torch.no_grad()
    def inference(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Each row's nearest point of the curve, or its nearest code (`evaluation`); no noise, no gradient.

        Args:
            z: as of `forward`.

        Returns:
            z_q (N, D), indices (N,) int64 of the nearest code, perplexity a float, on accelerators 0-d float32. Only with
            evaluation = "codeword" is z_q = codebook[indices].

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        self._check(z)
        return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        choice, indices = self._nearest_point(z, self.codebook)
        z_q = move(z, self.codebook, choice, no_seed(z), "detach").z
        return z_q, indices, spread(self._counts(indices, usable(z.detach())))

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        """As of every face, of `inference`; None in training, whose indices are segments."""
        if self.training:
            return None
        codes = self.codebook.detach().double()[indices]
        return (x.detach().double() - codes).square().sum(-1)


class SFDIVEQ(_SingleCurve):
    """Space-filling DiVeQ as diveq has it: rows go to dithered points of the curve through the codes (eq. 11, 12).

    Args:
        num_embeddings: K >= 2.
        embedding_dim: D.
        noise_var: standard deviation of the noise in units of z, above 0; see `DIVEQ`.
        skip_iters: the training forward from which rows are quantized; before it z passes through.
        avg_iters: of the last forwards of the warm-up, whose latents the codes start from; 0 leaves the codes alone.
        uniform_init: before the start U(0, 1/K), else N(0, 1/K^2).
        allow_warning: warn of unusual values.
        latents_on_cpu: keep what a warm-up gathers on the CPU.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.sf_diveq.SFDIVEQ", "sf_diveq.SFDIVEQ")
    differences = ALWAYS + DIFFERENCES

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        noise_var: float = 0.001,
        skip_iters: int = 1000,
        avg_iters: int = 50,
        uniform_init: bool = True,
        allow_warning: bool = True,
        latents_on_cpu: bool = False,
    ):
        noise_var = check_noise_var(type(self).__name__, noise_var)
        super().__init__(
            num_embeddings, embedding_dim, skip_iters, avg_iters, uniform_init, allow_warning, latents_on_cpu
        )
        self.noise_var = noise_var
        if allow_warning:
            warn_unusual(type(self).__name__, noise_var=noise_var)

    def _cross(self, z: Tensor, choice: Choice, context: Context) -> Tensor:
        return move(z, self.codebook, choice, context, "noisy", self.noise_var).z


class SFDIVEQDetach(_SingleCurve):
    """Space-filling DiVeQ without noise: z_q = (1 - l_s) c_s + l_s c_{s+1} (DiVeQ eq. 16).

    Args:
        num_embeddings, embedding_dim: K and D.
        skip_iters, avg_iters, uniform_init, allow_warning, latents_on_cpu: as of `SFDIVEQ`.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.sf_diveq_detach.SFDIVEQDetach", "sf_diveq_detach.SFDIVEQDetach")
    differences = (
        *ALWAYS[1:],
        *DIFFERENCES,
        "The peer trains with the first code of a segment twice; ours interpolates between both (eq. 16).",
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        skip_iters: int = 1000,
        avg_iters: int = 50,
        uniform_init: bool = True,
        allow_warning: bool = True,
        latents_on_cpu: bool = False,
    ):
        super().__init__(
            num_embeddings, embedding_dim, skip_iters, avg_iters, uniform_init, allow_warning, latents_on_cpu
        )
