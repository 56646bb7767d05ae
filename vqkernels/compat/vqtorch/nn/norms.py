"""Norms of latents and of codes, under the names that vqtorch gives them.

Its two names mean the opposite of one another on the two sides, and models have been trained so; they are kept:
"l2" is the unit length for latents and at most 10 for codes, "l2c" is at most 10 for latents and the unit length for
codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import refuse

_MOST = 10
_OF_IMAGES = ("bn", "gn", "in")


class UnitLength(nn.Module):
    """x / max(|x|, 1e-6), over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Latents (..., D)."""
        return F.normalize(x, dim=-1, eps=1e-6)


class LengthAtMost(nn.Module):
    """min(|x|, 10) x / |x|, over the last dimension; no gradient reaches the length in the numerator."""

    def forward(self, x: Tensor) -> Tensor:
        """Latents (..., D)."""
        return at_most(x)


def at_most(x: Tensor) -> Tensor:
    """Rows (..., D) that are no longer than 10."""
    length = x.norm(dim=-1, keepdim=True)
    return x * (length.detach().clamp(max=_MOST) / (length + 1e-8))


def norm_of_latents(op: str, norm: str | None, channels: int) -> tuple[nn.Module, bool]:
    """The layer, and whether it takes the tensor before its features become the last dimension.

    Raises:
        ValueError: no such norm.
    """
    if norm in (None, "none"):
        return nn.Identity(), True
    if norm in ("l2", "l2c"):
        return (UnitLength() if norm == "l2" else LengthAtMost()), False
    if norm not in _OF_IMAGES:
        words = "None, 'none', 'l2', 'l2c', 'bn', 'gn' or 'in'"
        refuse(ValueError, op, "norm", f"be {words}", repr(norm), "Pass one of these")
    if norm == "bn":
        return nn.BatchNorm2d(channels), True
    if norm == "in":
        return nn.InstanceNorm2d(channels), True
    return nn.GroupNorm(32, channels, eps=1e-6), True


def check_cb_norm(op: str, cb_norm: str | None) -> str | None:
    """A norm that codes can have.

    Raises:
        ValueError: it is another one; vqtorch ignores those.
    """
    if cb_norm not in (None, "none", "l2", "l2c"):
        refuse(
            ValueError, op, "cb_norm", "be None, 'none', 'l2' or 'l2c'", repr(cb_norm), "Pass one of these"
        )
    return cb_norm


@torch.no_grad()
def normalize_codes(weight: Tensor, cb_norm: str | None) -> None:
    """Give the codes (K, D) their norm, in place."""
    if cb_norm == "l2":
        weight.copy_(at_most(weight))
    elif cb_norm == "l2c":
        weight.copy_(F.normalize(weight, dim=1, eps=1e-8))
