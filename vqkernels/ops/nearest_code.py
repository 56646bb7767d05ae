"""Nearest codeword: `nearest_code`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import kernels, native
from vqkernels.checks import check_codebook, check_dtype, check_flag, check_pair, check_rows, refuse
from vqkernels.dispatch import Op, forced_backend
from vqkernels.ops._arithmetic import arithmetic
from vqkernels.ops._layout import collapse, collapse_groups

# the reference keeps this many float64 scores at a time
_CHUNK = 1 << 22


class NearestCode(NamedTuple):
    """What `nearest_code` returns."""

    indices: Tensor
    sq_dist: Tensor


def dithered(codebook: Tensor, dither: Tensor) -> Tensor:
    """Points (1 - l_s) c_s + l_s c_{s+1}, formed in float64, unfused (DiVeQ eq. 11).

    Args:
        codebook: (..., K, D).
        dither: (..., K - 1) the l_s, in [0, 1].

    Returns:
        points: (..., K - 1, D) float64.
    """
    weight = dither.double()[..., None]
    return (1 - weight) * codebook[..., :-1, :].double() + weight * codebook[..., 1:, :].double()


def _reference(
    x: Tensor, codebook: Tensor, dither: Tensor | None, exact: bool, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    codes = codebook.double() if dither is None else dithered(codebook, dither)  # ([G,] K, D)
    dtype = arithmetic(x, codebook)
    if codes.dim() == 2:
        return _search_group(x, codes, dtype)
    found = [_search_group(*group, dtype) for group in zip(x, codes, strict=True)]
    indices, sq_dist = zip(*found, strict=True)
    return torch.stack(indices), torch.stack(sq_dist)


def _search_group(x: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    finite = codes.isfinite().all(1)
    safe = torch.where(finite[:, None], codes, 0)
    flat = x.reshape(-1, x.shape[-1])
    indices = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
    sq_dist = torch.full((len(flat),), torch.nan, dtype=torch.float64, device=x.device)
    rows_at_once = max(1, _CHUNK // (len(codes) + x.shape[-1]))
    for start in range(0, len(flat), rows_at_once):
        rows = flat[start : start + rows_at_once].double()
        # a row without a distance keeps index 0 and nan
        good = (rows.isfinite().all(1) & finite.any()).nonzero().squeeze(1)
        if len(good):
            indices[start + good], sq_dist[start + good] = _search(rows[good], safe, finite)
    return indices.view(x.shape[:-1]), sq_dist.view(x.shape[:-1]).to(dtype)


def _search(x: Tensor, codes: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest index of the least distance: scores |c|^2/2 - x.c find the candidates, the contract's order decides."""
    n, (k, d) = len(x), codes.shape
    half = torch.where(finite, codes.square().sum(1) / 2, torch.inf)
    score = torch.addmm(half, x, codes.t(), alpha=-1)  # (n, K)
    # rounding and underflow, of a score and of the distance it stands for, with a margin of two
    eps, tiny = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
    error = 2 * (d + 4) * (eps * (x.norm(dim=1) + codes.norm(dim=1).amax()).square() + tiny)
    # written so that a bound or a score that is nan keeps every finite code
    candidate = ~(score > (score.amin(1) + 2 * error)[:, None]) & finite
    row, code = candidate.nonzero(as_tuple=True)
    pairs = zip(row.split(_CHUNK // d), code.split(_CHUNK // d), strict=True)
    sq_dist = torch.cat([_sq_dist(x, codes, r, c) for r, c in pairs])
    least = x.new_full((n,), torch.inf).scatter_reduce(0, row, sq_dist, "amin")
    winner = sq_dist == least[row]
    best = torch.full((n,), k, device=x.device).scatter_reduce(0, row[winner], code[winner], "amin")
    return best, least


def _sq_dist(x: Tensor, codes: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """|x - c|^2 of pairs in float64: features ascending, every operation rounded, none fused."""
    difference = x[row].t() - codes[code].t()  # (D, pairs)
    total = x.new_zeros(len(row))
    for t in difference:
        total = total + t * t
    return total


def _fake(
    x: Tensor, codebook: Tensor, dither: Tensor | None, exact: bool, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=arithmetic(x, codebook))


nearest_code_op = Op(
    "nearest_code",
    "(Tensor x, Tensor codebook, Tensor? dither, bool exact, Tensor[] parts) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
nearest_code_op.add_native(native.MISSING, why_not=native.why_not, prepare=native.prepare_codes)
nearest_code_op.add(
    "triton",
    kernels.lazy("nearest_code"),
    why_not=kernels.why_not,
    prepare=kernels.lazy("nearest_code", "prepare_codes"),
)


@dataclass(frozen=True, eq=False)
class PreparedCodebook:
    """A codebook that stays as it was when `prepare` made this: `nearest_code` takes it in the codebook's place.

    Attributes:
        codes: (K, D) own copy.
        x_dtype: dtype of the rows it serves.
        backend: the backend that prepared it and will search it.
        parts: what that backend made, for it alone.
    """

    codes: Tensor
    x_dtype: torch.dtype
    backend: str
    parts: list[Tensor] = field(repr=False)


def prepare(
    codebook: Tensor, *, x_dtype: torch.dtype | None = None, backend: str | None = None
) -> PreparedCodebook:
    """Do once what every search of a codebook begins with, for loops over a codebook that does not change.

    The handle holds its own copy of the codes: later writes to `codebook` do not reach it, and nothing is cached
    behind your back. Call it again after the codes have changed.

    Args:
        codebook: (K, D) float16, bfloat16, float32 or float64, K >= 1.
        x_dtype: dtype of the rows that will be searched; by default that of the codebook.
        backend: "native", "triton" or "reference"; by default the fastest that accepts such inputs.

    Raises:
        TypeError: a dtype is not floating-point.
        ValueError: the codebook is not (K, D) or has no code.
        BackendError: `backend` cannot run such inputs.
    """
    check_codebook("prepare", codebook)
    x_dtype = codebook.dtype if x_dtype is None else x_dtype
    check_dtype("prepare", "x_dtype", x_dtype)
    codes = codebook.detach().clone()
    chosen = nearest_code_op.select(codes.new_empty((0,), dtype=x_dtype), codes, backend=backend)
    parts = [] if chosen.prepare is None else chosen.prepare(codes, x_dtype)
    return PreparedCodebook(codes, x_dtype, chosen.name, parts)


def _prepared(x: Tensor, codebook: PreparedCodebook, backend: str | None) -> tuple[str, list[Tensor], Tensor]:
    check_rows("nearest_code", x)
    if x.dtype != codebook.x_dtype:
        fix = f"Call prepare(codebook, x_dtype={x.dtype})"
        refuse(ValueError, "nearest_code", "x", f"be {codebook.x_dtype}, as prepared for", x.dtype, fix)
    backend = forced_backend() if backend is None else backend
    if backend not in (None, codebook.backend):
        fix = f"Call prepare(codebook, backend={backend!r})"
        refuse(
            ValueError,
            "nearest_code",
            "backend",
            f"be {codebook.backend!r}, which prepared it",
            repr(backend),
            fix,
        )
    return codebook.backend, codebook.parts, codebook.codes


def nearest_code(
    x: Tensor, codebook: Tensor | PreparedCodebook, *, exact: bool = True, backend: str | None = None
) -> NearestCode:
    """Find the nearest code of each row, without an N x K matrix.

        i(x) = argmin_j |x - c_j|^2        (DiVeQ eq. 1)

    The index is the lowest that minimises the squared distance formed in float64 over ascending features, every
    operation rounded and none fused, whatever the dtypes and the backend. A code with a NaN or Inf never wins
    while a finite one exists; a row of x with one gets index 0 and a NaN distance. No gradient flows.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes (not necessarily that of x), K >= 1, same device; or what `prepare`
            made of one; or (G, K, D) with x (G, ..., D): group g of x is searched in codebook g, all in one call.
        exact: False skips the certificate: the winner of the backend's own precision, which may miss the least
            squared distance by four times that precision's error bound.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs, or the one that
            prepared the codebook.

    Returns:
        indices: (...) int64, or (G, ...).
        sq_dist: (...) or (G, ...), |x - c_i|^2, float32, or float64 when an input is float64; units of x squared.

    Raises:
        TypeError: a dtype is not floating-point.
        ValueError: shapes or devices do not match, or K = 0, or the codebook was prepared for another dtype or backend.
        BackendError: `backend` cannot run these inputs.
    """
    parts: list[Tensor] = []
    if isinstance(codebook, PreparedCodebook):
        backend, parts, codebook = _prepared(x, codebook, backend)
    check_pair("nearest_code", x, codebook, groups=True)
    check_flag("nearest_code", "exact", exact)
    flat = collapse_groups(x.detach()) if codebook.dim() == 3 else collapse(x.detach())
    indices, sq_dist = nearest_code_op(flat, codebook.detach(), None, exact, parts, backend=backend)
    return NearestCode(indices.view(x.shape[:-1]), sq_dist.view(x.shape[:-1]))
