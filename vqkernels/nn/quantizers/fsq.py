"""Finite scalar quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.checks import check_count, check_kind, refuse
from vqkernels.nn.methods import Method, register
from vqkernels.nn.quantizers.implicit import ImplicitQuantizer

# levels that a number of codes is factored into when nothing else is asked for
_LARGEST_LEVEL = 8
# levels of one feature, few enough for float32 to tell them apart
_MOST_LEVELS = 1 << 16
# keeps the outermost level within the reach of tanh
_MARGIN = 1e-3


class FSQ(ImplicitQuantizer):
    """Round each of a few bounded features to its levels (Mentzer et al. 2024, section 3.1).

        h_i = (1 + 1e-3) (L_i - 1)/2,   o_i = 1/2 for even L_i, else 0,   s_i = atanh(o_i/h_i)
        b_i = h_i tanh(y_i + s_i) - o_i
        z_i = (b_i + sg[round(b_i) - b_i]) / floor(L_i/2),   round(b_i) kept within the L_i levels

    K = L_1 L_2 ... L_d codes; the number of a code has the first feature as its lowest digit. Nothing is learned but the
    linear layers where D is not d, so no code can die, and there is no loss.

    Args:
        levels: L_i >= 2 of each feature of the grid.
        dim: D, features of x; linear layers lead to the grid and back where it is not `len(levels)`.
        channel_dim: dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        TypeError, ValueError: there is no level, or one is below 2 or above 2^16, or their product above 2^62.
    """

    levels: Tensor
    place: Tensor

    def __init__(self, levels: Sequence[int], *, dim: int | None = None, channel_dim: int = -1):
        fix = "Pass such as (8, 5, 5, 5)"
        check_kind("FSQ", "levels", levels, Sequence, fix)
        if not levels:
            refuse(ValueError, "FSQ", "levels", "have at least one entry", "none", fix)
        for level in levels:
            check_count("FSQ", "levels", level, minimum=2, maximum=_MOST_LEVELS)
        if math.prod(levels) > 1 << 62:
            refuse(
                ValueError, "FSQ", "levels", "have a product of at most 2^62", math.prod(levels), "Pass fewer"
            )
        super().__init__(len(levels) if dim is None else dim, len(levels), channel_dim=channel_dim)
        self._num_codes, self._levels = math.prod(levels), tuple(levels)
        self.keep_constants()

    def constants(self) -> dict[str, Tensor]:
        places = [math.prod(self._levels[:i]) for i in range(len(self._levels))]
        return {
            "levels": torch.tensor(self._levels, device="cpu"),
            "place": torch.tensor(places, device="cpu"),
        }

    @property
    def num_codes(self) -> int:
        """K, the product of the levels."""
        return self._num_codes

    def snap(self, y: Tensor) -> tuple[Tensor, Tensor]:
        half = (self.levels - 1).to(y.dtype) * (1 + _MARGIN) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(y.dtype)
        bounded = torch.tanh(y + torch.atanh(offset / half)) * half - offset
        middle = self.levels // 2
        # the margin of a thousand levels is a level too many
        steps = bounded.detach().round().clamp(-middle, self.levels - 1 - middle)
        indices = ((steps.long() + middle) * self.place).sum(-1)
        return (bounded + (steps - bounded.detach())) / middle, indices

    def points(self, indices: Tensor) -> Tensor:
        middle = self.levels // 2
        digits = indices[..., None] // self.place % self.levels
        return (digits - middle).float() / middle

    def extra_repr(self) -> str:
        return f"levels={self._levels}, dim={self.dim}"


def factor_levels(num_codes: int) -> list[int]:
    """Levels whose product is K, each at most 8 where its prime factors allow it, as even as they come.

    Raises:
        ValueError: K is below 2, or has a prime factor above 2^16.
    """
    check_count("FSQ", "num_codes", num_codes, minimum=2)
    primes, rest, p = [], num_codes, 2
    while rest > 1:
        # what is left without a factor up to its root is prime
        p = rest if p * p > rest else p
        if p > _MOST_LEVELS:
            requirement = f"have no prime factor above {_MOST_LEVELS}"
            refuse(ValueError, "FSQ", "num_codes", requirement, num_codes, "Pass a power of two")
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    primes.sort(reverse=True)
    bins: list[int] = []
    for prime in primes:
        fitting = next((i for i, level in enumerate(bins) if level * prime <= _LARGEST_LEVEL), None)
        if fitting is None:
            bins.append(prime)
        else:
            bins[fitting] *= prime
    even = [1] * len(bins)
    for prime in primes:
        even[even.index(min(even))] *= prime
    return sorted(even, reverse=True)


register(
    "fsq",
    Method(
        "no codebook and no loss, nothing to tune; for large K",
        source="Mentzer et al. 2024",
        make=lambda spec: FSQ(factor_levels(spec.num_codes), dim=spec.dim, channel_dim=spec.channel_dim),
        upkeep=False,
    ),
)
