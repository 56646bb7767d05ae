"""The noise of every backend, made visible: `philox` (an internal op)."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import kernels, native, philox
from vqkernels.dispatch import Op


def _reference(seed: Tensor, rows: int, blocks: int, stream: int, row_offset: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows, device=seed.device) + row_offset
    words = philox.words(seed, row, blocks, stream)
    return words, philox.normals(words)


def _fake(seed: Tensor, rows: int, blocks: int, stream: int, row_offset: int) -> tuple[Tensor, Tensor]:
    words = seed.new_empty((rows, blocks, 4))
    return words, torch.empty_like(words, dtype=torch.float32)


philox_op = Op(
    "philox",
    "(Tensor seed, SymInt rows, SymInt blocks, int stream, SymInt row_offset) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
philox_op.add_native(native.MISSING, why_not=native.why_not)
philox_op.add("triton", kernels.lazy("philox"), why_not=kernels.why_not)


def dither(seed: Tensor, num_codes: int, *, backend: str | None = None) -> Tensor:
    """The lambda of SF-DiVeQ: one U(0, 1) per segment (eq. 11), shared by all rows of a forward pass.

    Args:
        seed: 0-d int64.
        num_codes: K >= 2.

    Returns:
        (K - 1,) float32 in [0, 1), bit-equal on every backend.
    """
    words, _ = philox_op(seed, 1, (num_codes + 2) // 4, philox.DITHER, 0, backend=backend)
    return philox.uniforms(words).flatten()[: num_codes - 1]
