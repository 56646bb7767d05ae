"""The face of `ResidualVQ`: each stage quantizes what the stages before it left over."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.compat.face import Face
from vqkernels.compat.vector_quantize_pytorch._beam import beam_search
from vqkernels.compat.vector_quantize_pytorch._residual_options import (
    check_residual,
    codebook_sizes,
    no_neural_codebook,
)
from vqkernels.compat.vector_quantize_pytorch._stages import Found, Stages
from vqkernels.compat.vector_quantize_pytorch.vector_quantize import VectorQuantize
from vqkernels.nn._random import all_sum, distributed
from vqkernels.nn.quantizers.base import recomputing
from vqkernels.ops import directional

# of the noise with diveq=True, which the peer leaves no choice of
_VARIANCE = 5e-3
_SEEDS = 10_000
# options of a layer that ResidualVQ sets itself
_OWN = (
    "dim",
    "codebook_size",
    "codebook_dim",
    "heads",
    "accept_image_fmap",
    "return_zeros_for_masked_padding",
)


class ResidualVQ(Face):
    """Residual quantization (Zeghidour et al. 2021, Algorithm 1) with the peer's constructor, tuple and state keys.

        r_1 = project_in(x),   r_{q+1} = r_q - sg[c_q],   c_q = nearest code to r_q,   z = project_out(sum_q c_q)

    Args:
        dim: D, features of x.
        num_quantizers: Q, stages; `len(codebook_size)` when omitted.
        codebook_size: K, or one per stage.
        codebook_dim: features of a code; D when omitted.
        shared_codebook: one codebook for all stages, updated once per step.
        diveq: codes learned by the directional reparameterization of the sum (Vali et al. 2025).
        heads: 1.
        quantize_dropout: train with a random number of first stages; the others return the index -1.
        quantize_dropout_cutoff_index: of the last stage that is always kept.
        quantize_dropout_multiple_of: kept stages are a multiple of it.
        accept_image_fmap: x is (B, D, H, W).
        implicit_neural_codebook: refused.
        mlp_kwargs: of implicit neural codebooks.
        beam_size: paths that training keeps; evaluation too where eval_beam_size is omitted.
        eval_beam_size: paths that evaluation keeps.
        beam_score_quantizer_weights: of each stage's squared error in the score of a path; ones when omitted.
        quant_grad_frac: share of the gradient that passes from a residual to the stage before.
        return_zeros_for_masked_padding: zeros, and not x, where the mask is false.
        vq_kwargs: of each stage, as of `VectorQuantize`.

    Raises:
        UnservedOption: an option is not served.
        ValueError: an option contradicts another one.
    """

    peers: ClassVar[tuple[str, ...]] = ("vector_quantize_pytorch.residual_vq.ResidualVQ",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer's diveq=True is noisy in eval mode; ours returns what the indices decode to.",
        "The peer's accept_image_fmap needs D = H = W; ours takes images of any size.",
        "The peer raises at indices=; ours gives the cross entropy of each stage on its own residual.",
        "The peer forgets freeze_codebook=True of construction; ours holds it, after a beam search too.",
        "The peer teaches stages residuals of every beam; ours those of the path taken.",
        "The peer replaces dead codes of a shared codebook by masked rows at times; ours never does.",
        "The peer's get_codes_from_indices leaves the affine map out; ours gives what forward looked up.",
        "The peer's layers of a ResidualVQ for images take images; ours take rows, (B, N, D).",
    )

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs,
    ):
        super().__init__()
        check_residual(
            heads,
            implicit_neural_codebook,
            beam_size,
            eval_beam_size,
            quantize_dropout_cutoff_index,
            vq_kwargs,
        )
        sizes = codebook_sizes(num_quantizers, codebook_size)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, self.codebook_dim)
            self.project_out = nn.Linear(self.codebook_dim, dim)
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook = implicit_neural_codebook
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        self.diveq = diveq
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True, "commitment_weight": 0.0}
            vq_kwargs |= {"route_gradients_to_input": False}
        self.num_quantizers = len(sizes)
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        width = self.codebook_dim
        zeros = {"return_zeros_for_masked_padding": return_zeros_for_masked_padding}
        self.layers = nn.ModuleList(
            VectorQuantize(dim=width, codebook_size=size, codebook_dim=width, **zeros, **vq_kwargs)
            for size in sizes
        )
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.vq_is_ema_updating = self._stages[0].ema_update
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        weights = [1.0] * len(sizes) if beam_score_quantizer_weights is None else beam_score_quantizer_weights
        if len(weights) != len(sizes):
            fix = "Pass one per stage"
            refuse(
                ValueError,
                "ResidualVQ",
                "beam_score_quantizer_weights",
                f"have {len(sizes)}",
                len(weights),
                fix,
            )
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.shared_codebook = shared_codebook
        if shared_codebook:
            if not self.uniform_codebook_size:
                refuse(
                    ValueError, "ResidualVQ", "codebook_size", "be one where it is shared", sizes, "Pass one"
                )
            first, *others = self._stages
            for layer in others:
                layer._codebook = first._codebook

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        if peer.implicit_neural_codebook:
            no_neural_codebook()
        layer = VectorQuantize.options_of(peer.layers[0])
        names = (
            "num_quantizers codebook_dim shared_codebook diveq quantize_dropout quantize_dropout_cutoff_index "
            "quantize_dropout_multiple_of accept_image_fmap beam_size eval_beam_size quant_grad_frac "
            "return_zeros_for_masked_padding"
        )
        return (
            {name: value for name, value in layer.items() if name not in _OWN}
            | {name: getattr(peer, name) for name in names.split()}
            | {
                "dim": peer.project_in.in_features if peer.has_projections else peer.codebook_dim,
                "codebook_size": tuple(peer.codebook_sizes),
                "beam_score_quantizer_weights": peer.beam_score_weights.tolist(),
            }
        )

    def carry(self, peer: Any) -> None:
        for ours, theirs in zip(self._stages, peer.layers, strict=True):
            ours.carry(theirs)

    @property
    def _stages(self) -> list[VectorQuantize]:
        return cast("list[VectorQuantize]", list(self.layers))

    @property
    def codebook_size(self) -> int:
        """K of the first stage."""
        return self._stages[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """(Q, K, D'), or a codebook per stage where their sizes differ."""
        codebooks = tuple(layer._codebook.embed[0] for layer in self._stages)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of each stage.

        Args:
            indices: (B, ..., q), -1 for a stage that was dropped; with quantize_dropout q may be below Q.

        Returns:
            (Q, B, ..., D'); zeros where a stage was dropped.
        """
        missing = self.num_quantizers - indices.shape[-1]
        if missing and not self.quantize_dropout:
            fix = "Pass indices of all stages, or construct it with quantize_dropout=True"
            refuse(
                ValueError,
                "ResidualVQ",
                "indices",
                f"have {self.num_quantizers} stages",
                indices.shape[-1],
                fix,
            )
        places = indices.shape[:-1]
        flat = nn.functional.pad(indices, (0, missing), value=-1).reshape(
            len(indices), -1, self.num_quantizers
        )
        codes = [
            layer.get_codes_from_indices(index.clamp_min(0)).masked_fill((index < 0)[..., None], 0)
            for layer, index in zip(self._stages, flat.unbind(-1), strict=True)
        ]
        return (
            torch.stack(codes).unflatten(2, places[1:]) if len(places) > 1 else torch.stack(codes).squeeze(2)
        )

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output that indices decode to: (B, ..., q) -> (B, ..., D), the features last in any case."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize.

        Args:
            x: (B, N, D), (B, D), or (B, D, H, W) with accept_image_fmap.
            mask: bool (B, N), the rows that count.
            indices: (B, N, Q) int64, targets of the cross entropy of each stage.
            return_all_codes: whether the codes of all stages follow.
            sample_codebook_temp: of stochastic sampling.
            freeze_codebook: whether codes stay as they are.
            beam_size: paths kept; that of construction when omitted.
            rand_quantize_dropout_fixed_seed: of the number of stages kept.

        Returns:
            quantized as x, indices (B, ..., Q), losses (Q,), and codes (Q, B, ..., D') if asked for; with `indices`,
            quantized and the sum of cross entropies.
        """
        shape = x.shape
        rows = x.flatten(2).mT if self.accept_image_fmap else x if x.dim() > 2 else x[:, None]
        if mask is not None:
            mask = mask.reshape(rows.shape[:2])
        last = self._last_stage(indices, rand_quantize_dropout_fixed_seed, x.device)
        freeze = True if freeze_codebook else None
        stages = Stages(self._stages, last, mask, sample_codebook_temp, freeze, self.quant_grad_frac)
        y = self.project_in(rows)
        if beam_size is None:
            beam_size = self.beam_size if self.training else self.eval_beam_size
        if indices is not None:
            indices = torch.stack(indices) if isinstance(indices, list) else indices
            found = stages.cross_entropy(y, indices.reshape(*rows.shape[:2], indices.shape[-1]))
        elif beam_size is not None and beam_size > 1:
            found = beam_search(stages, y, beam_size, self.beam_score_weights)
        else:
            found = stages.greedy(y, keep=self.training and self.shared_codebook)
        frozen = freeze_codebook or self._stages[0].freeze_codebook
        if self.training and not frozen and not recomputing():
            self._update(found, mask)
        z = found.z
        if self.diveq and self.training:
            z = _moved(y, z)
        z = self.project_out(z)
        if mask is not None:
            z = torch.where(
                mask[..., None], z, torch.zeros_like(z) if self.return_zeros_for_masked_padding else rows
            )
        z = z.mT.unflatten(2, shape[2:]) if self.accept_image_fmap else z.reshape(shape)
        if indices is not None:
            return z, found.losses
        places = (shape[0], *shape[2:]) if self.accept_image_fmap else shape[:-1]
        picked = found.indices.reshape(*places, self.num_quantizers)
        if not return_all_codes:
            return z, picked, found.losses
        return z, picked, found.losses, self.get_codes_from_indices(picked)

    def _last_stage(self, indices: object, seed: int | None, device: torch.device) -> int:
        """Number of the last stage that this forward uses."""
        if not self.training or not self.quantize_dropout or indices is not None:
            return self.num_quantizers - 1
        seed = draw_host_seed(device) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(ceil((last + 1) / multiple) * multiple, self.num_quantizers) - 1

    @torch.no_grad()
    def _update(self, found: Found, mask: Tensor | None) -> None:
        """What stages leave to the end: statistics of the path that a beam search took, and those of a shared codebook."""
        if found.searched:
            for layer, rows, index in zip(
                self._stages, found.residuals, found.indices.unbind(-1), strict=False
            ):
                layer.update_indices(rows, index, mask=mask)
        if self.shared_codebook:
            first = self._stages[0]
            if self.vq_is_ema_updating:
                first._codebook.update_ema()
            first.update_in_place_optimizer()
            rows = torch.stack(found.residuals, dim=2)  # (B, N, Q, D')
            # rows with a nan are never taken, and no one has to wait for the number of others
            rows = rows if mask is None else rows.masked_fill(~mask[..., None, None], torch.nan)
            first.expire_codes_(rows.flatten(1, 2))

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        beam = self.beam_size if self.training else self.eval_beam_size
        if beam is not None and beam > 1:
            return None
        found = []
        with torch.no_grad():
            rows = x.flatten(2).mT if self.accept_image_fmap else x if x.dim() > 2 else x[:, None]
            residual = self.project_in(rows)
            flat = indices.reshape(*rows.shape[:2], indices.shape[-1])
            for layer, index in zip(self._stages, flat.unbind(-1), strict=True):
                dropped, index = index < 0, index.clamp_min(0)
                sq_dist = layer.sq_dist_of(residual, index)
                if sq_dist is None:
                    return None
                found.append(sq_dist.masked_fill(dropped, 0))
                codes = layer.get_codes_from_indices(index).masked_fill(dropped[..., None], 0)
                residual = residual - codes.to(residual.dtype)
        return torch.stack(found, dim=-1).reshape(indices.shape)


def _moved(y: Tensor, z: Tensor) -> Tensor:
    """One noisy error vector for the sum of all stages; every code of a row gets its gradient."""
    if z.numel() == 0:
        return y + z
    points = z.reshape(-1, z.shape[-1])
    own = torch.arange(len(points), device=z.device).view(z.shape[:-1])
    return directional(y, points, own, noise_std=_VARIANCE**0.5)


def draw_host_seed(device: torch.device) -> int:
    """A number on the host, the same on all ranks; the host waits for the device in a process group alone."""
    if not distributed():
        return int(torch.randint(0, _SEEDS, (), device="cpu"))
    return int(all_sum(torch.randint(0, _SEEDS, (), device=device)))
