"""Short names for the usual quantizers: one table for the command line, the tests and the docs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vqkernels.checks import check_choice, refuse
from vqkernels.nn.codebooks import Codebook, EMACodebook
from vqkernels.nn.estimators import NSVQ, STE, DiVeQ, DiVeQDetach, Estimator, SFDiVeQ, SFDiVeQDetach
from vqkernels.nn.quantizer import VectorQuantizer
from vqkernels.nn.upkeep import Upkeep
from vqkernels.ops.directional import NOISE_STD


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        summary: when to use it.
        codebook: makes the codebook from (num_codes, dim).
        estimator: makes the estimator; from (noise_std) if `noisy`, else from nothing.
        noisy: whether a noise_std can be chosen.
        warm_up: whether a warm-up without quantization is advised.
    """

    summary: str
    codebook: Callable[[int, int], Codebook]
    estimator: Callable[..., Estimator]
    noisy: bool = False
    warm_up: bool = False


METHODS = {
    "ste": Method("the classical baseline; add replacement, or its codebook collapses", Codebook, STE),
    "ema": Method(
        "STE with codes that are moving averages; no codebook loss",
        EMACodebook,
        lambda: STE(codebook_weight=0),
    ),
    "diveq": Method(
        "no auxiliary loss; precise codewords; add replacement",
        Codebook,
        lambda s: DiVeQ(noise_std=s),
        noisy=True,
    ),
    "diveq_detach": Method("DiVeQ without noise, nothing to tune", Codebook, DiVeQDetach),
    "nsvq": Method("noise of random direction; for comparison", Codebook, NSVQ),
    "sf_diveq": Method(
        "full codebook use without replacement; warm up first",
        Codebook,
        lambda s: SFDiVeQ(noise_std=s),
        True,
        True,
    ),
    "sf_diveq_detach": Method(
        "SF-DiVeQ without noise, nothing to tune", Codebook, SFDiVeQDetach, warm_up=True
    ),
}


def build(
    name: str,
    *,
    dim: int,
    num_codes: int,
    channel_dim: int = -1,
    noise_std: float | None = None,
    upkeep: Sequence[Upkeep] = (),
) -> VectorQuantizer:
    """Make one of the usual quantizers by its short name.

    Args:
        name: a key of `METHODS`.
        dim: D, features of a latent.
        num_codes: K.
        channel_dim: dimension of x that holds the features: -1 for (..., D), 1 for NCHW.
        noise_std: standard deviation of the noise in units of x; None for the paper's sqrt(1e-3).
        upkeep: such as `[ImportanceReplacement(TwoPhase(steps))]`; none by default, also no warm-up.

    Raises:
        ValueError: the name is unknown, a size does not fit, or a noise_std is given to a method without noise.
    """
    method = METHODS[check_choice("build", "name", name, tuple(METHODS))]
    if noise_std is not None and not method.noisy:
        refuse(
            ValueError,
            "build",
            "noise_std",
            f"be None for {name!r}, which has none",
            noise_std,
            "Leave it out",
        )
    noise = (NOISE_STD if noise_std is None else noise_std,) if method.noisy else ()
    return VectorQuantizer(
        method.codebook(num_codes, dim), method.estimator(*noise), upkeep, channel_dim=channel_dim
    )
