"""What `VectorQuantize` is besides its forward: where codes are, how indices decode, who steps what."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqkernels.compat.face import Face
from vqkernels.compat.vector_quantize_pytorch.codebook import Codebook
from vqkernels.compat.vector_quantize_pytorch.layout import Heads, Layout, layout_of, mask_of
from vqkernels.compat.vector_quantize_pytorch.options import options_of
from vqkernels.nn._random import all_sum
from vqkernels.nn.estimators.base import gather


class Holder(Face):
    """A codebook behind projections, heads and a layout, under the peer's names."""

    _codebook: Codebook
    _heads: Heads
    project_in: nn.Module
    project_out: nn.Module
    in_place_codebook_optimizer: torch.optim.Optimizer | None
    heads: int
    separate_codebook_per_head: bool
    channel_last: bool
    accept_image_fmap: bool
    accept_3d_fmap: bool
    has_projections: bool
    return_zeros_for_masked_padding: bool

    @classmethod
    def options_of(cls, peer: nn.Module) -> dict[str, object]:
        """The keywords that would construct `peer` anew, read from the live module."""
        return options_of(peer)

    def carry(self, peer: nn.Module) -> None:
        """Take over the peer's optimizer of the codes."""
        optimizer = peer.in_place_codebook_optimizer
        self.in_place_codebook_optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        self._codebook.ask_whether_started()

    @property
    def ema_update(self) -> bool:
        """Whether codes follow the moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes as they are kept: (K, D), or (H, K, D) of separate heads."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes that indices stand for, before `project_out`; 0 for a negative index.

        Args:
            indices: as `forward` returns them, of any leading shape.

        Returns:
            (..., D'), with the features second where they come first in x; D' of all heads.
        """
        table = self._codebook.codes()
        if self.separate_codebook_per_head and self.heads > 1:
            indices = self._codebook.flat(indices.movedim(-1, 0)).movedim(0, -1)
        codes = gather(table.flatten(0, 1), indices)
        if self.heads > 1:
            codes = codes.flatten(-2)
        if self._channel_first:
            codes = codes.movedim(-1, 1)
        return codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns for such indices in evaluation."""
        codes = self.get_codes_from_indices(indices)
        if self._channel_first:
            return self.project_out(codes.movedim(1, -1)).movedim(-1, 1)
        return self.project_out(codes)

    def update_in_place_optimizer(self) -> None:
        """Step the optimizer of the codes by their gradients, which are means over ranks, and clear those."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.use_ddp:
            for parameter in self._codebook.parameters():
                if parameter.grad is not None:
                    all_sum(parameter.grad).div_(torch.distributed.get_world_size())
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def expire_codes_(self, x: Tensor) -> None:
        """Replace dead codes by rows of x (B, N, D), as they are before they are split among heads."""
        self._codebook.expire_codes_(self._codebook.transform_input(self._heads.split(x)))

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Take the statistics of a batch whose indices are known, and move the codes by them.

        Args:
            x, mask: as of `forward`.
            indices: as `forward` returns them.
        """
        layout = self._layout(x)
        mask = mask_of(mask, None, x, layout, self.accept_image_fmap or self.accept_3d_fmap)
        found = self._heads.split_indices(self._rows_of(indices, layout))
        if mask is not None:
            found = torch.where(self._heads.split_mask(mask), found, -1)
        self._codebook.update_codebook(self._inside(layout.rows(x)), found)

    update_ema_indices = update_indices

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor:
        """Squared distances in float64 from rows as they are searched to the codes that indices name."""
        layout, book = self._layout(x), self._codebook
        with torch.no_grad():
            y = self._inside(layout.rows(x)).double()
            found = book.flat(self._heads.split_indices(self._rows_of(indices, layout)))
            codes = gather(book.searched(book.codes()).flatten(0, 1), found).double()
            return layout.indices(self._heads.merge_indices((y - codes).square().sum(-1)))

    def _layout(self, x: Tensor) -> Layout:
        return layout_of(x, self.channel_last, self.accept_image_fmap, self.accept_3d_fmap)

    @property
    def _channel_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _inside(self, rows: Tensor) -> Tensor:
        return self._codebook.transform_input(self._heads.split(self.project_in(rows)))

    def _outside(self, z: Tensor, rows: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
        quantized = self.project_out(self._heads.merge(z))
        zeros = self.return_zeros_for_masked_padding
        # masked rows are 0 already where nothing is projected
        if mask is not None and not (zeros and not self.has_projections):
            more = [1] * (quantized.dim() - 2)
            filler = rows.new_zeros(()) if zeros else rows.unflatten(-1, (*more[1:], -1))
            quantized = torch.where(mask.view(*mask.shape, *more), quantized, filler)
        return layout.values(quantized)

    def _rows_of(self, indices: Tensor, layout: Layout) -> Tensor:
        heads = (self.heads,) if self.heads > 1 else ()
        return indices.reshape(len(indices), math.prod(layout.spatial), *heads)
