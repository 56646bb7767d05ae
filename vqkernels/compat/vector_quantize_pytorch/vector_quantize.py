"""`VectorQuantize` of vector-quantize-pytorch on our search and our gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.compat.face import unserved
from vqkernels.compat.vector_quantize_pytorch import losses
from vqkernels.compat.vector_quantize_pytorch.affine import Affine
from vqkernels.compat.vector_quantize_pytorch.codebook import Codebook, Weight
from vqkernels.compat.vector_quantize_pytorch.crossing import Crossing
from vqkernels.compat.vector_quantize_pytorch.layout import Heads, mask_of
from vqkernels.compat.vector_quantize_pytorch.options import check_options
from vqkernels.nn.estimators.base import no_loss
from vqkernels.nn.quantizers.base import recomputing

_NAME = "VectorQuantize"


class LossBreakdown(NamedTuple):
    """The parts of the loss, unweighted, each 0-d or, of the k nearest codes, (B, N, k)."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(Crossing):
    """`VectorQuantize` of vector-quantize-pytorch 1.32.0: same keywords, results and state keys, no N x K matrix.

        z    = x + sg[c_i - x], or sg[rho R] x (Fifty et al. 2025), or DiVeQ's direction;   i = argmin_j |x - c_j|
        loss = commitment_weight |x - sg[c_i]|^2 (mean) + the other losses that are asked for

    Options that mean a look at all codes (`stochastic_sample_codes`, `topk`, cross entropies, the diversity loss) do so
    for some rows at a time, in forward and again in backward. How it differs from the peer stands in `differences`.

    Args:
        dim, codebook_size and all others: of the peer, in its order and with its defaults.

    Raises:
        UnservedOption: `vq_bridge` is given.
        ValueError: options contradict each other.
    """

    peers: ClassVar[tuple[str, ...]] = ("vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer rounds distances; ours finds the nearest code in float64, the lowest index on ties.",
        "The peer scores cosine codes by their length too; ours by direction, those of length 0 never.",
        "The peer refuses straight_through=True unless rotation_trick=False; ours takes it alone.",
        "The peer refuses directional_reparam without replacement of dead codes; ours takes it.",
        "The peer's sync_update_v gives codes no gradient; ours, their share of the task's (Huh, eq. 21).",
        "The peer's affine moments move in evaluation and while frozen; ours stand still.",
        "The peer's affine moments do not load, and decoding lacks them; ours load, and reach it.",
        "The peer decides sync_codebook at construction; ours in each forward.",
        "The peer lets gradients reach codes that are frozen in a training forward; ours does not.",
        "The peer's loss of masked batches sees x before projection and heads; ours what is quantized.",
        "The peer leaves quantize beside a cross entropy in its inner layout; ours has that of x.",
        "The peer's in_place_codebook_optimizer sees foreign gradients and fires hooks; ours does neither.",
        "The peer takes cross entropies and diversity at updated codes; ours at those before the update.",
        "The peer's orthogonal loss rewards codes of 0; ours does not.",
        "The peer decodes shared heads otherwise than it quantizes; ours merges and projects them alike.",
        "The peer starts k-means at random rows; ours by k-means++, and draws by its own generator.",
        "The peer lets rows with a NaN or Inf into losses and codes; ours leaves them out, and masked ones.",
    )

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ):
        super().__init__()
        if vq_bridge is not None:
            unserved(_NAME, "vq_bridge", type(vq_bridge).__name__, "Leave it out")
        ema_update = not directional_reparam if ema_update is None else ema_update
        learnable_codebook = directional_reparam if learnable_codebook is None else learnable_codebook
        if rotation_trick is None:
            rotation_trick = not (directional_reparam or straight_through) and dim > 1
        self.dim, self.codebook_size = dim, codebook_size
        self.heads, self.separate_codebook_per_head = heads, separate_codebook_per_head
        self.eps = eps
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through, self.rotation_trick = straight_through, rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.route_gradients_to_input = route_gradients_to_input
        self.sync_update_v = sync_update_v
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.channel_last = channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.freeze_codebook = freeze_codebook
        check_options(self, ema_update, affine_param)

        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in, self.project_out = nn.Linear(dim, inner), nn.Linear(inner, dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self._heads = Heads(heads, separate_codebook_per_head)
        affine = Affine(sync_affine_param, affine_param_batch_decay, affine_param_codebook_decay)
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync=sync_codebook,
            learnable=learnable_codebook or self.has_codebook_orthogonal_loss,
            use_cosine_sim=use_cosine_sim,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            affine=affine if affine_param else None,
        )
        make = in_place_codebook_optimizer
        self.in_place_codebook_optimizer = None if make is None else make(self._codebook.parameters())
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self._kept = self._kept_codes = None

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize.

        Args:
            x: (B, N, dim); (B, dim, N), (B, dim, H, W) or (B, dim, D, H, W) by option; or (B, dim).
            indices: targets of a cross entropy, as returned, -1 for none.
            mask: (B, N) bool, True where a position counts.
            lens: (B,) positions that count, in place of a mask.
            topk: so many nearest codes of each position in place of one.
            sample_codebook_temp: in place of the option.
            freeze_codebook: in place of the option.
            return_loss_breakdown: whether the parts of the loss are returned.
            codebook_transform_fn: not served.
            ema_update_weight: (K,) or (H, K) weights of this batch in the averages, or a function of its
                (sums, counts).
            accum_ema_update: whether the statistics of this batch wait for the next one's.
            ema_update: in place of the option.

        Returns:
            (quantized, indices, loss), and a `LossBreakdown` where asked for; (quantized, cross entropy) with targets.
            Of the k nearest codes, k comes before the features and after the positions, and the loss is one per code.

        Raises:
            UnservedOption: `codebook_transform_fn` is given.
            ValueError: shapes or options do not fit.
        """
        if codebook_transform_fn is not None:
            unserved(_NAME, "codebook_transform_fn", codebook_transform_fn, "Leave it out")
        layout, book = self._layout(x), self._codebook
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        mask = mask_of(mask, lens, x, layout, self.accept_image_fmap or self.accept_3d_fmap)
        rows = layout.rows(x)
        y = self._inside(rows)
        y = y.to(torch.promote_types(y.dtype, x.dtype))
        counted = None if mask is None else self._heads.split_mask(mask)
        topk = None if topk is None else self._few(topk)
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        changes = self.training and not frozen and not recomputing()

        book.start(y, counted)
        if changes:
            book.learn_moments(y, counted)
        update = partial(
            book.update_codebook,
            y.detach(),
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
        in_place = no_loss(y)
        optimized = changes and self.in_place_codebook_optimizer is not None and book.embed.requires_grad
        if optimized:
            in_place = self._optimize(y, counted, temperature, update)
        codes = book.codes()
        codes = codes.detach() if self.training and frozen else codes
        # what follows the k nearest codes is an `update_indices`, which moves codes as well
        written = changes and (optimized or book.moves(ema_update))
        moving = written and topk is None
        if indices is not None or self._scores_all:
            codes = self._still(codes, written)
        chosen = self._choose(y, codes, counted, temperature, topk, written)
        every = y if topk is None else y.unsqueeze(-2).expand(*y.shape[:-1], topk, -1)
        routed = self.training and x.requires_grad and self.route_gradients_to_input
        learned = self.learnable_codebook and not frozen
        z, commitment = self._cross(every, chosen, routed, learned, topk is not None)
        if self.straight_through and self.training and not routed and topk is None and temperature > 0:
            soft = losses.soft_codes(y, codes, self.use_cosine_sim, temperature)
            z = z + (soft - soft.detach())
        entropy = diversity = no_loss(y)
        wanted = self._targets(indices, layout, chosen.indices)
        if wanted is not None:
            entropy = losses.cross_entropy(y, codes, wanted, self.use_cosine_sim)
        if self.training and self.has_codebook_diversity_loss:
            factor = self.codebook_diversity_temperature
            diversity = losses.diversity(y, codes, counted, self.use_cosine_sim, factor)
        if moving and not optimized:
            update(indices=chosen.indices)
        quantized = self._outside(z.to(x.dtype), rows, mask, layout)
        if indices is not None:
            return quantized, entropy
        found = layout.indices(self._heads.merge_indices(chosen.indices))
        orthogonal = self._orthogonal(chosen.indices, y)
        if self.training and self.has_commitment_loss and self.commitment_use_cross_entropy_loss:
            commitment = entropy
        each = commitment
        if commitment.dim() > 0:
            # the breakdown has positions in one dimension, as the peer's
            commitment = commitment[0]
            each = layout.indices(commitment)
        weight = self.commitment_weight if self.has_commitment_loss else 1.0
        loss = (
            each * weight
            + diversity * self.codebook_diversity_loss_weight
            + orthogonal * self.orthogonal_reg_weight
        )
        waits = self.training and torch.is_grad_enabled() and not loss.requires_grad
        # a compiled graph cannot return such a leaf
        if waits and not torch.compiler.is_compiling():
            loss = loss.detach().requires_grad_()
        if not return_loss_breakdown:
            return quantized, found, loss
        return quantized, found, loss, LossBreakdown(commitment, diversity, orthogonal, in_place)
