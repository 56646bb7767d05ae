"""`VectorQuantizer` and `VectorQuantizer2`: codes chosen by distance."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_count, check_flag, check_number, refuse
from vqkernels.compat.taming.remap import Remap, Remapped
from vqkernels.nn._autocast import full_precision
from vqkernels.nn.metrics import code_counts
from vqkernels.ops import nearest_code, straight_through


class _Nearest(Remapped):
    """What both quantizers by distance have in common."""

    def _make(self, n_e: int, e_dim: int, beta: float) -> None:
        name = type(self).__name__
        self.n_e = check_count(name, "n_e", n_e, minimum=1)
        self.e_dim = check_count(name, "e_dim", e_dim, minimum=1)
        self.beta = check_number(name, "beta", beta)
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def _num_codes(self) -> int:
        return self.n_e

    def _quantize(self, z: Tensor, legacy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """z_q (B, D, H, W), loss, indices (B, H, W) of z (B, D, H, W)."""
        name, weight = type(self).__name__, self.embedding.weight
        if z.dim() != 4 or z.shape[1] != self.e_dim:
            requirement = f"be (B, {self.e_dim}, H, W)"
            refuse(
                ValueError, name, "z", requirement, f"shape {tuple(z.shape)}", "Pass features as dimension 1"
            )
        rows = z.permute(0, 2, 3, 1)  # (B, H, W, D)
        with full_precision(z.device):
            indices = nearest_code(rows, weight).indices
            z_q, loss = straight_through(
                rows.to(torch.promote_types(z.dtype, weight.dtype)),
                weight,
                indices,
                commitment=1.0 if legacy else self.beta,
                codebook_weight=self.beta if legacy else 1.0,
            )
        return z_q.permute(0, 3, 1, 2).contiguous(), loss, indices

    def _entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.view(shape).permute(0, 3, 1, 2).contiguous()

    def carry(self, peer: Any) -> None:
        """The peer's own embedding and what it calls its remap."""
        self.embedding = peer.embedding
        self.remap = getattr(peer, "remap", None)

    @staticmethod
    def outcome(result: tuple) -> tuple[Tensor, Tensor]:
        """z_q and indices."""
        return result[0], result[2][2]

    @torch.no_grad()
    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        """Squared distances in float64 to the codes that indices name; of an unknown one, to the nearest of these."""
        rows, weight = x.permute(0, 2, 3, 1).double(), self.embedding.weight.double()
        chosen = indices.view(rows.shape[:-1])
        codes = chosen if self.remap is None else self.used.to(chosen)[chosen.clamp_max(len(self.used) - 1)]
        sq_dist = (rows - F.embedding(codes, weight)).square().sum(-1)
        if self.remap is not None and self.unknown_index != "random":
            unused = torch.ones(self.n_e, dtype=torch.bool, device=x.device).index_fill_(
                0, self.used.to(codes), False
            )
            rest = (
                nearest_code(rows, weight[unused]).sq_dist
                if bool(unused.any())
                else sq_dist.new_tensor(torch.inf)
            )
            unknown = torch.where(chosen < len(self.used), torch.minimum(sq_dist, rest), rest)
            sq_dist = torch.where(chosen.eq(int(self.unknown_index)), unknown, sq_dist)
        return sq_dist.view(indices.shape)


class VectorQuantizer(_Nearest):
    """The first quantizer of taming-transformers: the nearest code, straight through.

        z_q  = z + sg[c_i - z],   i = argmin_j |z - c_j|
        loss = mean (z - sg[c_i])^2 + beta mean (sg[z] - c_i)^2

    beta weighs the codebook, not the commitment, as in the peer, whose models were trained so. The search is exact and
    nothing of size N x K is made.

    Args:
        n_e: K codes, which start in U(-1/K, 1/K).
        e_dim: D.
        beta: weight of the codebook loss.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    peers = ("taming.modules.vqvae.quantize.VectorQuantizer",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer's min_encodings is a matrix (N, K); ours is sparse, multiplies alike, has to_dense().",
        "The peer's z_q is z + (code - z), which rounds; ours is the code itself.",
    )

    def __init__(self, n_e: int, e_dim: int, beta: float):
        super().__init__()
        self._make(n_e, e_dim, beta)
        self.remap = None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Quantize.

        Args:
            z: (B, D, H, W).

        Returns:
            z_q (B, D, H, W), loss, and (perplexity, min_encodings (N, K) sparse, indices (N, 1)).

        Raises:
            ValueError: z has another shape.
        """
        z_q, loss, indices = self._quantize(z, legacy=True)
        indices = indices.flatten()
        share = code_counts(indices, self.n_e).to(loss.dtype) / max(1, len(indices))
        perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        places = torch.stack((torch.arange(len(indices), device=z.device), indices))
        ones = torch.ones_like(indices, dtype=z.dtype)
        size = (len(indices), self.n_e)
        encodings = torch.sparse_coo_tensor(places, ones, size, is_coalesced=True, check_invariants=False)
        return z_q, loss, (perplexity, encodings, indices[:, None])

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of indices (N,): (N, D), or (B, D, H, W) for `shape` = (B, H, W, D)."""
        return self._entry(indices, shape)

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        """The keywords that would construct `peer` anew."""
        return {"n_e": peer.n_e, "e_dim": peer.e_dim, "beta": peer.beta}


class VectorQuantizer2(_Nearest):
    """The quantizer of taming-transformers' published models: the nearest code, straight through.

        z_q  = z + sg[c_i - z],   i = argmin_j |z - c_j|
        loss = mean (z - sg[c_i])^2 + beta mean (sg[z] - c_i)^2            legacy=True
        loss = beta mean (z - sg[c_i])^2 + mean (sg[z] - c_i)^2            legacy=False

    legacy=True is the default as in the peer, whose models were trained so. The search is exact and nothing of size
    N x K is made.

    Args:
        n_e: K codes, which start in U(-1/K, 1/K).
        e_dim: D.
        beta: weight of one of the two losses.
        remap: a .npy file with the used codes, or a tensor of them: indices become places among these.
        unknown_index: what becomes of other codes: "random", "extra" (one place more) or a place.
        sane_index_shape: whether indices are (B, H, W).
        legacy: which loss beta weighs.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    peers = ("taming.modules.vqvae.quantize.VectorQuantizer2",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer's z_q is z + (code - z), which rounds; ours is the code itself.",
        'The peer draws places ("random") for unknown codes alone; ours for every index, waiting for none.',
        "The peer's `unmap_to_all` writes into its argument, and remap prints; ours does neither.",
    )

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: Remap = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        self._make(n_e, e_dim, beta)
        name = type(self).__name__
        self.legacy = check_flag(name, "legacy", legacy)
        self.sane_index_shape = check_flag(name, "sane_index_shape", sane_index_shape)
        self._keep_used(n_e, remap, unknown_index)

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantize.

        Args:
            z: (B, D, H, W).
            temp: None or 1, as without logits there is nothing to divide.
            rescale_logits, return_logits: False.

        Returns:
            z_q (B, D, H, W), loss, and (None, None, indices): (B * H * W,), or (B * H * W, 1) with `remap`, or
            (B, H, W) with `sane_index_shape`.

        Raises:
            ValueError: z has another shape, or an argument that is for `GumbelQuantize` asks for something.
        """
        for option, got, plain in (
            ("temp", temp, temp is None or temp == 1),
            ("rescale_logits", rescale_logits, not rescale_logits),
            ("return_logits", return_logits, not return_logits),
        ):
            if not plain:
                fix = "Leave it out: distances have no logits"
                refuse(ValueError, type(self).__name__, option, "be left at its default", got, fix)
        z_q, loss, indices = self._quantize(z, self.legacy)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten() if self.remap is None else indices.view(-1, 1)
        return z_q, loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of indices as `forward` returns them: (..., D), or (B, D, H, W) for `shape` = (B, H, W, D)."""
        if self.remap is not None:
            if shape is None:
                fix = "Pass (B, H, W, D)"
                refuse(ValueError, "get_codebook_entry", "shape", "be given with remap", None, fix)
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        return self._entry(indices, shape)

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        """The keywords that would construct `peer` anew."""
        return {
            "n_e": peer.n_e,
            "e_dim": peer.e_dim,
            "beta": peer.beta,
            "sane_index_shape": peer.sane_index_shape,
            "legacy": peer.legacy,
            **cls._remap_options(peer),
        }
