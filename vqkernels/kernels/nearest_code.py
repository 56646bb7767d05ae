"""Nearest code in Triton: search by products, certify, and search the rows left open in float64.

Five kernels, no host synchronisation: `prepare` (copies and norms of the points), `_search` (best pair of
points and the runner-up of each row), `finish` (the certificate), `rescue` and `merge` (the open rows).
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import (
    INTERPRETED,
    TYPES,
    Configuration,
    feature_block,
    is_finite,
    on_device_of,
    processors,
    row_offsets,
)
from vqkernels.kernels._points import prepare
from vqkernels.kernels._rescue import finish, merge, rescue

# points are padded to a multiple of it; every tile of points divides it
_PAD = 1024 if INTERPRETED else 128
_FINISH_ROWS = 4096 if INTERPRETED else 128
_RESCUE_ROWS = 128 if INTERPRETED else 4
_RESCUE_PROGRAMS = 1 if INTERPRETED else 4


@triton.jit(do_not_specialize=["num_rows", "inner", "tiles"])
def _search(
    x,
    points,
    half_norms,
    best_score,
    next_score,
    best_pair,
    num_rows,
    inner,
    features,
    padded_points,
    tiles,
    x_outer,
    x_inner,
    x_feature,
    RESIDENT: tl.constexpr,
    QUIET_NAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best and runner-up pair of points of each row, by x.p - |p|^2/2, in one share of the points."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    live = rows < num_rows
    feature = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_K)
    half_column = tl.arange(0, BLOCK_K // 2)
    minus_infinity = float("-inf")
    wide_block = tl.full((1, 1), BLOCK_D, tl.int64)
    start = (
        x + row_offsets(rows, inner, x_outer, x_inner)[:, None] + feature.to(tl.int64)[None, :] * x_feature
    )
    where = points + feature.to(tl.int64)[:, None] * padded_points + column[None, :]
    best = tl.full((BLOCK_N,), minus_infinity, tl.float32)
    following = tl.full((BLOCK_N,), minus_infinity, tl.float32)
    pair = tl.zeros((BLOCK_N,), tl.int32)
    if RESIDENT:
        value = tl.load(start, mask=live[:, None] & (feature < features)[None, :], other=0.0)
        # what is not finite is seen later, in float64
        value = tl.where(is_finite(value), value, 0.0).to(points.dtype.element_ty)
    for tile in range(tiles * share // shares, tiles * (share + 1) // shares):
        if RESIDENT:
            point = tl.load(where + tile * BLOCK_K)
            product = tl.dot(value, point, input_precision="ieee")
        else:
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            x_at = start
            point_at = where + tile * BLOCK_K
            for first in range(0, features, BLOCK_D):
                part = tl.load(x_at, mask=live[:, None] & (first + feature < features)[None, :], other=0.0)
                part = tl.where(is_finite(part), part, 0.0).to(points.dtype.element_ty)
                product = tl.dot(part, tl.load(point_at), product, input_precision="ieee")
                x_at += wide_block * x_feature
                point_at += wide_block * padded_points
        score = product - tl.load(half_norms + tile * BLOCK_K + column)[None, :]
        if QUIET_NAN:
            score = tl.where(score >= minus_infinity, score, minus_infinity)
        # the maximum of neighbours costs half an instruction each; the finish tells the two apart
        score = tl.max(tl.reshape(score, (BLOCK_N, BLOCK_K // 2, 2)), axis=2)
        here, at = tl.max(score, axis=1, return_indices=True)
        rest = tl.max(tl.where(half_column[None, :] == at[:, None], minus_infinity, score), axis=1)
        following = tl.maximum(tl.maximum(following, rest), tl.minimum(best, here))
        pair = tl.where(here > best, tile * (BLOCK_K // 2) + at, pair)
        best = tl.maximum(best, here)
    out = share * num_rows.to(tl.int64) + rows
    tl.store(best_score + out, best, mask=live)
    tl.store(next_score + out, following, mask=live)
    tl.store(best_pair + out, pair, mask=live)


def _prepare(codes: torch.dtype, searched: torch.dtype, dithered: bool) -> Configuration:
    return Configuration(
        name=f"nearest_code_prepare_{TYPES[codes]}_{'dithered' if dithered else TYPES[searched]}",
        kernel=prepare,
        constants={"DITHERED": dithered, "BLOCK_K": _PAD if INTERPRETED else 32, "BLOCK_D": 32},
        types={
            "codes": f"*{TYPES[codes]}",
            "dither": "*fp32",
            "searched": f"*{TYPES[searched]}",
            "exact": "*fp64",
            "half_norms": "*fp32",
            "wide_half_norms": "*fp64",
            "lost_squares": "*fp64",
        },
        ones=("stride_feature",),
        multiples=("features", "padded_features", "padded_points", "stride_code"),
        warps=8,
        fused=False,
    )


def _search_form(x: torch.dtype, searched: torch.dtype, features: int) -> Configuration:
    half = searched != torch.float32
    block = feature_block(features, 128 if half else 32)
    # operands of float32 products live in registers: more of them would spill
    resident = features <= (block if half else 16)
    if not resident and half:
        block = 64
    tile = (128, 128) if half else (64, 64)
    return Configuration(
        name=f"nearest_code_search_{TYPES[x]}_{TYPES[searched]}_d{block}{'' if resident else '_loop'}",
        kernel=_search,
        constants={
            "RESIDENT": resident,
            "QUIET_NAN": INTERPRETED,
            "BLOCK_N": 1024 if INTERPRETED else tile[0],
            "BLOCK_K": 256 if INTERPRETED else tile[1],
            "BLOCK_D": block,
        },
        types={
            "x": f"*{TYPES[x]}",
            "points": f"*{TYPES[searched]}",
            "half_norms": "*fp32",
            "best_score": "*fp32",
            "next_score": "*fp32",
            "best_pair": "*i32",
        },
        ones=("x_feature",),
        multiples=("features", "padded_points", "x_inner", "x_outer"),
        warps=8 if half else 4,
        stages=3 if half else 2,
    )


def _finish(x: torch.dtype, codes: torch.dtype, exact: bool, dithered: bool) -> Configuration:
    return Configuration(
        name=f"nearest_code_finish_{TYPES[x]}_{TYPES[codes]}{'_exact' if exact else ''}"
        f"{'_dithered' if dithered else ''}",
        kernel=finish,
        constants={"EXACT": exact, "DITHERED": dithered, "BLOCK_N": _FINISH_ROWS},
        types={
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "dither": "*fp32",
            "half_norms": "*fp32",
            "largest_half_norm": "*fp64",
            "largest_lost_square": "*fp64",
            "best_score": "*fp32",
            "next_score": "*fp32",
            "best_pair": "*i32",
            "indices": "*i64",
            "sq_dist": "*fp32",
            "open_rows": "*i64",
            "open_count": "*i32",
        },
        ones=("x_feature", "stride_feature"),
        multiples=("features", "x_inner", "x_outer", "stride_code"),
        fused=False,
    )


def _rescue(x: torch.dtype, points: torch.dtype) -> Configuration:
    return Configuration(
        name=f"nearest_code_rescue_{TYPES[x]}_{TYPES[points]}",
        kernel=rescue,
        constants={"BLOCK_R": _RESCUE_ROWS, "BLOCK_K": _PAD},
        types={
            "x": f"*{TYPES[x]}",
            "points": f"*{TYPES[points]}",
            "half_norms": "*fp32",
            "open_rows": "*i64",
            "open_count": "*i32",
            "part_dist": "*fp64",
            "part_code": "*i32",
        },
        ones=("x_feature",),
        multiples=("features", "padded_points", "x_inner", "x_outer"),
        fused=False,
    )


_MERGE = Configuration(
    name="nearest_code_merge",
    kernel=merge,
    constants={"BLOCK_R": _RESCUE_ROWS, "BLOCK_N": _FINISH_ROWS},
    types={
        "open_rows": "*i64",
        "open_count": "*i32",
        "part_dist": "*fp64",
        "part_code": "*i32",
        "indices": "*i64",
        "sq_dist": "*fp32",
    },
)


def configurations() -> list[Configuration]:
    """The forms in which the kernels of this file are launched; other dtypes compile to the like."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    return [
        *(_search_form(half, half, features) for features in (16, 32, 64, 128, 256)),
        *(_search_form(single, single, features) for features in (16, 256)),
        _search_form(half, single, 256),
        _prepare(half, half, False),
        _prepare(single, single, True),
        _finish(half, half, True, False),
        _finish(single, single, True, True),
        _finish(half, single, False, False),
        _rescue(half, half),
        _rescue(single, double),
        _MERGE,
    ]


def launch(x: Tensor, codebook: Tensor, dither: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """Indices int64 and squared distances float32 of (B, M, D) rows."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    sq_dist = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if indices.numel():
        with on_device_of(x):
            _launch(x, codebook, dither, exact, indices, sq_dist)
    return indices, sq_dist


def _launch(
    x: Tensor, codebook: Tensor, dither: Tensor | None, exact: bool, indices: Tensor, sq_dist: Tensor
) -> None:
    rows, features, inner, dithered = indices.numel(), x.shape[-1], x.shape[1], dither is not None
    num_points = len(codebook) - dithered
    # products of halves are exact in float32; anything else is multiplied in float32
    halves = x.dtype == codebook.dtype != torch.float32 and not dithered
    search = _search_form(x.dtype, x.dtype if halves else torch.float32, features)
    searched_dtype = x.dtype if halves else torch.float32
    block_n, block_k, block_d = (search.constants[name] for name in ("BLOCK_N", "BLOCK_K", "BLOCK_D"))
    padded_points = triton.cdiv(num_points, _PAD) * _PAD
    padded_features = triton.cdiv(features, max(block_d, 32)) * max(block_d, 32)

    searched = x.new_empty((padded_features, padded_points), dtype=searched_dtype)
    half_norms = x.new_empty((padded_points,), dtype=torch.float32)
    wide_half_norms = x.new_empty((padded_points,), dtype=torch.float64)
    lost_squares = torch.empty_like(wide_half_norms) if dithered else wide_half_norms
    precise = torch.empty_like(searched, dtype=torch.float64) if dithered else searched
    weights = half_norms if dither is None else dither.contiguous()
    form = _prepare(codebook.dtype, searched_dtype, dithered)
    form.launch(
        (padded_points // form.constants["BLOCK_K"],),
        codebook,
        weights,
        searched,
        precise,
        half_norms,
        wide_half_norms,
        lost_squares,
        num_points,
        features,
        padded_features,
        padded_points,
        *codebook.stride(),
    )

    tiles, row_tiles = padded_points // block_k, triton.cdiv(rows, block_n)
    # a small batch fills the device by splitting the points
    shares = max(1, min(tiles, 2 * processors(x) // row_tiles, 64))
    best_score = x.new_empty((shares, rows), dtype=torch.float32)
    next_score = torch.empty_like(best_score)
    best_pair = torch.empty_like(best_score, dtype=torch.int32)
    search.launch(
        (row_tiles, shares),
        x,
        searched,
        half_norms,
        best_score,
        next_score,
        best_pair,
        rows,
        inner,
        features,
        padded_points,
        tiles,
        *x.stride(),
    )

    open_rows = x.new_empty((rows,), dtype=torch.int64)
    open_count = x.new_zeros((1,), dtype=torch.int32)
    _finish(x.dtype, codebook.dtype, exact, dithered).launch(
        (triton.cdiv(rows, _FINISH_ROWS),),
        x,
        codebook,
        weights,
        half_norms,
        wide_half_norms.amax(),
        lost_squares.amax() if dithered else wide_half_norms,
        best_score,
        next_score,
        best_pair,
        indices,
        sq_dist,
        open_rows,
        open_count,
        rows,
        inner,
        num_points,
        features,
        shares,
        *x.stride(),
        *codebook.stride(),
    )

    programs, tiles = _RESCUE_PROGRAMS * processors(x), padded_points // _PAD
    parts = _RESCUE_ROWS * max(triton.cdiv(rows, _RESCUE_ROWS), programs)
    part_dist = x.new_empty((parts,), dtype=torch.float64)
    part_code = x.new_empty((parts,), dtype=torch.int32)
    _rescue(x.dtype, precise.dtype).launch(
        (programs,),
        x,
        precise,
        half_norms,
        open_rows,
        open_count,
        part_dist,
        part_code,
        inner,
        features,
        padded_points,
        tiles,
        *x.stride(),
    )
    _MERGE.launch(
        (triton.cdiv(rows, _FINISH_ROWS),),
        open_rows,
        open_count,
        part_dist,
        part_code,
        indices,
        sq_dist,
        programs,
        tiles,
    )
