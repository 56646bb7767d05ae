"""What the residual and the product faces have in common: Q codebooks, and one error vector for the whole (C.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vqkernels.checks import check_count
from vqkernels.compat.diveq._base import no_seed, spread
from vqkernels.compat.diveq._options import check_flags, check_noise_var, warn_unusual
from vqkernels.compat.diveq._replacement import Replacing
from vqkernels.compat.diveq._space import SpaceFilling
from vqkernels.nn._random import split_seed
from vqkernels.nn.estimators.base import Choice
from vqkernels.nn.estimators.diveq import DiVeQ, DiVeQDetach
from vqkernels.nn.quantizers.combined import cross_once
from vqkernels.nn.upkeep.recent import usable
from vqkernels.ops import nearest_code
from vqkernels.ops.diveq import dithered_segment

STARTS = "The peer writes the codes that end a warm-up to a copy, and goes on; ours start from latents."

# from what a codebook quantizes (N, D'), its codes (K, D') and its number: the point chosen, and the index to return
Pick = Callable[[Tensor, Tensor, int], tuple[Choice, Tensor]]


class Walk(NamedTuple):
    """What all codebooks make of z: the point it goes to (N, D), differentiable in the codes; for each codebook the
    index (N,) and what it quantized (N, D')."""

    target: Tensor
    indices: list[Tensor]
    searched: list[Tensor]


class Several(Replacing):
    """Q codebooks (Q, K, D')."""

    num_codebooks: int
    noise_var: float
    # whether what a codebook quantizes does not depend on those before it
    independent: ClassVar[bool]

    def _keep(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int,
        noise_var: float,
        uniform_init: bool,
        allow_warning: bool,
    ) -> None:
        op = type(self).__name__
        check_count(op, "num_codebooks", num_codebooks, minimum=1)
        noise_var = check_noise_var(op, noise_var)
        shape = (num_codebooks, num_embeddings, self._part(embedding_dim, num_codebooks))
        super().__init__(
            num_embeddings, embedding_dim, shape, uniform_init=uniform_init, allow_warning=allow_warning
        )
        self.num_codebooks, self.noise_var = num_codebooks, noise_var

    def _part(self, dim: int, num_codebooks: int) -> int:
        """D' of D."""
        raise NotImplementedError

    def _walk(self, z: Tensor, pick: Pick) -> Walk:
        """Have each codebook pick a point for its part of z."""
        raise NotImplementedError

    def _train_codes(self, z: Tensor) -> tuple[Tensor, Walk, list[Tensor]]:
        """DiVeQ to the nearest codes: z_q, the walk, and the rows of each code."""
        context = self._context(z)
        walk = self._walk(z, nearest_pick)
        z_q = cross_once(DiVeQ(noise_std=self.noise_var), z, walk.target, context)
        return z_q, walk, self._uses(z, walk)

    def _uses(self, z: Tensor, walk: Walk) -> list[Tensor]:
        """Rows of each code, for each codebook."""
        finite = usable(z.detach())
        return [self._counts(index, finite) for index in walk.indices]

    def _evaluated(self, z: Tensor, pick: Pick) -> tuple[Tensor, list[Tensor], list[float | Tensor]]:
        """The target itself, with the gradient of eq. 16."""
        walk = self._walk(z, pick)
        z_q = cross_once(DiVeQDetach(), z, walk.target, no_seed(z))
        return z_q, walk.indices, [spread(counts) for counts in self._uses(z, walk)]

    @staticmethod
    def outcome(result: tuple) -> tuple[Tensor, Tensor]:
        """Output and indices (N, Q) of what `forward` or `inference` (the peer's or the face's) returned."""
        return result[0], torch.stack(list(result[1]), -1)

    def _sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor:
        def pick(part: Tensor, codes: Tensor, q: int) -> tuple[Choice, Tensor]:
            return Choice(indices[:, q]), indices[:, q]

        with torch.no_grad():
            searched = self._walk(x, pick).searched
            codes = self.codebook.detach().double()
            errors = [y.double() - codes[q, indices[:, q]] for q, y in enumerate(searched)]
        return torch.stack([error.square().sum(-1) for error in errors], -1)


def nearest_pick(x: Tensor, codes: Tensor, q: int) -> tuple[Choice, Tensor]:
    """The nearest code."""
    indices = nearest_code(x, codes).indices
    return Choice(indices), indices


class SeveralCodes(Several):
    """DiVeQ with Q codebooks."""

    codebook_reset: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int,
        noise_var: float = 0.001,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        codebook_reset: bool = True,
    ):
        self._keep(num_embeddings, embedding_dim, num_codebooks, noise_var, uniform_init, allow_warning)
        op = type(self).__name__
        check_flags(op, codebook_reset=codebook_reset)
        self.codebook_reset = codebook_reset
        self._keep_replacement(
            replacement_iters, discard_threshold, perturb_eps, verbose=verbose, checked=codebook_reset
        )
        if allow_warning:
            warn_unusual(op, noise_var=noise_var)
        if allow_warning and codebook_reset:
            warn_unusual(
                op,
                replacement_iters=replacement_iters,
                discard_threshold=discard_threshold,
                perturb_eps=perturb_eps,
            )

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor], list[float | Tensor]]:
        """Quantize, differentiably in z and the codes; in eval mode as `inference` does, with the gradient of eq. 16.

        Args:
            z: (N, D) float16, bfloat16, float32 or float64.

        Returns:
            z_q (N, D) in z's dtype; for each codebook indices (N,) int64 and a perplexity, a float,
            on accelerators 0-d float32.

        Raises:
            TypeError, ValueError: z is not floating-point or not (N, D).
        """
        self._check(z)
        if not self.training:
            return self._evaluated(z, nearest_pick)
        z_q, walk, counts = self._train_codes(z)
        if self.codebook_reset:
            self._note(torch.stack(counts), self._advance())
        return z_q, walk.indices, [spread(each) for each in counts]

    @torch.no_grad()
    def inference(self, z: Tensor) -> tuple[Tensor, list[Tensor], list[float | Tensor]]:
        """The nearest codes, without noise, statistics or gradient, in any mode; arguments and returns of `forward`."""
        self._check(z)
        return self._evaluated(z, nearest_pick)

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        return self._sq_dist_of(x, indices)


class SeveralCurves(Several, SpaceFilling):
    """Space-filling DiVeQ with Q codebooks, after a warm-up by DiVeQ."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int,
        noise_var: float = 0.001,
        skip_iters: int = 1000,
        avg_iters: int = 50,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        latents_on_cpu: bool = False,
    ):
        self._keep(num_embeddings, embedding_dim, num_codebooks, noise_var, uniform_init, allow_warning)
        self._keep_replacement(replacement_iters, discard_threshold, perturb_eps, verbose=verbose)
        self._keep_warm_up(
            skip_iters, avg_iters, num_codebooks, on_cpu=latents_on_cpu, replacement_iters=replacement_iters
        )
        if allow_warning:
            warn_unusual(
                type(self).__name__,
                noise_var=noise_var,
                skip_iters=skip_iters,
                avg_iters=avg_iters,
                replacement_iters=replacement_iters,
                most_replacement_iters=100,
                discard_threshold=discard_threshold,
                perturb_eps=perturb_eps,
            )

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor], list[float | Tensor]]:
        """Quantize to dithered points of the curves, in the warm-up to codes, differentiably in z and the codes.

        In eval mode as `inference` does, before the start to the nearest codes, with the gradient of eq. 16.

        Args:
            z: (N, D) float16, bfloat16, float32 or float64.

        Returns:
            z_q (N, D) in z's dtype; for each codebook indices (N,) int64, of segments in training after the warm-up,
            and a perplexity, a float or 0-d float32 on accelerators.

        Raises:
            TypeError, ValueError: z is not floating-point or not (N, D).
        """
        self._check(z)
        if not self.training:
            return self._evaluated(z, nearest_pick if self.warming else self._curve_pick)
        iteration = self._advance()
        if iteration < self.skip_iters:
            z_q, walk, counts = self._train_codes(z)
            self._note(torch.stack(counts), iteration)
            self._collect(walk.searched, iteration)
            return z_q, walk.indices, [spread(each) for each in counts]
        context = self._context(z)
        seeds = split_seed(context.seed, self.num_codebooks)

        def pick(x: Tensor, codes: Tensor, q: int) -> tuple[Choice, Tensor]:
            choice = Choice(*dithered_segment(x, codes, seeds[q], None))
            return choice, choice.indices

        walk = self._walk(z, pick)
        z_q = cross_once(DiVeQ(noise_std=self.noise_var), z, walk.target, context)
        return z_q, walk.indices, [spread(counts) for counts in self._uses(z, walk)]

    @torch.no_grad()
    def inference(self, z: Tensor) -> tuple[Tensor, list[Tensor], list[float | Tensor]]:
        """The nearest points of the curves, or the nearest codes (`evaluation`); no noise, no gradient, in any mode.

        Arguments and returns are those of `forward`; the indices are always those of the nearest codes.
        """
        self._check(z)
        return self._evaluated(z, self._curve_pick)

    def _curve_pick(self, x: Tensor, codes: Tensor, q: int) -> tuple[Choice, Tensor]:
        return self._nearest_point(x, codes)

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        """As of every face, of `inference`; None where indices are segments, NaN where the stages before do not tell."""
        if self.training:
            return self._sq_dist_of(x, indices) if self.warming else None
        found = self._sq_dist_of(x, indices)
        if self.evaluation == "curve" and not self.independent:
            found[:, 1:] = torch.nan
        return found
