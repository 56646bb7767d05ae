"""The face of `GroupedResidualVQ`: parts of the features, each quantized by a `ResidualVQ` of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.compat.face import Face
from vqkernels.compat.vector_quantize_pytorch.residual import ResidualVQ, draw_host_seed


class GroupedResidualVQ(Face):
    """G residual quantizers side by side (Yang et al. 2023) with the peer's constructor, tuple and state keys.

    Args:
        dim: D, features of x, a multiple of `groups`.
        groups: G.
        accept_image_fmap: x is (B, D, H, W).
        kwargs: of each group, as of `ResidualVQ`.

    Raises:
        UnservedOption: an option is not served.
        ValueError: an option contradicts another one.
    """

    peers: ClassVar[tuple[str, ...]] = ("vector_quantize_pytorch.residual_vq.GroupedResidualVQ",)
    differences: ClassVar[tuple[str, ...]] = (
        *ResidualVQ.differences,
        "The peer's get_output_from_indices of images joins groups along rows; ours along features.",
    )

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__()
        if dim % groups:
            refuse(
                ValueError,
                "GroupedResidualVQ",
                "dim",
                f"be a multiple of {groups}",
                dim,
                "Pass another `groups`",
            )
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs)
            for _ in range(groups)
        )

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        return ResidualVQ.options_of(peer.rvqs[0]) | {"dim": peer.dim, "groups": peer.groups}

    def carry(self, peer: Any) -> None:
        for ours, theirs in zip(self._groups, peer.rvqs, strict=True):
            ours.carry(theirs)

    @property
    def _groups(self) -> list[ResidualVQ]:
        return cast("list[ResidualVQ]", list(self.rvqs))

    @property
    def codebooks(self) -> Tensor:
        """(G, Q, K, D')."""
        return torch.stack([cast("Tensor", rvq.codebooks) for rvq in self._groups])

    @property
    def split_dim(self) -> int:
        """Dimension of x that is split."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Sequence[Tensor] | Tensor) -> Tensor:
        """The code of each group and stage: (G, B, ..., q) -> (G, Q, B, ..., D')."""
        pairs = zip(self._groups, indices, strict=True)
        return torch.stack(tuple(rvq.get_codes_from_indices(part) for rvq, part in pairs))

    def get_output_from_indices(self, indices: Sequence[Tensor] | Tensor) -> Tensor:
        """The output that indices decode to: (G, B, ..., q) -> (B, ..., D), the features last in any case."""
        pairs = zip(self._groups, indices, strict=True)
        return torch.cat(tuple(rvq.get_output_from_indices(part) for rvq, part in pairs), dim=-1)

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple:
        """Quantize.

        Args:
            x: (B, N, D), (B, D), or (B, D, H, W) with accept_image_fmap.
            indices: (G, B, N, Q), or a tensor per group: targets of the cross entropy.
            return_all_codes, sample_codebook_temp, freeze_codebook, mask: as of `ResidualVQ`.

        Returns:
            quantized as x, indices (G, B, ..., Q), losses (G, Q), and a tuple of G codes if asked for; with `indices`,
            quantized and the sum of cross entropies.
        """
        name = "GroupedResidualVQ"
        if x.shape[self.split_dim] != self.dim:
            refuse(
                ValueError,
                name,
                "x",
                f"have {self.dim} features",
                x.shape[self.split_dim],
                "Pass them as `dim`",
            )
        targets = [None] * self.groups if indices is None or len(indices) == 0 else list(indices)
        if len(targets) != self.groups:
            refuse(
                ValueError, name, "indices", f"have {self.groups} groups", len(targets), "Pass all of them"
            )
        # all groups keep as many stages
        dropout = self.training and self._groups[0].quantize_dropout
        seed = draw_host_seed(x.device) if dropout else None
        parts = [
            rvq(
                part,
                indices=target,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                mask=mask,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, part, target in zip(
                self._groups, x.chunk(self.groups, dim=self.split_dim), targets, strict=True
            )
        ]
        quantized, found, *rest = zip(*parts, strict=True)
        quantized = torch.cat(quantized, dim=self.split_dim)
        if targets[0] is not None:
            return quantized, torch.stack(found).sum()
        losses, *codes = rest
        return quantized, torch.stack(found), torch.stack(losses), *codes

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        parts = zip(self._groups, x.chunk(self.groups, dim=self.split_dim), indices, strict=True)
        found = [rvq.sq_dist_of(part, index) for rvq, part, index in parts]
        known = [sq_dist for sq_dist in found if sq_dist is not None]
        return torch.stack(known) if len(known) == self.groups else None
