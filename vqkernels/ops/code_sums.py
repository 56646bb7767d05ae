"""Per-code counts and sums of the rows assigned to each code: `code_sums` (the shortest op; a template for others)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import kernels, native
from vqkernels.checks import check_count, check_indices, check_rows
from vqkernels.dispatch import Op
from vqkernels.ops._layout import collapse

_CHUNK = 1 << 22


class CodeSums(NamedTuple):
    """What `code_sums` returns."""

    counts: Tensor
    sums: Tensor


def _reference(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    flat, index = x.reshape(-1, x.shape[-1]), indices.flatten()
    counts = torch.zeros(num_codes + 1, dtype=torch.int64, device=x.device)
    sums = torch.zeros(num_codes + 1, x.shape[-1], dtype=torch.float64, device=x.device)
    for rows, at in zip(flat.split(_CHUNK // x.shape[-1]), index.split(_CHUNK // x.shape[-1]), strict=True):
        good = rows.isfinite().all(1) & (at >= 0) & (at < num_codes)
        # what counts for nothing goes to a code that is dropped
        at = torch.where(good, at, num_codes)
        counts.index_add_(0, at, torch.ones_like(at))
        sums.index_add_(0, at, torch.where(good[:, None], rows, 0).double())
    return counts[:-1].clone(), sums[:-1].to(_sums_dtype(x))


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts = x.new_empty((num_codes,), dtype=torch.int64)
    return counts, x.new_empty((num_codes, x.shape[-1]), dtype=_sums_dtype(x))


code_sums_op = Op(
    "code_sums",
    "(Tensor x, Tensor indices, SymInt num_codes) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
code_sums_op.add_native(native.MISSING, why_not=native.why_not)
code_sums_op.add("triton", kernels.lazy("code_sums"), why_not=kernels.why_not)


def code_sums(x: Tensor, indices: Tensor, num_codes: int, *, backend: str | None = None) -> CodeSums:
    """Count the rows of each code and add them up (n and sum z of DiVeQ eq. 3).

        n_j = |{n : i_n = j}|,   sums_j = sum_{n : i_n = j} x_n

    Rows with a NaN or Inf, and rows whose index lies outside [0, K), count for nothing. No gradient flows.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        indices: (...) int64.
        num_codes: K >= 1.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs.

    Returns:
        counts: (K,) int64.
        sums: (K, D) float32, float64 for float64 x; units of x.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices do not match, or num_codes < 1.
        BackendError: `backend` cannot run these inputs.
    """
    check_rows("code_sums", x)
    check_indices("code_sums", indices, x.shape[:-1], x.device)
    check_count("code_sums", "num_codes", num_codes, minimum=1, maximum=2**31)
    flat = collapse(x.detach())
    index = indices.reshape(flat.shape[:-1])
    return CodeSums(*code_sums_op(flat, index, num_codes, backend=backend))
