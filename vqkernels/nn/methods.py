"""The table of short names. Each name is registered in the file of the class it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vqkernels.checks import refuse

if TYPE_CHECKING:
    from vqkernels.nn.codebooks.learned import Codebook
    from vqkernels.nn.estimators.base import Estimator
    from vqkernels.nn.quantizers.base import Quantizer
    from vqkernels.nn.upkeep.base import Upkeep


@dataclass(frozen=True)
class Spec:
    """What `build` was asked for.

    Attributes:
        dim: D, features of a latent.
        num_codes: K, of each stage or group.
        channel_dim: dimension of x that holds the features.
        noise_std: standard deviation of the noise in units of x, for methods that have one.
        upkeep: how codes start and stay alive.
        basis: (K, d') features that codes are made of, for methods that take some.
        steps: optimizer steps of the training, for methods with a schedule; None where it is not known.
    """

    dim: int
    num_codes: int
    channel_dim: int
    noise_std: float
    upkeep: Sequence[Upkeep]
    basis: Tensor | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        summary: when to use it.
        source: the equation or paper it implements.
        estimator: how gradients cross; None for a method that brings a `make` of its own.
        codebook: where codes come from; a learned one by default.
        options: further arguments of `VectorQuantizer`.
        make: makes the whole quantizer, for what is not a `VectorQuantizer`.
        noisy: whether a noise_std can be chosen.
        warm_up: whether a warm-up without quantization is advised.
        replace: whether replacement of unused codes is advised.
        segments: whether training indices are segments between codes, which replacement cannot count.
        upkeep: whether it takes upkeep at all.
        basis: whether it takes a basis.
    """

    summary: str
    source: str
    estimator: Callable[[Spec], Estimator] | None = None
    codebook: Callable[[Spec], Codebook] | None = None
    options: Callable[[Spec], dict[str, Any]] | None = None
    make: Callable[[Spec], Quantizer] | None = None
    noisy: bool = False
    warm_up: bool = False
    replace: bool = False
    segments: bool = False
    upkeep: bool = True
    basis: bool = False


METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Add a line to the table.

    Raises:
        ValueError: the name is taken, or the method has neither or both of `make` and `estimator`.
    """
    if name in METHODS:
        refuse(ValueError, "register", "name", "be new", repr(name), "Choose another name")
    if (method.make is None) == (method.estimator is None):
        got = "neither" if method.make is None else "both"
        refuse(ValueError, "register", "method", "have either make or estimator", got, "Pass one of them")
    METHODS[name] = method
