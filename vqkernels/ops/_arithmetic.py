"""The dtype that ops on latents and codes compute and return distances in."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic(x: Tensor, codebook: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
