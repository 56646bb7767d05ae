"""Logits of all codes, some rows at a time: for ops that need every one of them.

    l_j = -|x - c_j|^2 = 2 (x' . c'_j - |c'_j|^2 / 2) - |x'|^2,   x' = x - m,  c'_j = c_j - m,  m the mean code

The last term is one number per row, which softmax, argmax and KL do not see, so it is left out. m is subtracted in
float64, so a common offset of latents and codes costs no digits, and the product is of float32, or float64 where an
input is. Its l_j, up to that number, is within (D + 6) eps (|x'| + |c'_j|) |c'_j|. A float32 product that torch
was told to round more coarsely (TF32) is as coarse here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# logits held at a time, on a cpu and elsewhere; few enough for the cache where that leaves products large enough
_MOST, _MOST_ELSEWHERE = 1 << 22, 1 << 23
_CACHED, _LEAST_ROWS = 1 << 19, 256


class Codes(NamedTuple):
    """A codebook as the product wants it.

    Attributes:
        rows: (K, D) c', 0 where a code is not finite.
        bias: (K,) -|c'|^2 / 2, hugely negative where a code is not finite; NaN where none is.
        centre: (D,) float64, m.
    """

    rows: Tensor
    bias: Tensor
    centre: Tensor


class Chunk(NamedTuple):
    """Some rows.

    Attributes:
        rows: where they are.
        x: (n, D) x', 0 where a row is not finite.
        finite: (n,) which are.
    """

    rows: slice
    x: Tensor
    finite: Tensor


def at_least_tiny(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """A temperature in `dtype`, where what is above 0 stays above 0."""
    return temperature.to(dtype).clamp_min(torch.finfo(dtype).tiny)


def centred(codebook: Tensor, dtype: torch.dtype) -> Codes:
    """The codes (K, D) around their mean."""
    wide = codebook.double()
    finite = wide.isfinite().all(1)
    wide = torch.where(finite[:, None], wide, 0)
    centre = wide.sum(0) / finite.sum().clamp_min(1)
    rows = (wide - centre).mul_(finite[:, None]).to(dtype)
    bias = torch.where(finite, -rows.double().square().sum(1) / 2, -torch.finfo(dtype).max / 8)
    return Codes(rows, torch.where(finite.any(), bias, torch.nan).to(dtype), centre)


def rows_at_once(num_codes: int, device: torch.device) -> int:
    """How many rows of K logits are made at a time."""
    if device.type != "cpu":
        return max(1, _MOST_ELSEWHERE // num_codes)
    return max(1, min(_MOST // num_codes, max(_CACHED // num_codes, _LEAST_ROWS)))


def chunks(x: Tensor, codes: Codes) -> Iterator[Chunk]:
    """The rows of x (N, D), as many at a time as logits fit in memory."""
    at_once = rows_at_once(len(codes.rows), x.device)
    for start in range(0, len(x), at_once):
        rows = slice(start, min(len(x), start + at_once))
        wide = x[rows].double()
        finite = wide.isfinite().all(1)
        near = torch.where(finite[:, None], wide - codes.centre, 0)
        yield Chunk(rows, near.to(codes.rows.dtype), finite)


def half_logits(chunk: Chunk, codes: Codes) -> Tensor:
    """l_j / 2 up to one number per row, (n, K)."""
    return torch.addmm(codes.bias, chunk.x, codes.rows.t())
