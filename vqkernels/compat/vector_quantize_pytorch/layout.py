"""How inputs of any of the peer's layouts become rows (B, N, D), and results go back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.checks import refuse

_NAME = "VectorQuantize"


class Layout(NamedTuple):
    """Where features and positions of one input are.

    Attributes:
        spatial: sizes of the dimensions that hold positions.
        channel_first: whether features come before them.
        single: whether the input is (B, D), one position per item.
    """

    spatial: tuple[int, ...]
    channel_first: bool
    single: bool

    def rows(self, x: Tensor) -> Tensor:
        """The input as (B, N, D), a view where its strides allow."""
        if self.single:
            return x[:, None]
        if self.channel_first:
            return x.flatten(2).transpose(1, 2)
        return x if x.dim() == 3 else x.flatten(1, -2)

    def values(self, z: Tensor) -> Tensor:
        """(B, N, D), or (B, N, k, D) of the k nearest codes, in the layout of the input."""
        if self.single:
            return z[:, 0]
        if self.channel_first:
            # b n k d -> b d n k
            return z.movedim(-1, 1).unflatten(2, self.spatial)
        return z if len(self.spatial) == 1 else z.unflatten(1, self.spatial)

    def indices(self, indices: Tensor) -> Tensor:
        """(B, N, ...) with the positions of the input."""
        if self.single:
            return indices[:, 0]
        return indices if len(self.spatial) == 1 else indices.unflatten(1, self.spatial)


def layout_of(x: Tensor, channel_last: bool, image: bool, volume: bool) -> Layout:
    """The layout of an input.

    Raises:
        ValueError: it has not the dimensions that the options ask for.
    """
    dims = 4 if image else 5 if volume else 3
    channel_first = not channel_last or image or volume
    if x.dim() == 2 and not (image or volume):
        return Layout((1,), False, True)
    if x.dim() < 3 or (channel_first and x.dim() != dims):
        wanted = {3: "(b, d, n)", 4: "(b, c, h, w)", 5: "(b, c, d, h, w)"}[dims]
        wanted = wanted if channel_first else "(b, n, d)"
        refuse(ValueError, _NAME, "x", f"be {wanted}", tuple(x.shape), "Move its dimensions")
    return Layout(tuple(x.shape[2:] if channel_first else x.shape[1:-1]), channel_first, False)


class Heads(NamedTuple):
    """How the features of a row are split among heads.

    Attributes:
        count: heads.
        separate: whether each has a codebook of its own.
    """

    count: int
    separate: bool

    def split(self, rows: Tensor) -> Tensor:
        """(B, N, H * D) -> (H, B, N, D) with codebooks of their own, else (1, B, H, N, D); (1, B, N, D) of one head."""
        if self.count == 1:
            return rows[None]
        parts = rows.unflatten(-1, (self.count, -1))
        return parts.movedim(2, 0) if self.separate else parts.transpose(1, 2)[None]

    def merge(self, z: Tensor) -> Tensor:
        """What `split` made, or (..., k, D) of one head, as rows again."""
        if self.count == 1:
            return z[0]
        parts = z.movedim(0, 2) if self.separate else z[0].transpose(1, 2)
        return parts.flatten(-2)

    def merge_indices(self, indices: Tensor) -> Tensor:
        """(H, B, N) or (1, B, H, N) -> (B, N, H); (1, B, N, ...) of one head -> (B, N, ...)."""
        if self.count == 1:
            return indices[0]
        return indices.movedim(0, -1) if self.separate else indices[0].transpose(1, 2)

    def split_indices(self, indices: Tensor) -> Tensor:
        """Back from `merge_indices`."""
        if self.count == 1:
            return indices[None]
        return indices.movedim(-1, 0) if self.separate else indices.transpose(1, 2)[None]

    def split_mask(self, mask: Tensor) -> Tensor:
        """(B, N) as wide as the indices of all heads."""
        if self.count == 1:
            return mask[None]
        if self.separate:
            return mask[None].expand(self.count, -1, -1)
        return mask[None, :, None].expand(-1, -1, self.count, -1)


def mask_of(mask: Tensor | None, lens: Tensor | None, x: Tensor, layout: Layout, maps: bool) -> Tensor | None:
    """The (B, N) mask that `mask` or `lens` stands for.

    Raises:
        ValueError: both are given, or the input has no sequence to mask, or the shape does not fit.
    """
    if mask is None and lens is None:
        return None
    name = "mask" if lens is None else "lens"
    if mask is not None and lens is not None:
        refuse(ValueError, _NAME, "mask", "be absent where lens is given", "both", "Pass one of them")
    if layout.single or maps:
        refuse(ValueError, _NAME, name, "come with sequences", f"x {tuple(x.shape)}", "Leave it out")
    batch, length = x.shape[0], layout.spatial[0]
    if lens is not None:
        return torch.arange(length, device=lens.device).expand(batch, -1) < lens[:, None]
    if mask is None:
        return None
    if mask.shape != (batch, length) or mask.dtype != torch.bool:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        refuse(ValueError, _NAME, name, f"stand for bools {(batch, length)}", got, "Pass one per position")
    return mask
