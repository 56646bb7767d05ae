"""`GroupVectorQuant`: parts of the features quantized each by itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_count, check_flag, refuse
from vqkernels.compat.vqtorch.nn.vq import Optimizers, Search, VectorQuant
from vqkernels.ops import straight_through


class GroupVectorQuant(VectorQuant):
    """vqtorch's product quantizer: G parts of D / G features, by one codebook or by one each.

    With `share=False` the K codes are split over the groups, K // G for each, and indices count through them all. The
    loss has one value per sample, (B,).

    Args:
        feature_size: D, a multiple of G.
        num_codes: K.
        groups: G.
        share: whether all groups have the same codebook.
        beta, sync_nu, affine_lr, affine_groups, replace_freq, inplace_optimizer, dim, norm, cb_norm, kmeans_init:
            as of `VectorQuant`; `affine_groups` are blocks of the codebook of one group.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    peers = ("vqtorch.nn.gvq.GroupVectorQuant",)
    differences = (
        *VectorQuant.differences,
        "The peer's `get_codebook` errs with share=False and affine_groups > 1; ours is as forward has it.",
    )

    def __init__(
        self,
        feature_size: int,
        num_codes: int,
        groups: int = 1,
        share: bool = True,
        beta: float = 0.95,
        sync_nu: float = 0.0,
        affine_lr: float = 0.0,
        affine_groups: int = 1,
        replace_freq: int = 0,
        inplace_optimizer: Optimizers | None = None,
        dim: int = 1,
        norm: str | None = "none",
        cb_norm: str | None = "none",
        kmeans_init: bool = False,
    ):
        nn.Module.__init__(self)
        name = type(self).__name__
        self.feature_size = check_count(name, "feature_size", feature_size, minimum=1)
        check_count(name, "groups", groups, minimum=1)
        check_flag(name, "share", share)
        self._build(
            self._width(feature_size, groups),
            num_codes,
            1 if share else groups,
            beta=beta,
            sync_nu=sync_nu,
            affine_lr=affine_lr,
            affine_groups=affine_groups,
            replace_freq=replace_freq,
            inplace_optimizer=inplace_optimizer,
            dim=dim,
            norm=norm,
            cb_norm=cb_norm,
            kmeans_init=kmeans_init,
        )
        self.groups, self.share = groups, share

    def _width(self, feature_size: int, groups: int) -> int:
        """Features of a code."""
        if feature_size % groups:
            requirement = f"divide {feature_size} features"
            refuse(ValueError, type(self).__name__, "groups", requirement, groups, "Pass another groups")
        self.parts = groups
        return feature_size // groups

    def get_codebook_by_group(self, group: int) -> tuple[Tensor, int]:
        """The parameters of one group's codes, and the first of their indices."""
        first = 0 if self.share else group * self.group_size
        return self.codebook.weight[first : first + self.group_size], first

    def _cross(self, rows: Tensor, codes: Tensor, found: Search) -> tuple[Tensor, dict[str, Any]]:
        wide = self._wide(rows, codes)
        z_q, _ = straight_through(
            wide, codes, found.indices, commitment=0.0, codebook_weight=0.0, sync=self.nu
        )
        chosen = F.embedding(found.indices, codes)
        return z_q, self._result(rows, chosen, found, self._sample_loss(wide, chosen), torch.float32)

    @classmethod
    def options_of(cls, peer: nn.Module) -> dict[str, object]:
        """The keywords that would construct `peer` anew."""
        return {**super().options_of(peer), "groups": peer.groups, "share": peer.share}
