"""Codebooks seen through an affine map that all codes share, so that codes which nobody chose move too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqkernels.checks import check_count, check_number, refuse
from vqkernels.nn._random import all_sum
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import finite_rows
from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.methods import Method, register

# elements at a time, which stay in the cache from their difference to their sums
_CHUNK = 1 << 17


class _Affine(Codebook):
    """What both have in common: codes = scale * weight + bias, with one (D,) pair for each group of codes.

    `assign` writes weight = (codes - bias) / scale, so that `codes` shows what was assigned up to the rounding of
    the map and of its inverse, 2 eps (|codes| + |bias|). A feature whose scale is 0 has no inverse: all codes of the
    group are its bias there, and its weight is left alone.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        groups: int,
        fewest: int,
        init: str,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ):
        super().__init__(num_codes, dim, init=init, dtype=dtype, device=device)
        name = type(self).__name__
        self.groups = check_count(name, "groups", groups, minimum=1)
        if num_codes % groups or num_codes // groups < fewest:
            share = f"equal parts of {num_codes} codes" + (
                f", {fewest} or more in each" if fewest > 1 else ""
            )
            refuse(ValueError, name, "groups", f"be {share}", groups, "Pass groups=1, or another num_codes")

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Two tensors (G, D), in float32 or wider."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        scale, bias = (each[:, None] for each in self.scale_and_bias())
        codes = scale * self.weight.to(scale.dtype).unflatten(0, (self.groups, -1)) + bias
        # computed wide, rounded once
        return codes.flatten(0, 1).to(self.weight.dtype)

    @torch.no_grad()
    def assign(self, codes: Tensor, where: Tensor | None = None) -> None:
        scale, bias = (each[:, None].double() for each in self.scale_and_bias())
        weight = (codes.double().unflatten(0, (self.groups, -1)) - bias) / scale
        weight = torch.where(scale == 0, self.weight.double().unflatten(0, (self.groups, -1)), weight)
        super().assign(weight.flatten(0, 1), where)


class AffineCodebook(_Affine):
    """A learned codebook behind a learned affine map (Huh et al. 2023, eq. 15 and A.1).

        scale = 1 + lr_scale s,   bias = lr_scale b,   codes = scale * weight + bias

    s and b start at 0 and have a gradient from every row, so that all codes follow the latents together.

    Args:
        num_codes, dim, init, dtype, device: as of `Codebook`.
        groups: G; each of G blocks of K / G consecutive codes has an s and a b of its own.
        lr_scale: how much faster s and b learn; the paper uses 1 to 10.

    Raises:
        TypeError, ValueError: as of `Codebook`, or `groups` does not divide K, or `lr_scale` is negative.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        groups: int = 1,
        lr_scale: float = 10.0,
        init: str = "uniform",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_codes, dim, groups=groups, fewest=1, init=init, dtype=dtype, device=device)
        self.lr_scale = check_number(type(self).__name__, "lr_scale", lr_scale)
        self.scale = nn.Parameter(torch.zeros_like(self.weight[:groups]))
        self.bias = nn.Parameter(torch.zeros_like(self.weight[:groups]))

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return 1 + self.lr_scale * self.scale.to(wide), self.lr_scale * self.bias.to(wide)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, lr_scale={self.lr_scale}"


class AffineEMACodebook(_Affine):
    """A learned codebook moved to the mean and variance of the latents (Huh et al. 2023, eq. 15 and A.12).

        mean, var <- momentum * those of now + (1 - momentum) * mean, var      of the latents x and of the weights c
        scale = sqrt(var_x / (var_c + 1e-8)),   bias = mean_x - scale mean_c,   codes = scale * weight + bias

    A.12 as printed adds the latents' deviation where their mean is meant, and swaps the names of scale and bias. The
    first commit takes the moments as they are; before it the map is the identity. Moments are of the training rows
    of all ranks that are finite and not masked, over all features of a row, without Bessel's correction.

    Args:
        num_codes, dim, init, dtype, device: as of `Codebook`.
        groups: G; each of G blocks of K / G consecutive codes has moments of its own, and is matched to all latents.
        momentum: share of the newest moments, in [0, 1]; the paper suggests 0.01 to 0.1.

    Raises:
        TypeError, ValueError: as of `Codebook`, or `groups` does not divide K into parts of two codes or more, or
            `momentum` is outside [0, 1].
    """

    _STATISTICS = ("mean_x", "var_x", "mean_c", "var_c", "sums")
    mean_x: Tensor
    var_x: Tensor
    mean_c: Tensor
    var_c: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        groups: int = 1,
        momentum: float = 0.1,
        init: str = "uniform",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_codes, dim, groups=groups, fewest=2, init=init, dtype=dtype, device=device)
        self.momentum = check_number(type(self).__name__, "momentum", momentum, up_to=1)
        wide = self.weight.detach().double()
        self.register_buffer("mean_x", torch.zeros_like(wide[0]))
        self.register_buffer("var_x", torch.ones_like(wide[0]))
        self.register_buffer("mean_c", torch.zeros_like(wide[:groups]))
        self.register_buffer("var_c", torch.ones_like(wide[:groups]))
        # rows, then sums and squares of x - mean_x: in one tensor, to be summed over ranks in one call
        self.register_buffer("sums", wide.new_zeros(1 + 2 * dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=wide.device))

    def _apply(self, fn: Callable, recurse: bool = True) -> AffineEMACodebook:
        kept = {name: getattr(self, name) for name in self._STATISTICS}
        super()._apply(fn, recurse)
        # statistics move with the codes but are never narrowed
        if not (self.weight.is_meta or any(value.is_meta for value in kept.values())):
            for name, value in kept.items():
                setattr(self, name, value.to(self.weight.device))
        return self

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        scale = (self.var_x / (self.var_c + 1e-8)).sqrt()
        # 1 + 1e-8 is not 1 in float64
        scale = torch.where(self.updates > 0, scale, 1)
        return scale.to(wide), (self.mean_x - scale * self.mean_c).to(wide)

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor) -> None:
        counted = finite_rows(x) & (indices >= 0)[..., None]
        total = torch.zeros_like(self.sums)
        total[0] = counted.sum()
        shift = self._shift()
        most = max(1, _CHUNK // x.shape[-1]) if x.device.type == "cpu" else max(1, counted.numel())
        parts = zip(x.reshape(-1, x.shape[-1]).split(most), counted.reshape(-1, 1).split(most), strict=True)
        for rows, count in parts:
            # about the running mean, which is near theirs: squares lose nothing by it
            part = torch.where(count, rows.double() - shift, 0)
            total[1:] += torch.cat((part.sum(0), part.square().sum(0)))
        # summed over ranks at once: whatever copies a rank's buffers then copies the truth
        self.sums += all_sum(total)

    def _shift(self) -> Tensor:
        return self.mean_x

    @torch.no_grad()
    def commit(self) -> None:
        rows, (sums, squares) = self.sums[0], self.sums[1:].view(2, -1)
        mean = sums / rows
        moments = [self._shift() + mean, (squares / rows - mean.square()).clamp_min(0)]
        var, mean = torch.var_mean(self.weight.double().unflatten(0, (self.groups, -1)), 1, correction=0)
        # in float64 as the statistics are
        momentum = torch.where(self.updates > 0, self.momentum, torch.ones_like(self.sums[0]))
        for old, new in zip((self.mean_x, self.var_x, self.mean_c, self.var_c), (*moments, mean, var)):
            # without a row there is nothing new
            old.copy_(torch.where(rows > 0, momentum * new + (1 - momentum) * old, old))
        self.updates += rows > 0
        self.sums.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, momentum={self.momentum}"


register(
    "affine",
    Method(
        "codes that nobody chose follow the rest; start by k-means and tune its lr_scale",
        source="Huh et al. 2023, eq. 15 and A.1",
        codebook=lambda spec: AffineCodebook(spec.num_codes, spec.dim),
        estimator=lambda spec: STE(),
    ),
)
register(
    "affine_ema",
    Method(
        "codes keep the mean and variance of drifting latents, nothing to tune",
        source="Huh et al. 2023, eq. 15 and A.12",
        codebook=lambda spec: AffineEMACodebook(spec.num_codes, spec.dim),
        estimator=lambda spec: STE(),
    ),
)
