"""Quantizers by their short names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from vqkernels.checks import check_choice, check_count, check_noise_std, refuse
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.methods import METHODS, Spec
from vqkernels.nn.quantizers.base import Quantizer
from vqkernels.nn.quantizers.vector import VectorQuantizer
from vqkernels.nn.upkeep.base import Upkeep, check_upkeep
from vqkernels.ops.directional import NOISE_STD


def build(
    name: str,
    *,
    dim: int,
    num_codes: int,
    channel_dim: int = -1,
    noise_std: float | None = None,
    upkeep: Sequence[Upkeep] = (),
    basis: Tensor | None = None,
    steps: int | None = None,
) -> Quantizer:
    """Make one of the usual quantizers by its short name.

    Args:
        name: a key of `METHODS`.
        dim: D, features of a latent.
        num_codes: K, of each stage or group where there are several.
        channel_dim: dimension of x that holds the features: -1 for (..., D), 1 for NCHW.
        noise_std: standard deviation of the noise in units of x; None for the paper's sqrt(1e-3).
        upkeep: such as `[ImportanceReplacement(TwoPhase(steps))]`; none by default, also no warm-up. Where there are
            several stages or groups, each has a copy of its own.
        basis: (K, d') features that the codes of "vqgan_lc" are projected from.
        steps: optimizer steps of the training, over which the temperatures of "gumbel" and "stochastic" fall; 10,000
            when left out.

    Raises:
        TypeError, ValueError: the name is unknown, a size does not fit, or the method has no use for a `noise_std`, an
            upkeep or a `basis` that was given.
    """
    method = METHODS[check_choice("build", "name", name, tuple(METHODS))]
    check_count("build", "dim", dim, minimum=1)
    check_count("build", "num_codes", num_codes, minimum=1)
    upkeep = check_upkeep("build", upkeep)
    if noise_std is not None and not method.noisy:
        requirement = f"be None for {name!r}, which has none"
        refuse(ValueError, "build", "noise_std", requirement, noise_std, "Leave it out")
    check_upkeep("build", upkeep)
    if upkeep and not method.upkeep:
        got = ", ".join(type(part).__name__ for part in upkeep)
        requirement = f"be empty for {name!r}, which has no codes that can be overwritten"
        refuse(ValueError, "build", "upkeep", requirement, got, "Leave it out")
    if basis is not None and not method.basis:
        requirement = f"be None for {name!r}, which has none"
        refuse(ValueError, "build", "basis", requirement, "a basis", "Leave it out")
    noise = NOISE_STD if noise_std is None else check_noise_std("build", noise_std)
    if steps is not None:
        check_count("build", "steps", steps, minimum=1)
    spec = Spec(dim, num_codes, channel_dim, noise, upkeep, basis, steps)
    if method.make is not None:
        return method.make(spec)
    codebook = Codebook(num_codes, dim) if method.codebook is None else method.codebook(spec)
    options = {} if method.options is None else method.options(spec)
    return VectorQuantizer(
        codebook, cast("Callable", method.estimator)(spec), upkeep, channel_dim=channel_dim, **options
    )
