"""The face of `FSQ`: each of a few bounded features is rounded to its levels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.compat.face import Face

# codes are counted in int32, as the peer does
_MOST_CODES = 1 << 31


class FSQ(Face):
    """Finite scalar quantization (Mentzer et al. 2024) with the peer's constructor, tuple and numbers.

        h_i = (1 + 1e-3) (L_i - 1)/2,   o_i = 1/2 for even L_i, else 0,   s_i = atanh(o_i/h_i)
        z_i = round_ste(h_i tanh(y_i + s_i) - o_i) / floor(L_i/2)
        z_i = 2/(L_i - 1) floor_ste((L_i - 1)(tanh(y_i) + 1)/2 + 1/2) - 1      with preserve_symmetry

    Args:
        levels: L_i of each feature of the grid.
        dim: D, features of x; linear layers lead to the grid and back where it is not `len(levels) num_codebooks`.
        num_codebooks: grids side by side.
        keep_num_codebooks_dim: whether indices have a last dimension of grids; by default where there are several.
        scale: kept as an attribute, of no effect, as in the peer.
        allowed_dtypes: that the rounding is done in; others are cast to float32 and back.
        channel_first: whether x is (B, D, N); four dimensions and more always are (B, D, ...).
        projection_has_bias: of the linear layers.
        return_indices: False gives None in place of indices.
        force_quantization_f32: False rounds in the dtype of the latents.
        preserve_symmetry: levels evenly spaced over [-1, 1] (section 3.2 of Parker et al. 2024).
        noise_dropout: share of values that get uniform noise of a width of 1 in training, with preserve_symmetry.
        bound_hard_clamp: clamp to [-1, 1] in place of tanh.
        orthogonal_rotation: rotate the grid by a random rotation, kept in the state.

    Raises:
        ValueError: an option contradicts another one.
    """

    peers: ClassVar[tuple[str, ...]] = ("vector_quantize_pytorch.finite_scalar_quantization.FSQ",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer adds rounding errors of its way to a gradient; ours returns the grid point itself.",
        "The peer's codes_to_indices leaves codes of a rotated grid turned; ours turns them back.",
        "The peer counts indices in float32, which ends at 2^24, and levels overflow; ours in integers.",
    )

    _levels: Tensor
    _basis: Tensor
    implicit_codebook: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: list[int] | tuple[int, ...],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ):
        super().__init__()
        levels = list(levels)
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        _check(levels, num_codebooks, keep, preserve_symmetry, noise_dropout)
        places = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(places, dtype=torch.int32), persistent=False)
        self.scale = scale
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.codebook_dim = len(levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = len(levels) * num_codebooks
        self.keep_num_codebooks_dim = keep
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            bias = projection_has_bias
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=bias)
        self.return_indices = return_indices
        self.allowed_dtypes = allowed_dtypes
        self.force_quantization_f32 = force_quantization_f32
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        if return_indices:
            self.codebook_size = math.prod(levels)
            points = self._points(torch.arange(self.codebook_size))
            self.register_buffer("implicit_codebook", points, persistent=False)
        if orthogonal_rotation:
            if len(set(levels)) > 1:
                words = "FSQ: levels differ, and orthogonal_rotation mixes features of unlike spacing."
                warnings.warn(words, stacklevel=2)
            rotation = torch.empty(len(levels), len(levels))
            # a decomposition has no meta form, and the peer's rotation is taken over then
            self.register_buffer(
                "orthogonal_rot", rotation if rotation.is_meta else nn.init.orthogonal_(rotation)
            )

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        names = (
            "dim num_codebooks keep_num_codebooks_dim scale allowed_dtypes channel_first return_indices "
            "force_quantization_f32 preserve_symmetry noise_dropout bound_hard_clamp orthogonal_rotation"
        )
        options = {name: getattr(peer, name) for name in names.split()}
        bias = getattr(peer.project_in, "bias", None)
        return options | {
            "levels": peer._levels.tolist(),
            "projection_has_bias": bias is not None or not peer.has_projections,
        }

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """The nearest points of the grid, with the gradient of the bounded features.

        Args:
            z: (..., d).
            eps: margin that keeps the outermost level within reach.
            hard_clamp: clamp in place of tanh.
        """
        squash, unsquash = _squash(hard_clamp), (_same if hard_clamp else torch.atanh)
        half = (self._levels - 1) * (1 + eps) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        bounded = squash(z + unsquash(offset / half)) * half - offset
        middle = self._levels // 2
        # the margin of a thousand levels is a level too many
        steps = bounded.detach().round().clamp(-middle, self._levels - 1 - middle)
        return (steps + (bounded - bounded.detach())) / middle

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """The nearest points of a grid over [-1, 1] that is symmetric around 0: (..., d) -> (..., d)."""
        last = self._levels - 1
        bounded = last * (_squash(hard_clamp)(z) + 1) / 2 + 0.5
        steps = bounded.detach().floor()
        return 2.0 / last * (steps + (bounded - bounded.detach())) - 1

    def quantize(self, z: Tensor) -> Tensor:
        """Points of the grid for latents on it: (..., d) -> (..., d)."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """Uniform noise on a share `noise_dropout` of the values in training, kept within [-1, 1]."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        # one seed draws the peer's noise, in the order of rows
        bounded_z = bounded_z.contiguous()
        noisy = torch.full_like(bounded_z, self.noise_dropout).bernoulli_().bool()
        offset = torch.rand_like(bounded_z) - 0.5
        return torch.where(noisy, bounded_z + offset, bounded_z).clamp(-1.0, 1.0)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each feature: (...) -> (..., d)."""
        return (indices[..., None] // self._basis) % self._levels

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Inverse of `indices_to_codes` for one grid without linear layers.

        Args:
            zhat: (..., d) codes.

        Returns:
            (...) int32.
        """
        if zhat.shape[-1] != self.codebook_dim:
            fix = "Pass codes of one grid, before project_out"
            refuse(ValueError, "FSQ", "zhat", f"have {self.codebook_dim} features", zhat.shape[-1], fix)
        return self._number(zhat @ self.orthogonal_rot.to(zhat.dtype) if self.orthogonal_rotation else zhat)

    def _number(self, points: Tensor) -> Tensor:
        middle = self._levels // 2
        if self.preserve_symmetry:
            digits = (points + 1) / (2.0 / (self._levels - 1))
        else:
            digits = points * middle + middle
        return (digits.detach().round().to(torch.int32) * self._basis).sum(-1, dtype=torch.int32)

    def _points(self, indices: Tensor) -> Tensor:
        levels = self.indices_to_level_indices(indices)
        if self.preserve_symmetry:
            return levels * (2.0 / (self._levels - 1)) - 1
        middle = self._levels // 2
        return (levels - middle) / middle

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes that indices name, in the layout of forward's output.

        Args:
            indices: as `forward` returns them.

        Returns:
            (B, N, D), or (B, D, ...) for images, videos and channels first.
        """
        is_image = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        codes = self._points(indices)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.to(codes.dtype).t()
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        codes = self.project_out(codes)
        return codes.movedim(-1, 1) if is_image or self.channel_first else codes

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize.

        Args:
            z: (B, N, D), or (B, D, ...) for images, videos and channels first.

        Returns:
            quantized as z; indices int32 (B, ...), with a last dimension of grids where it is kept, or None.
        """
        move = z.dim() >= 4 or self.channel_first
        if move:
            z = z.movedim(1, -1)
            places = z.shape[1:-1]
            z = z.reshape(len(z), -1, z.shape[-1])
        if z.shape[-1] != self.dim:
            refuse(ValueError, "FSQ", "z", f"have {self.dim} features", z.shape[-1], "Pass them as `dim`")
        z = self.project_in(z).unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            z = z @ self.orthogonal_rot.to(z.dtype)
        dtype = z.dtype
        force = self.force_quantization_f32
        with torch.autocast(z.device.type, enabled=not force and torch.is_autocast_enabled(z.device.type)):
            if force and dtype not in self.allowed_dtypes:
                z = z.float()
            codes = self.quantize(z)
            indices = self._number(codes) if self.return_indices else None
            codes = self.maybe_apply_noise(codes)
            if self.orthogonal_rotation:
                codes = codes @ self.orthogonal_rot.to(codes.dtype).t()
            codes = codes.flatten(-2).to(dtype)
        out = self.project_out(codes)
        if move:
            out = out.unflatten(1, places).movedim(-1, 1)
            indices = indices if indices is None else indices.unflatten(1, places)
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        return out, indices


def _same(x: Tensor) -> Tensor:
    return x


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-1.0, 1.0)


def _squash(hard: bool) -> Callable[[Tensor], Tensor]:
    return _clamped if hard else torch.tanh


def _check(levels: list[int], num_codebooks: int, keep: bool, symmetric: bool, noise: float) -> None:
    name = "FSQ"
    if 2 in levels and not symmetric:
        fix = "Pass preserve_symmetry=True, or more levels"
        refuse(ValueError, name, "levels", "be above 2 without preserve_symmetry", levels, fix)
    if math.prod(levels) >= _MOST_CODES:
        refuse(ValueError, name, "levels", "have a product below 2^31", math.prod(levels), "Pass fewer")
    if noise > 0 and not symmetric:
        fix = "Pass preserve_symmetry=True"
        refuse(ValueError, name, "noise_dropout", "be 0 without preserve_symmetry", noise, fix)
    if num_codebooks > 1 and not keep:
        fix = "Leave it out"
        refuse(ValueError, name, "keep_num_codebooks_dim", "be true for several codebooks", keep, fix)
