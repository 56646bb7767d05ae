"""Nearest point of the curve through the codes: `nearest_segment`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import kernels, native
from vqkernels.checks import check_pair
from vqkernels.dispatch import Op
from vqkernels.ops._arithmetic import arithmetic
from vqkernels.ops._layout import collapse

# pairs of a row and a segment at a time
_CHUNK = 1 << 20


class NearestSegment(NamedTuple):
    """What `nearest_segment` returns."""

    segments: Tensor
    position: Tensor
    sq_dist: Tensor


def _reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = codebook.double()
    flat = x.reshape(-1, x.shape[-1]).double()
    finite = codes.isfinite().all(1)
    usable = finite[1:] & finite[:-1]
    lost = ~flat.isfinite().all(1) | ~usable.any()
    # the lowest usable segment, for rows whose every distance overflows
    segments = torch.where(lost, 0, usable.int().argmax())
    position = torch.zeros_like(lost, dtype=torch.float64)
    sq_dist = torch.where(lost, torch.nan, torch.inf).double()
    at_once = max(1, min(len(codes) - 1, 1024))
    for rows in torch.arange(len(flat), device=x.device).split(max(1, _CHUNK // at_once)):
        for start in range(0, len(codes) - 1, at_once):
            t, d = _project(flat[rows], codes[start : start + at_once + 1])
            d = torch.where(usable[start : start + at_once] & ~d.isnan(), d, torch.inf)
            least = d.amin(1)
            best = (d == least[:, None]).int().argmax(1)
            better = least < sq_dist[rows]
            here = rows[better]
            segments[here] = best[better] + start
            position[here] = t.gather(1, best[:, None])[:, 0][better]
            sq_dist[here] = least[better]
    dtype = arithmetic(x, codebook)
    leading = x.shape[:-1]
    return segments.view(leading), position.to(dtype).view(leading), sq_dist.to(dtype).view(leading)


def _project(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Position in [0, 1] and squared distance of each row's nearest point on each segment: (n, K - 1) both."""
    along, total = (x.new_zeros(len(x), len(codes) - 1) for _ in range(2))
    length = x.new_zeros(len(codes) - 1)
    for column, code in zip(x.t(), codes.t(), strict=True):
        step = code[1:] - code[:-1]
        along = along + (column[:, None] - code[:-1]) * step
        length = length + step * step
    t = torch.where(length > 0, along / length, 0).clamp(0, 1)
    for column, code in zip(x.t(), codes.t(), strict=True):
        # the ends are the codes themselves, so a vertex is an exact tie of its two segments
        point = torch.where(t == 1, code[1:], code[:-1] + t * (code[1:] - code[:-1]))
        difference = column[:, None] - point
        total = total + difference * difference
    return t, total


def _fake(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = arithmetic(x, codebook)
    shape = x.shape[:-1]
    return (
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=dtype),
    )


nearest_segment_op = Op(
    "nearest_segment",
    "(Tensor x, Tensor codebook) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
nearest_segment_op.add_native(native.MISSING, why_not=native.why_not_cpu_only)
nearest_segment_op.add("triton", kernels.lazy("nearest_segment"), why_not=kernels.why_not)


def nearest_segment(x: Tensor, codebook: Tensor, *, backend: str | None = None) -> NearestSegment:
    """Find the nearest point of the polyline c_1 c_2 ... c_K to each row.

        t_s = clamp((x - c_s) . d_s / |d_s|^2, 0, 1),   d_s = c_{s+1} - c_s
        s   = argmin_s |x - c_s - t_s d_s|

    This is the exact evaluation of SF-DiVeQ on its curve. Distances are formed in float64 on the differences,
    in the order of `nearest_code`; the lowest segment wins a tie, such as a nearest point on a shared code.
    A row with a NaN or Inf gets segment 0, position 0 and a NaN distance; a segment with one never wins while
    another exists. No gradient flows.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device, K >= 2.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs.

    Returns:
        segments: (...) int64 in [0, K - 1).
        position: (...) t_s in [0, 1], float32, or float64 when an input is float64.
        sq_dist: (...) the least squared distance, same dtype; units of x squared.

    Raises:
        TypeError: a dtype is not floating-point.
        ValueError: shapes or devices do not match, or K < 2.
        BackendError: `backend` cannot run these inputs.
    """
    check_pair("nearest_segment", x, codebook, min_codes=2)
    flat = collapse(x.detach())
    outputs = nearest_segment_op(flat, codebook.detach(), backend=backend)
    return NearestSegment(*(out.view(x.shape[:-1]) for out in outputs))
