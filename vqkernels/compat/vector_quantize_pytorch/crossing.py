"""How rows choose codes, and how the gradient crosses to them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _autograd
from torch.autograd.graph import saved_tensors_hooks

from vqkernels.checks import refuse
from vqkernels.compat._copies import as_kept, kept
from vqkernels.compat.vector_quantize_pytorch import losses
from vqkernels.compat.vector_quantize_pytorch.holder import Holder
from vqkernels.compat.vector_quantize_pytorch.layout import Layout
from vqkernels.nn.estimators.base import finite_rows, gather, no_loss
from vqkernels.nn.quantizers.base import recomputing
from vqkernels.ops import directional, straight_through


class Chosen(NamedTuple):
    """The codes of each row: `indices` (G, ...) for the user, `at` (G, ...) into `table` (M, D), which nothing moves."""

    indices: Tensor
    table: Tensor
    at: Tensor


class Crossing(Holder):
    """What a forward is made of."""

    codebook_size: int
    learnable_codebook: bool
    use_cosine_sim: bool
    has_commitment_loss: bool
    commitment_use_cross_entropy_loss: bool
    has_codebook_diversity_loss: bool
    has_codebook_orthogonal_loss: bool
    orthogonal_reg_active_codes_only: bool
    orthogonal_reg_max_codes: int | None
    stochastic_sample_codes: bool
    straight_through: bool
    rotation_trick: bool
    directional_reparam: bool
    directional_reparam_variance: float
    sync_update_v: float
    manual_in_place_optimizer_update: bool
    # the choice of the last forward under a checkpoint, whose recomputation must find the codes of that time
    _kept: Chosen | None
    _kept_codes: Tensor | None

    def _few(self, topk: int) -> int:
        scored = self.commitment_use_cross_entropy_loss or self.in_place_codebook_optimizer is not None
        if self.heads > 1 or topk < 1 or (self.training and scored):
            requirement = "be 1 or more, of one head, without cross entropy or in-place optimizer in training"
            refuse(ValueError, "VectorQuantize", "topk", requirement, topk, "Leave it out")
        return min(int(topk), self.codebook_size)

    @property
    def _scores_all(self) -> bool:
        entropy = self.has_commitment_loss and self.commitment_use_cross_entropy_loss
        return entropy or self.has_codebook_diversity_loss or self.straight_through

    def _targets(self, indices: Tensor | None, layout: Layout, chosen: Tensor) -> Tensor | None:
        if indices is not None:
            return self._heads.split_indices(self._rows_of(indices, layout))
        entropy = self.training and self.has_commitment_loss and self.commitment_use_cross_entropy_loss
        return chosen if entropy else None

    def _still(self, codes: Tensor, moving: bool) -> Tensor:
        """All codes (G, K, D) for losses that look at each, as they are before anything moves them."""
        if recomputing():
            return codes if self._kept_codes is None else as_kept(codes, self._kept_codes)
        codes = kept(codes) if moving else codes
        self._kept_codes = codes.detach() if moving and _checkpointed() else None
        return codes

    def _choose(
        self,
        y: Tensor,
        codes: Tensor,
        mask: Tensor | None,
        temperature: float,
        topk: int | None,
        moving: bool,
    ) -> Chosen:
        """The codes of rows y (G, ..., D); where codes are `moving`, with a table of their own."""
        last = self._kept
        places = y.shape[:-1] if topk is None else (*y.shape[:-1], topk)
        if last is not None and recomputing() and last.indices.shape == places:
            live = _apart(codes.flatten(0, 1), self._codebook.flat(last.indices)).table
            return last._replace(table=as_kept(live, last.table))
        if topk is not None:
            indices = losses.nearest_few(y, self._codebook.searched(codes), topk)
            mask = None if mask is None else mask[..., None]
        elif self.training and self.stochastic_sample_codes and temperature > 0:
            indices = losses.sample(y.detach(), codes.detach(), self.use_cosine_sim, temperature)
        else:
            indices = self._codebook.nearest(y, codes)
        if mask is not None:
            indices = torch.where(mask, indices, -1)
        table, at = codes.flatten(0, 1), self._codebook.flat(indices)
        again = moving and _checkpointed()
        if moving and (again or table.requires_grad or y.requires_grad):
            chosen = _apart(table, at)._replace(indices=indices)
        else:
            chosen = Chosen(indices, table, at)
        if not recomputing():
            self._kept = chosen._replace(table=chosen.table.detach()) if again else None
        return chosen

    def _cross(
        self, y: Tensor, chosen: Chosen, routed: bool, learned: bool, few: bool
    ) -> tuple[Tensor, Tensor]:
        """Quantized rows (G, ..., D) and the commitment loss, 0-d, or (G, ..., k) of the k nearest codes."""
        _, table, at = chosen
        weigh = self.training and self.has_commitment_loss and not self.commitment_use_cross_entropy_loss
        commitment = 1.0 if weigh and not few else 0.0
        # the peer's squared error pulls a row and its code alike
        code = commitment if learned else 0.0
        sync = self.sync_update_v if self.training else 0.0
        loss = no_loss(y)
        if routed and self.directional_reparam:
            z = directional(y, table, at, noise_std=self.directional_reparam_variance**0.5)
            if sync > 0:
                rows = gather(table, at)
                z = z + sync * (rows - rows.detach())
        elif routed or not y.requires_grad:
            share = sync if routed else 1 + sync
            z, loss = straight_through(
                y,
                table,
                at,
                rotation=self.rotation_trick,
                commitment=commitment,
                codebook_weight=code,
                sync=share,
            )
        else:
            z, _ = straight_through(y.detach(), table, at, commitment=0.0, codebook_weight=0.0, sync=1 + sync)
            if commitment:
                _, loss = straight_through(y, table, at, commitment=commitment, codebook_weight=code)
        if code:
            loss = loss - loss.detach() / 2
        if few and (weigh or not self.training):
            rows = gather(table.detach() if self.training and not learned else table, at)
            good = finite_rows(y)
            error = (rows - torch.where(good, y, 0)).square().mean(-1)
            loss = torch.where((at >= 0) & good[..., 0], error, 0)
        return z, loss

    def _optimize(self, y: Tensor, mask: Tensor | None, temperature: float, update: partial) -> Tensor:
        """One step of the codes on their own loss, before the rows choose again."""
        y, book = y.detach(), self._codebook
        # a checkpoint around this forward counts what is saved, and the recomputation has no such step
        with torch.enable_grad(), saved_tensors_hooks(_as_is, _as_is):
            chosen = self._choose(y, book.codes(), mask, temperature, None, True)
            _, loss = straight_through(y, chosen.table, chosen.at, commitment=0.0, codebook_weight=1.0)
            grads = torch.autograd.grad(loss, book.embed)
        update(indices=chosen.indices)
        held = book.embed.grad
        if self.manual_in_place_optimizer_update:
            book.embed.grad = grads[0] if held is None else held + grads[0]
        else:
            # the gradient of other losses stays as it was
            book.embed.grad = grads[0]
            self.update_in_place_optimizer()
            book.embed.grad = held
        return loss.detach()

    def _orthogonal(self, indices: Tensor, y: Tensor) -> Tensor:
        if not (self.training and self.has_codebook_orthogonal_loss):
            return no_loss(y)
        codes, most = self._codebook.embed, self.orthogonal_reg_max_codes
        if self.orthogonal_reg_active_codes_only:
            codes = codes[:, indices[indices >= 0].unique()]
        if most is not None and codes.shape[1] > most:
            codes = codes[:, torch.randperm(codes.shape[1], device=codes.device)[:most]]
        # a copy: the next forward may move codes before this one's backward
        return losses.orthogonal(kept(codes))


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _apart(table: Tensor, at: Tensor) -> Chosen:
    """The codes of rows in a table that later writes to the codes do not reach, the smaller one of two."""
    if at.numel() >= len(table) or at.numel() == 0:
        return Chosen(at, kept(table), at)
    own = F.embedding(at.flatten().clamp_min(0), table)
    own = kept(own) if torch.compiler.is_compiling() else own
    place = torch.arange(at.numel(), device=at.device).view(at.shape)
    return Chosen(at, own, torch.where(at < 0, at, place))


def _checkpointed() -> bool:
    """Whether a backward may run this forward again."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or _autograd._top_saved_tensors_default_hooks(False) is not None
