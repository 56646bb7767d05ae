"""DIVEQ and DIVEQDetach: one codebook, each row to its nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.compat._copies import kept
from vqkernels.compat.diveq._base import ALWAYS, no_seed, spread
from vqkernels.compat.diveq._options import check_flags, check_noise_var, warn_unusual
from vqkernels.compat.diveq._replacement import DIFFERENCES, Replacing
from vqkernels.nn.estimators.base import Choice
from vqkernels.nn.estimators.diveq import move
from vqkernels.ops import nearest_code


class _Single(Replacing):
    """One codebook (K, D)."""

    codebook_reset: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        replacement_iters: int,
        discard_threshold: float,
        perturb_eps: float,
        uniform_init: bool,
        allow_warning: bool,
        verbose: bool,
        codebook_reset: bool,
    ):
        shape = (num_embeddings, embedding_dim)
        super().__init__(*shape, shape, uniform_init=uniform_init, allow_warning=allow_warning)
        check_flags(type(self).__name__, codebook_reset=codebook_reset)
        self.codebook_reset = codebook_reset
        self._keep_replacement(
            replacement_iters, discard_threshold, perturb_eps, verbose=verbose, checked=codebook_reset
        )
        if allow_warning and codebook_reset:
            warn_unusual(
                type(self).__name__,
                replacement_iters=replacement_iters,
                discard_threshold=discard_threshold,
                perturb_eps=perturb_eps,
            )

    def _cross(self, z: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        """z_q of a training forward."""
        return move(z, codes, Choice(indices), no_seed(z), "detach").z

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Quantize, differentiably in z and the codes; in eval mode as `inference` does, with the gradient of eq. 16.

        Args:
            z: (N, D) float16, bfloat16, float32 or float64.

        Returns:
            z_q (N, D) in z's dtype, indices (N,) int64, perplexity a float, on accelerators 0-d float32.

        Raises:
            TypeError, ValueError: z is not floating-point or not (N, D).
        """
        self._check(z)
        if not self.training:
            return self._evaluate(z)
        # a replacement must not reach what a pending backward reads
        codes = kept(self.codebook) if self.codebook_reset else self.codebook
        indices, sq_dist = nearest_code(z, codes)
        z_q = self._cross(z, codes, indices)
        counts = self._counts(indices, ~sq_dist.isnan())
        if self.codebook_reset:
            self._note(counts, self._advance())
        return z_q, indices, spread(counts)

    @torch.no_grad()
    def inference(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Each row's nearest code, without noise, statistics or gradient, in any mode.

        Args:
            z: as of `forward`.

        Returns:
            z_q = codebook[indices] (N, D), indices (N,) int64, perplexity a float, on accelerators 0-d float32.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        self._check(z)
        return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        indices, sq_dist = nearest_code(z, self.codebook)
        z_q = move(z, self.codebook, Choice(indices), no_seed(z), "detach").z
        return z_q, indices, spread(self._counts(indices, ~sq_dist.isnan()))

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        codes = self.codebook.detach().double()[indices]
        return (x.detach().double() - codes).square().sum(-1)


class DIVEQ(_Single):
    """DiVeQ as diveq has it: z_q = z + |c_i - z| sg[(v + e)/|v + e|], e = c_i - z (DiVeQ eq. 8).

    Args:
        num_embeddings: K.
        embedding_dim: D.
        noise_var: standard deviation of v in units of z, above 0; the released package calls it a variance and uses it
            as this, and so does this class: a model trains the same.
        replacement_iters: training forwards between two replacements of unused codes.
        discard_threshold: share of the mean use below which a code is replaced, in [0, 1].
        perturb_eps: least standard deviation of a replaced code around the copied one.
        uniform_init: start at U(0, 1/K), else at N(0, 1/K^2).
        allow_warning: warn of unusual values.
        verbose: report replacements to the logger.
        codebook_reset: replace codes at all.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.diveq.DIVEQ", "diveq.DIVEQ")
    differences = ALWAYS + DIFFERENCES

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        noise_var: float = 0.001,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        codebook_reset: bool = True,
    ):
        noise_var = check_noise_var(type(self).__name__, noise_var)
        super().__init__(
            num_embeddings,
            embedding_dim,
            replacement_iters,
            discard_threshold,
            perturb_eps,
            uniform_init,
            allow_warning,
            verbose,
            codebook_reset,
        )
        self.noise_var = noise_var
        if allow_warning:
            warn_unusual(type(self).__name__, noise_var=noise_var)

    def _cross(self, z: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        return move(z, codes, Choice(indices), self._context(z), "noisy", self.noise_var).z


class DIVEQDetach(_Single):
    """DiVeQ without noise: z_q = c_i, with the gradient of z + |c_i - z| sg[e/|e|] (DiVeQ eq. 16).

    Args:
        num_embeddings, embedding_dim: K and D.
        replacement_iters, discard_threshold, perturb_eps, uniform_init, allow_warning, verbose, codebook_reset: as of
            `DIVEQ`.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    peers = ("diveq.diveq_detach.DIVEQDetach", "diveq_detach.DIVEQDetach")
    differences = ALWAYS[1:] + DIFFERENCES

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        codebook_reset: bool = True,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            replacement_iters,
            discard_threshold,
            perturb_eps,
            uniform_init,
            allow_warning,
            verbose,
            codebook_reset,
        )
