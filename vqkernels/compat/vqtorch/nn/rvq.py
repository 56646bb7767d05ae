"""`ResidualVectorQuant`: what one codebook leaves over goes to the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.compat.vqtorch.nn.gvq import GroupVectorQuant
from vqkernels.compat.vqtorch.nn.upkeep import centroids
from vqkernels.compat.vqtorch.nn.vq import Search
from vqkernels.ops import nearest_code, straight_through


class ResidualVectorQuant(GroupVectorQuant):
    """vqtorch's residual quantizer: G stages, each on what those before leave, by one codebook or by one each.

        z_q = sum_g c_g,   c_g the code nearest to z - sum_{h < g} c_h

    With `share=False` the K codes are split over the stages, K // G for each, and indices count through them all. The
    loss has one value per sample, (B,), of the sum; the dict has "z_res" (..., G + 1, D) too, what each stage searches
    and what is left at last.

    Args:
        feature_size: D.
        num_codes: K.
        groups: G.
        share: whether all stages have the same codebook.
        beta, sync_nu, affine_lr, affine_groups, replace_freq, inplace_optimizer, dim, norm, cb_norm, kmeans_init:
            as of `VectorQuant`; `affine_groups` are blocks of the codebook of one stage.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    peers = ("vqtorch.nn.rvq.ResidualVectorQuant",)
    differences = (
        *GroupVectorQuant.differences,
        "The peer's kmeans_init sees residuals of random codes; ours those of started codes.",
        "The peer asks share=False for groups that divide the features; ours takes any number.",
    )

    def _width(self, feature_size: int, groups: int) -> int:
        return feature_size

    def _search(self, rows: Tensor, codes: Tensor) -> Search:
        rows = rows.detach()[..., 0, :]
        total, searched, indices, sq_dist = torch.zeros_like(rows), [], [], []
        for stage in range(self.groups):
            book = 0 if self.share else stage
            rest = rows - total
            index, square = nearest_code(rest, codes[book])
            total = total + F.embedding(index, codes[book])
            searched.append(rest)
            indices.append(index + book * self.group_size)
            sq_dist.append(square)
        by_stage = torch.stack(indices).view(self.groups, -1)
        left = torch.stack(searched).view(self.groups, -1, rows.shape[-1])
        shape = (1, -1) if self.share else (self.groups, -1)
        return Search(
            torch.stack(indices, -1),
            torch.stack(sq_dist, -1),
            left.reshape(*shape, rows.shape[-1]),
            by_stage.reshape(shape),
        )

    def _cross(self, rows: Tensor, codes: Tensor, found: Search) -> tuple[Tensor, dict[str, Any]]:
        upto = F.embedding(found.indices, codes).cumsum(-2)  # (..., G, D)
        wide, total = self._wide(rows, codes), upto[..., -1:, :]
        number = torch.arange(total[..., 0].numel(), device=rows.device).view(total.shape[:-1])
        targets = total.reshape(-1, total.shape[-1])
        z_q, _ = straight_through(wide, targets, number, commitment=0.0, codebook_weight=0.0, sync=self.nu)
        result = self._result(rows, total, found, self._sample_loss(wide, total), torch.float32)
        return z_q, {**result, "z_res": torch.cat((rows, rows - upto), -2)}

    def _first_codes(self, rows: Tensor) -> Tensor:
        rest = rows.reshape(-1, rows.shape[-1])
        books, searched = [], []
        for _ in range(self.groups):
            books.append(centroids(rest, self.group_size))
            searched.append(rest)
            rest = rest - F.embedding(nearest_code(rest, books[-1]).indices, books[-1])
        # one codebook for all stages serves what any of them searches
        return torch.stack(books) if not self.share else centroids(torch.cat(searched), self.group_size)[None]

    @staticmethod
    def _searched(rows: Tensor, chosen: Tensor) -> Tensor:
        return rows - (chosen.cumsum(-2) - chosen)
