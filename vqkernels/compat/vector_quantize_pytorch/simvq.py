"""The face of `SimVQ`: a frozen basis that one learned transform moves as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqkernels.compat.face import Face
from vqkernels.ops import nearest_code, straight_through


def _as_it_is(codebook: Tensor) -> Tensor:
    return codebook


class SimVQ(Face):
    """SimVQ (Zhu et al. 2024b) with the peer's constructor, tuple and state keys; no N x K matrix.

        codes = transform(frozen basis),   i = argmin_j |x - codes_j|^2
        loss  = commitment_weight (|sg[x] - c_i|^2 + input_to_quantize_commit_loss_weight |x - sg[c_i]|^2), means

    Args:
        dim: D, features of x.
        codebook_size: K.
        codebook_transform: (K, frozen_codebook_dim) -> (K, D); a linear layer without a bias when omitted.
        init_fn: what to make of the Gaussian basis at construction.
        channel_first: whether x is (B, D, ...) and not (B, ..., D).
        rotation_trick: whether gradients cross by the rotation trick and not by the identity.
        input_to_quantize_commit_loss_weight: of the part of the loss that moves x.
        commitment_weight: of the whole loss.
        frozen_codebook_dim: features of the basis; D when omitted.
    """

    peers: ClassVar[tuple[str, ...]] = ("vector_quantize_pytorch.sim_vq.SimVQ",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer adds rounding errors of its way to a gradient; ours returns the code itself.",
        "The peer's indices_to_codes transforms chosen rows alone; ours the whole basis, as forward does.",
        "The peer rounds distances; ours finds the nearest code exactly, whatever the dtype.",
    )

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _as_it_is,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        # drawn in the peer's order: one seed makes the same quantizer of both
        basis = init_fn(torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", basis)
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        frozen_dim = peer.frozen_codebook.shape[1]
        widths = [
            layer.out_features for layer in peer.code_transform.modules() if isinstance(layer, nn.Linear)
        ]
        return {
            "dim": widths[-1] if widths else frozen_dim,
            "codebook_size": peer.codebook_size,
            "codebook_transform": peer.code_transform,
            "channel_first": peer.channel_first,
            "rotation_trick": peer.rotation_trick,
            "input_to_quantize_commit_loss_weight": peer.input_to_quantize_commit_loss_weight,
            "commitment_weight": peer.commitment_weight,
            "frozen_codebook_dim": frozen_dim,
        }

    @property
    def codebook(self) -> Tensor:
        """(K, D), the transformed basis, differentiable."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes that indices name, in the layout of forward's output.

        Args:
            indices: (B, ...) int64.

        Returns:
            (B, ..., D), or (B, D, ...) where channels come first.
        """
        codes = self.codebook[indices]
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize.

        Args:
            x: (B, ..., D), or (B, D, ...) where channels come first; floating-point.

        Returns:
            quantized as x, indices (B, ...) int64, loss 0-d.
        """
        if self.channel_first:
            x = x.movedim(1, -1)
        codes = self.codebook  # (K, D)
        indices = nearest_code(x, codes).indices
        quantized, loss = straight_through(
            x,
            codes,
            indices,
            rotation=self.rotation_trick,
            commitment=self.input_to_quantize_commit_loss_weight,
            codebook_weight=1.0,
        )
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        return quantized, indices, loss * self.commitment_weight

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor:
        rows = x.movedim(1, -1) if self.channel_first else x
        with torch.no_grad():
            return (rows.double() - self.codebook.double()[indices]).square().sum(-1)
