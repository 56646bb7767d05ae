"""The face of `LFQ`: the sign of each feature is a bit of the code, and an entropy loss spreads the codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.checks import refuse
from vqkernels.compat.face import Face
from vqkernels.compat.vector_quantize_pytorch._entropy import entropies


class Return(NamedTuple):
    """What `LFQ` returns."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The parts of the loss, unweighted."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Cosines of x with the columns of a matrix, times a scale.

    Args:
        dim_in: features of x.
        dim_out: columns.
        scale: of the cosines.
    """

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0) * self.scale


class LFQ(Face):
    """Lookup-free quantization (Yu et al. 2024), or binary spherical one, with the peer's constructor, tuple and numbers.

        z    = codebook_scale sign(y),   sign(0) = -1,   y and z on the sphere where `spherical`
        p_n  = softmax_j(2 inv_temperature y_n . c_j),   H(p) = -sum_j p_j ln max(p_j, 1e-5)
        loss = entropy_loss_weight (E[H(p_n)] - diversity_gamma H(E[p_n])) + commitment_loss_weight E|y - sg[z]|^2

    The probabilities of N rows by K codes are formed some rows at a time, and again for backward, above 2^22 of them.

    Args:
        dim: D, features of x; the bits of all codebooks when omitted.
        codebook_size: K, a power of two; 2^D when omitted.
        entropy_loss_weight: of both entropies.
        commitment_loss_weight: of the squared distance to the code.
        diversity_gamma: of the entropy of the mean beside the mean entropy.
        straight_through_activation: of the latents, in the way of the gradient only.
        num_codebooks: codebooks side by side.
        keep_num_codebooks_dim: whether indices have a last dimension of codebooks; by default where there are several.
        codebook_scale: distance of a code from 0 in each feature.
        frac_per_sample_entropy: share of the rows, drawn at random, that the entropies look at.
        has_projections: whether linear layers lead to the bits and back; by default where their numbers differ.
        projection_has_bias: of the linear layers.
        soft_clamp_input_value: v of v tanh(x/v).
        cosine_sim_project_in: cosines in place of the first linear layer.
        cosine_sim_project_in_scale: of the cosines; codebook_scale when omitted.
        channel_first: whether x is (B, D, ...); by default from four dimensions on.
        experimental_softplus_entropy_loss: softplus of the entropy loss.
        entropy_loss_offset: added before the softplus.
        spherical: latents and codes on the sphere (Zhao et al. 2025).
        force_quantization_f32: False quantizes in the dtype of the latents.
        orthogonal_rotation: rotate the grid by a random rotation, kept in the state.

    Raises:
        ValueError: an option contradicts another one.
    """

    peers: ClassVar[tuple[str, ...]] = ("vector_quantize_pytorch.lookup_free_quantization.LFQ",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer adds rounding errors of its way to a gradient; ours returns the code itself.",
        "The peer's mean over ranks, for its entropy, drops the sum; ours is the mean.",
        "The peer takes each row's diversity with a mask of rows, (B, N); ours that of the mean over rows.",
        "The peer's share of the rows may be none, and its loss then no number; ours is at least one row.",
    )

    mask: Tensor
    zero: Tensor
    codebook: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ):
        super().__init__()
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        _check(dim, codebook_size, num_codebooks, keep, frac_per_sample_entropy)
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            fix = "Pass a larger one"
            requirement = "be at least codebook_scale"
            refuse(ValueError, "LFQ", "soft_clamp_input_value", requirement, soft_clamp_input_value, fix)
        self.codebook_size = 2 ** int(dim or 0) if codebook_size is None else codebook_size
        self.codebook_dim = self.codebook_size.bit_length() - 1
        bits = self.codebook_dim * num_codebooks
        self.dim = bits if dim is None else dim
        self.has_projections = self.dim != bits if has_projections is None else has_projections
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                given = cosine_sim_project_in_scale
                self.project_in = CosineSimLinear(self.dim, bits, codebook_scale if given is None else given)
            else:
                self.project_in = nn.Linear(self.dim, bits, bias=projection_has_bias)
            self.project_out = nn.Linear(bits, self.dim, bias=projection_has_bias)
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = keep
        self.channel_first = channel_first
        self.activation = (
            nn.Identity() if straight_through_activation is None else straight_through_activation
        )
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            rotation = torch.empty(self.codebook_dim, self.codebook_dim)
            # a decomposition has no meta form, and the peer's rotation is taken over then
            self.register_buffer(
                "orthogonal_rot", rotation if rotation.is_meta else nn.init.orthogonal_(rotation)
            )
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.force_quantization_f32 = force_quantization_f32
        codes = self.bits_to_codes(self._bits(torch.arange(self.codebook_size)).float())
        self.register_buffer("codebook", codes, persistent=False)

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        names = (
            "dim codebook_size entropy_loss_weight commitment_loss_weight diversity_gamma num_codebooks "
            "keep_num_codebooks_dim codebook_scale frac_per_sample_entropy has_projections soft_clamp_input_value "
            "channel_first experimental_softplus_entropy_loss entropy_loss_offset spherical force_quantization_f32 "
            "orthogonal_rotation"
        )
        cosine = type(peer.project_in).__name__ == "CosineSimLinear"
        return {name: getattr(peer, name) for name in names.split()} | {
            "straight_through_activation": peer.activation,
            "projection_has_bias": getattr(peer.project_out, "bias", None) is not None
            or not peer.has_projections,
            "cosine_sim_project_in": cosine,
            "cosine_sim_project_in_scale": peer.project_in.scale if cosine else None,
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of the codes."""
        return self.codebook.dtype

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Codes of bits 0 and 1: (..., b) -> (..., b)."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def maybe_l2norm(self, x: Tensor) -> Tensor:
        """Rows on the sphere of radius codebook_scale where `spherical`, else as they are."""
        return F.normalize(x, dim=-1) * self.codebook_scale if self.spherical else x

    def _bits(self, indices: Tensor) -> Tensor:
        return (indices[..., None].int() & self.mask) != 0

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Codes that indices name, in the layout of forward's output.

        Args:
            indices: as `forward` returns them.
            project_out: False gives the bits of all codebooks in place of D features.
        """
        is_image = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        if not self.keep_num_codebooks_dim:
            indices = indices[..., None]
        codes = self.maybe_l2norm(self.bits_to_codes(self._bits(indices).to(self.dtype)))
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.to(codes.dtype).t()
        codes = codes.flatten(-2)
        if project_out:
            codes = self.project_out(codes)
        move = is_image if self.channel_first is None else self.channel_first
        return codes.movedim(-1, 1) if move else codes

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Return | tuple[Return, LossBreakdown]:
        """Quantize.

        Args:
            x: (B, N, D), or (B, D, ...) for images, videos and channels first.
            inv_temperature: of the soft assignment in the entropies.
            return_loss_breakdown: whether the parts of the loss follow.
            mask: bool (B,) or (B, N), the rows that the losses look at.

        Returns:
            quantized as x; indices int64 (B, ...), with a last dimension of codebooks where it is kept; loss, 0-d.
        """
        move = x.dim() >= 4 if self.channel_first is None else self.channel_first
        if move:
            x = x.movedim(1, -1)
            places = x.shape[1:-1]
            x = x.reshape(len(x), -1, x.shape[-1])
        if x.shape[-1] != self.dim:
            refuse(ValueError, "LFQ", "x", f"have {self.dim} features", x.shape[-1], "Pass them as `dim`")
        x = self.project_in(x)
        if self.soft_clamp_input_value is not None:
            x = (x / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        x = x.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            x = x @ self.orthogonal_rot.to(x.dtype)
        x = self.maybe_l2norm(x)
        dtype, force = x.dtype, self.force_quantization_f32
        with torch.autocast(x.device.type, enabled=not force and torch.is_autocast_enabled(x.device.type)):
            y = x.float() if force else x
            positive = y.detach() > 0
            indices = (positive * self.mask).sum(-1)
            quantized = self.maybe_l2norm(self.bits_to_codes(positive.to(y.dtype)))
            out = quantized
            if self.training:
                activated = self.activation(y)
                out = (activated - activated.detach()) + quantized
            parts, entropy_loss = self._losses(y, quantized, inv_temperature, mask)
            out = out.to(dtype)
        if self.orthogonal_rotation:
            out = out @ self.orthogonal_rot.to(out.dtype).t()
        out = self.project_out(out.flatten(-2))
        if move:
            out = out.unflatten(1, places).movedim(-1, 1)
            indices = indices.unflatten(1, places)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        loss = entropy_loss * self.entropy_loss_weight + parts.commitment * self.commitment_loss_weight
        found = Return(out, indices, loss)
        return (found, parts) if return_loss_breakdown else found

    def _losses(
        self, y: Tensor, quantized: Tensor, inv_temperature: float, mask: Tensor | None
    ) -> tuple[LossBreakdown, Tensor]:
        """Parts of the loss of latents (B, N, codebooks, b), and that of the entropies."""
        if not self.training:
            return LossBreakdown(self.zero, self.zero, self.zero), self.zero
        counted = (y if mask is None else y[mask]).reshape(-1, *y.shape[-2:])
        if self.frac_per_sample_entropy < 1:
            rows = max(1, int(len(counted) * self.frac_per_sample_entropy))
            # places of the least ranks: as many rows as asked for without a wait for the host
            order = torch.randn(len(counted), device=y.device).argsort()
            seen = counted[order.argsort()[:rows]]
        else:
            seen = counted
        codes = self.maybe_l2norm(self.codebook.to(y.dtype))
        per_sample, batch = entropies(seen, codes, inv_temperature)
        loss = per_sample - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            loss = F.softplus(loss + self.entropy_loss_offset)
        commitment = self.zero
        if self.commitment_loss_weight > 0:
            target = quantized.detach()
            target = target if mask is None else target[mask]
            commitment = F.mse_loss(counted, target.reshape(counted.shape))
        return LossBreakdown(per_sample, batch, commitment), loss

    @staticmethod
    def outcome(result: tuple) -> tuple[Tensor, Tensor]:
        found = result if isinstance(result[0], Tensor) else result[0]
        return found[0], found[1]


def _check(dim: int | None, codebook_size: int | None, num_codebooks: int, keep: bool, share: float) -> None:
    name = "LFQ"
    if dim is None and codebook_size is None:
        refuse(ValueError, name, "dim", "be given where codebook_size is not", None, "Pass codebook_size")
    if codebook_size is not None and (codebook_size < 1 or codebook_size & (codebook_size - 1)):
        fix = f"Pass {1 << max(0, codebook_size).bit_length()}"
        refuse(ValueError, name, "codebook_size", "be a power of two", codebook_size, fix)
    if num_codebooks > 1 and not keep:
        fix = "Leave it out"
        refuse(ValueError, name, "keep_num_codebooks_dim", "be true for several codebooks", keep, fix)
    if not 0 < share <= 1:
        refuse(ValueError, name, "frac_per_sample_entropy", "be in (0, 1]", share, "Pass 1 for all rows")
