"""`GumbelQuantize`: codes drawn by logits that a convolution makes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkernels.checks import check_count, check_flag, check_number, check_temperature, refuse
from vqkernels.compat.taming.remap import Remap, Remapped
from vqkernels.nn._autocast import full_precision
from vqkernels.nn._random import draw_seed, first_row
from vqkernels.nn.estimators.base import finite_rows, mark
from vqkernels.ops._logits import rows_at_once
from vqkernels.ops.gumbel_code import gumbel_noise


class GumbelQuantize(Remapped):
    """taming-transformers' Gumbel-softmax quantizer (Jang et al. 2017).

        l = W x + b,   y = softmax((l + g) / tau),   z_q = sum_j y_j c_j
        loss = kl_weight mean KL(softmax(l) || uniform)

    With `straight_through`, and always in evaluation, y is one-hot in value and soft in gradient. Evaluation takes the
    largest logit, without noise. The N x K logits are made some rows at a time, in the backward pass again, and are
    kept only where `return_logits` asks for them; hooks of `proj` see no other call.

    Args:
        num_hiddens: features of z.
        embedding_dim: D, features of a code.
        n_embed: K.
        straight_through: whether y is one-hot in training.
        kl_weight: of the loss.
        temp_init: tau, which is the attribute `temperature` from then on.
        use_vqinterface: whether indices are returned as the last of three.
        remap: a .npy file with the used codes, or a tensor of them: no other is drawn, and indices are places among
            these.
        unknown_index: what becomes of other codes in `remap_to_used`: "random", "extra" (one place more) or a place.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    peers = ("taming.modules.vqvae.quantize.GumbelQuantize",)
    differences: ClassVar[tuple[str, ...]] = (
        "The peer draws noise in evaluation; ours takes the largest logits.",
        "The peer keeps the noise of training; ours draws it from a seed, again in the backward pass.",
        "The peer adds 1e-10 inside the logarithm of KL; ours takes log_softmax.",
        "The peer's `unmap_to_all` writes into its argument, and remap prints; ours does neither.",
    )

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: Remap = None,
        unknown_index: str | int = "random",
    ):
        super().__init__()
        name = type(self).__name__
        check_count(name, "num_hiddens", num_hiddens, minimum=1)
        self.embedding_dim = check_count(name, "embedding_dim", embedding_dim, minimum=1)
        self.n_embed = check_count(name, "n_embed", n_embed, minimum=1)
        self.straight_through = check_flag(name, "straight_through", straight_through)
        self.temperature = temp_init
        self.kl_weight = check_number(name, "kl_weight", kl_weight)
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)
        self.use_vqinterface = check_flag(name, "use_vqinterface", use_vqinterface)
        self._keep_used(n_embed, remap, unknown_index)

    def _num_codes(self) -> int:
        return self.n_embed

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple:
        """Quantize.

        Args:
            z: (B, num_hiddens, H, W).
            temp: tau of this call; by default `temperature`.
            return_logits: whether the logits (B, K, H, W), of used codes where there is a `remap`, are returned too.

        Returns:
            z_q (B, D, H, W), loss, and (None, None, indices (B, H, W)) or the indices alone; with `use_vqinterface`
            the logits last.

        Raises:
            ValueError: z has another shape, or the temperature is not above 0.
        """
        name = type(self).__name__
        if z.dim() != 4 or z.shape[1] != self.proj.in_channels:
            requirement = f"be (B, {self.proj.in_channels}, H, W)"
            got = f"shape {tuple(z.shape)}"
            refuse(ValueError, name, "z", requirement, got, "Pass features as dimension 1")
        tau = check_temperature(name, self.temperature if temp is None else temp, z.device)
        rows = z.permute(0, 2, 3, 1)  # (B, H, W, num_hiddens)
        with full_precision(z.device):
            z_q, indices, kl = self._draw(rows.reshape(-1, rows.shape[-1]), tau)
        z_q = z_q.view(*rows.shape[:-1], -1).permute(0, 3, 1, 2).contiguous()
        loss, indices = self.kl_weight * kl.mean(), indices.view(rows.shape[:-1])
        if not self.use_vqinterface:
            return z_q, loss, indices
        if not return_logits:
            return z_q, loss, (None, None, indices)
        logits = self.proj(z)
        return z_q, loss, (None, None, indices), logits if self.remap is None else logits[:, self.used]

    def _draw(self, rows: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_q (N, D), indices (N,) and KL (N,) of rows (N, num_hiddens)."""
        weight, bias, codes = self.proj.weight.flatten(1), self.proj.bias, self.embed.weight
        if self.remap is not None:
            weight, codes = weight[self.used], codes[self.used]
            bias = None if bias is None else bias[self.used]
        seed = draw_seed(rows.device) if self.training else None
        hard = self.straight_through or not self.training
        first, parts = first_row(len(rows)), []
        for chunk in rows.split(rows_at_once(len(codes), rows.device)):
            arguments = (chunk, weight, bias, codes, tau, seed, first, hard)
            if torch.is_grad_enabled():
                found = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                found = _chunk(*arguments)
            parts.append(found)
            first += len(chunk)
        z_q, indices, kl = (torch.cat(part) for part in zip(*parts, strict=True))
        # softmax over fewer codes is still compared with all of them
        kl = kl + math.log(self.n_embed)
        wide = torch.promote_types(rows.dtype, codes.dtype)
        return mark(z_q.to(wide), finite_rows(rows)), indices, kl

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Codes (B, D, H, W) of indices (B * H * W,) for `shape` = (B, H, W, D)."""
        indices = indices.view(shape[:3])
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return self.embed(indices).permute(0, 3, 1, 2).contiguous()

    @classmethod
    def options_of(cls, peer: Any) -> dict[str, object]:
        """The keywords that would construct `peer` anew."""
        return {
            "num_hiddens": peer.proj.in_channels,
            "embedding_dim": peer.embedding_dim,
            "n_embed": peer.n_embed,
            "straight_through": peer.straight_through,
            "kl_weight": peer.kl_weight,
            "temp_init": peer.temperature,
            "use_vqinterface": peer.use_vqinterface,
            **cls._remap_options(peer),
        }

    def carry(self, peer: Any) -> None:
        """The peer's own layers and what it calls its remap."""
        self.proj, self.embed, self.remap = peer.proj, peer.embed, peer.remap

    @staticmethod
    def outcome(result: tuple) -> tuple[Tensor, Tensor]:
        """z_q and indices."""
        return result[0], result[2] if isinstance(result[2], Tensor) else result[2][2]


def _chunk(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    tau: Tensor,
    seed: Tensor | None,
    first: int,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, num_hiddens) to z_q (n, D), indices (n,) and sum q ln q (n,), q = softmax(logits)."""
    wide = torch.promote_types(torch.promote_types(rows.dtype, codes.dtype), torch.float32)
    logits = F.linear(rows.to(wide), weight.to(wide), None if bias is None else bias.to(wide))  # (n, K)
    log_q = torch.log_softmax(logits, 1)
    kl = (log_q.exp() * log_q).sum(1)
    if seed is not None:
        logits = logits + gumbel_noise(seed, len(rows), len(codes), first, wide)
    best, indices = logits.detach().max(1)
    # the largest is 0, so that a quotient which leaves the range has weight 0
    y = torch.softmax((logits - best[:, None]) / tau.to(wide), 1)
    if not hard:
        return y @ codes.to(wide), indices, kl
    chosen = F.embedding(indices, codes).to(wide)
    # 0 in value, and its gradient is that of the soft sum
    return chosen + (y - y.detach()) @ codes.detach().to(wide), indices, kl
