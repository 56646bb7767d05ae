"""Nearest segment in Triton: search by products, certify, and search the rows left open in float64.

With p = x.c_s, q = x.c_{s+1}, d = c_{s+1} - c_s, L = |d|^2 and a = x.d - c_s.d = q - p - c_s.d,

    |x - c_s - t d|^2 / 2 = |x|^2 / 2 - S_s(t),    S_s = p - |c_s|^2 / 2 + gain(a),    gain(a) = max_{0<=t<=1} t (a - t L / 2)

so the nearest segment has the largest S_s, and gain moves by no more than a does. With X = |x|, P = max |c|, u = 2^-24
and kappa as in nearest_code (|error of p|, |error of q| <= kappa X P),

    |error of S_s| <= 3 kappa X P + u (16 X P + 32 P^2) = E:  one kappa of p, two of a, and the roundings of a dozen steps.

Eight neighbours are one group, of which only the best counts: most ties, such as a nearest point on a code that two
segments share, are within a group, and the float64 pass decides them. The last of a group has its end in common with
the first of the next; where its a >= L, its nearest point is that end, so it is left to the next group (what it is
better by is no more than the error of a), and the pass looks at the last of the group before as well. A row whose
runner-up group is more than 3 E behind is certain, the contract's own rounding included; the others are searched in
float64 as a whole.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import (
    INTERPRETED,
    TYPES,
    Configuration,
    cdiv,
    is_finite,
    on_device_of,
    processors,
)
from vqkernels.kernels._polyline import GROUP, TILE, prepare
from vqkernels.kernels._segment_rescue import finish, merge, rescue, starts_of

_FINISH_ROWS = 1024 if INTERPRETED else 16
_MERGE_ROWS = 4096 if INTERPRETED else 128
_RESCUE_ROWS = 128 if INTERPRETED else 4
_RESCUE_PROGRAMS = 1 if INTERPRETED else 4
_PREPARED_FEATURES = 32


@triton.jit(do_not_specialize=["num_rows", "inner", "tiles"])
def _search(
    x,
    starts,
    ends,
    half_norms,
    constants,
    best_score,
    next_score,
    best_group,
    num_rows,
    inner,
    features,
    padded,
    tiles,
    x_outer,
    x_inner,
    x_feature,
    RESIDENT: tl.constexpr,
    QUIET_NAN: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best and runner-up group of segments of each row in one share of the segments."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    live = rows < num_rows
    feature = tl.arange(0, BLOCK_D)
    column = tl.arange(0, TILE)
    which = tl.arange(0, TILE // GROUP)
    minus_infinity = float("-inf")
    wide_block = tl.full((1, 1), BLOCK_D, tl.int64)
    kind = starts.dtype.element_ty
    start = x + starts_of(rows, inner, x_outer, x_inner)[:, None] + feature.to(tl.int64)[None, :] * x_feature
    where = feature.to(tl.int64)[:, None] * padded + column[None, :]
    best = tl.full((BLOCK_N,), minus_infinity, tl.float32)
    following = tl.full((BLOCK_N,), minus_infinity, tl.float32)
    group = tl.zeros((BLOCK_N,), tl.int32)
    if RESIDENT:
        value = tl.load(start, mask=live[:, None] & (feature < features)[None, :], other=0.0)
        # what is not finite is seen later, in float64
        value = tl.where(is_finite(value), value, 0.0).to(kind)
    for tile in range(tiles * share // shares, tiles * (share + 1) // shares):
        if RESIDENT:
            p = tl.dot(value, tl.load(starts + where + tile * TILE), input_precision="ieee")
            q = tl.dot(value, tl.load(ends + where + tile * TILE), input_precision="ieee")
        else:
            p = tl.zeros((BLOCK_N, TILE), tl.float32)
            q = tl.zeros((BLOCK_N, TILE), tl.float32)
            x_at = start
            at = where + tile * TILE
            for first in range(0, features, BLOCK_D):
                part = tl.load(x_at, mask=live[:, None] & (first + feature < features)[None, :], other=0.0)
                part = tl.where(is_finite(part), part, 0.0).to(kind)
                p = tl.dot(part, tl.load(starts + at), p, input_precision="ieee")
                q = tl.dot(part, tl.load(ends + at), q, input_precision="ieee")
                x_at += wide_block * x_feature
                at += wide_block * padded
        place = tile * TILE + column
        a = (q - p) - tl.load(constants + place)[None, :]
        t = tl.minimum(tl.maximum(a * tl.load(constants + padded + place)[None, :], 0.0), 1.0)
        gain = t * (a - t * tl.load(constants + 2 * padded + place)[None, :])
        score = (p - tl.load(half_norms + place)[None, :]) + gain
        score = tl.where(a >= tl.load(constants + 3 * padded + place)[None, :], minus_infinity, score)
        if QUIET_NAN:
            score = tl.where(score >= minus_infinity, score, minus_infinity)
        score = tl.max(tl.reshape(score, (BLOCK_N, GROUP, TILE // GROUP)), axis=1)
        here, at_group = tl.max(score, axis=1, return_indices=True)
        rest = tl.max(tl.where(which[None, :] == at_group[:, None], minus_infinity, score), axis=1)
        following = tl.maximum(tl.maximum(following, rest), tl.minimum(best, here))
        group = tl.where(here > best, tile * (TILE // GROUP) + at_group, group)
        best = tl.maximum(best, here)
    out = share * num_rows.to(tl.int64) + rows
    tl.store(best_score + out, best, mask=live)
    tl.store(next_score + out, following, mask=live)
    tl.store(best_group + out, group, mask=live)


_SEGMENTS = {"TILE": TILE, "GROUP": GROUP}


def _prepare(codes: torch.dtype, searched: torch.dtype) -> Configuration:
    return Configuration(
        name=f"nearest_segment_prepare_{TYPES[codes]}_{TYPES[searched]}",
        kernel=prepare,
        constants={**_SEGMENTS, "BLOCK_D": _PREPARED_FEATURES},
        types={
            "codes": f"*{TYPES[codes]}",
            "starts": f"*{TYPES[searched]}",
            "ends": f"*{TYPES[searched]}",
            "half_norms": "*fp32",
            "constants": "*fp32",
            "squares": "*fp64",
        },
        ones=("stride_feature",),
        multiples=("features", "padded_features", "padded", "stride_code"),
        warps=8,
        fused=False,
    )


@functools.cache
def _search_form(x: torch.dtype, searched: torch.dtype, features: int) -> Configuration:
    half = searched != torch.float32
    block = min(64 if half else 16, max(16, triton.next_power_of_2(features)))
    resident = features <= block
    rows = 128 if half else 32
    return Configuration(
        name=f"nearest_segment_search_{TYPES[x]}_{TYPES[searched]}_d{block}{'' if resident else '_loop'}",
        kernel=_search,
        constants={
            "RESIDENT": resident,
            "QUIET_NAN": INTERPRETED,
            **_SEGMENTS,
            "BLOCK_N": 1024 if INTERPRETED else rows,
            "BLOCK_D": block,
        },
        types={
            "x": f"*{TYPES[x]}",
            "starts": f"*{TYPES[searched]}",
            "ends": f"*{TYPES[searched]}",
            "half_norms": "*fp32",
            "constants": "*fp32",
            "best_score": "*fp32",
            "next_score": "*fp32",
            "best_group": "*i32",
        },
        ones=("x_feature",),
        multiples=("features", "padded", "x_inner", "x_outer"),
        warps=8 if half else 4,
        stages=3 if half else 2,
    )


def _finish(x: torch.dtype, codes: torch.dtype) -> Configuration:
    return Configuration(
        name=f"nearest_segment_finish_{TYPES[x]}_{TYPES[codes]}",
        kernel=finish,
        constants={"GROUP": GROUP, "BLOCK_N": _FINISH_ROWS},
        types={
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "largest_square": "*fp64",
            "best_score": "*fp32",
            "next_score": "*fp32",
            "best_group": "*i32",
            "segments": "*i64",
            "position": "*fp32",
            "sq_dist": "*fp32",
            "open_rows": "*i64",
            "open_count": "*i32",
        },
        ones=("x_feature", "stride_feature"),
        multiples=("features", "x_inner", "x_outer", "stride_code"),
        fused=False,
    )


def _rescue(x: torch.dtype, searched: torch.dtype) -> Configuration:
    return Configuration(
        name=f"nearest_segment_rescue_{TYPES[x]}_{TYPES[searched]}",
        kernel=rescue,
        constants={**_SEGMENTS, "BLOCK_R": _RESCUE_ROWS},
        types={
            "x": f"*{TYPES[x]}",
            "starts": f"*{TYPES[searched]}",
            "ends": f"*{TYPES[searched]}",
            "half_norms": "*fp32",
            "open_rows": "*i64",
            "open_count": "*i32",
            "part_dist": "*fp64",
            "part_position": "*fp32",
            "part_segment": "*i32",
        },
        ones=("x_feature",),
        multiples=("features", "padded", "x_inner", "x_outer"),
        fused=False,
    )


_MERGE = Configuration(
    name="nearest_segment_merge",
    kernel=merge,
    constants={"BLOCK_R": _RESCUE_ROWS, "BLOCK_N": _MERGE_ROWS},
    types={
        "open_rows": "*i64",
        "open_count": "*i32",
        "part_dist": "*fp64",
        "part_position": "*fp32",
        "part_segment": "*i32",
        "segments": "*i64",
        "position": "*fp32",
        "sq_dist": "*fp32",
    },
)


def configurations() -> list[Configuration]:
    """The forms in which the kernels of this file are launched; other dtypes compile to the like."""
    half, single = torch.bfloat16, torch.float32
    return [
        *(_search_form(half, half, features) for features in (16, 32, 64, 256)),
        *(_search_form(single, single, features) for features in (16, 256)),
        _search_form(half, single, 256),
        _prepare(half, half),
        _prepare(single, single),
        _finish(half, half),
        _finish(single, single),
        _rescue(half, half),
        _rescue(single, single),
        _MERGE,
    ]


def launch(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Segments int64, positions float32 and squared distances float32 of (B, M, D) rows."""
    segments = x.new_empty(x.shape[:-1], dtype=torch.int64)
    position = x.new_empty(x.shape[:-1], dtype=torch.float32)
    sq_dist = torch.empty_like(position)
    if segments.numel():
        with on_device_of(x):
            _launch(x, codebook, segments, position, sq_dist)
    return segments, position, sq_dist


def _launch(x: Tensor, codebook: Tensor, segments: Tensor, position: Tensor, sq_dist: Tensor) -> None:
    rows, features, inner, num_codes = segments.numel(), x.shape[-1], x.shape[1], len(codebook)
    # products of halves are exact in float32; anything else is multiplied in float32
    searched = x.dtype if x.dtype == codebook.dtype else torch.float32
    search = _search_form(x.dtype, searched, features)
    block = max(search.constants["BLOCK_D"], _PREPARED_FEATURES)
    # one segment beyond the last carries the norm of the last code
    padded = cdiv(num_codes, TILE) * TILE
    padded_features = cdiv(features, block) * block
    starts = x.new_empty((padded_features, padded), dtype=searched)
    ends = torch.empty_like(starts)
    half_norms = x.new_empty((padded,), dtype=torch.float32)
    constants = half_norms.new_empty((4, padded))
    squares = x.new_empty((padded,), dtype=torch.float64)
    _prepare(codebook.dtype, searched).launch(
        (padded // TILE,),
        codebook,
        starts,
        ends,
        half_norms,
        constants,
        squares,
        num_codes,
        features,
        padded_features,
        padded,
        *codebook.stride(),
    )

    tiles, row_tiles = padded // TILE, cdiv(rows, search.constants["BLOCK_N"])
    # a small batch fills the device by splitting the segments
    shares = max(1, min(tiles, 2 * processors(x) // row_tiles, 64))
    best_score = x.new_empty((shares, rows), dtype=torch.float32)
    next_score = torch.empty_like(best_score)
    best_group = torch.empty_like(best_score, dtype=torch.int32)
    search.launch(
        (row_tiles, shares),
        x,
        starts,
        ends,
        half_norms,
        constants,
        best_score,
        next_score,
        best_group,
        rows,
        inner,
        features,
        padded,
        tiles,
        *x.stride(),
    )

    open_rows = x.new_empty((rows,), dtype=torch.int64)
    open_count = x.new_zeros((1,), dtype=torch.int32)
    _finish(x.dtype, codebook.dtype).launch(
        (cdiv(rows, _FINISH_ROWS),),
        x,
        codebook,
        squares.amax(),
        best_score,
        next_score,
        best_group,
        segments,
        position,
        sq_dist,
        open_rows,
        open_count,
        rows,
        inner,
        num_codes,
        features,
        shares,
        *x.stride(),
        *codebook.stride(),
    )

    programs = _RESCUE_PROGRAMS * processors(x)
    parts = _RESCUE_ROWS * max(cdiv(rows, _RESCUE_ROWS), programs)
    part_dist = x.new_empty((parts,), dtype=torch.float64)
    part_position = x.new_empty((parts,), dtype=torch.float32)
    part_segment = x.new_empty((parts,), dtype=torch.int32)
    _rescue(x.dtype, searched).launch(
        (programs,),
        x,
        starts,
        ends,
        half_norms,
        open_rows,
        open_count,
        part_dist,
        part_position,
        part_segment,
        inner,
        features,
        padded,
        tiles,
        *x.stride(),
    )
    _MERGE.launch(
        (cdiv(rows, _MERGE_ROWS),),
        open_rows,
        open_count,
        part_dist,
        part_position,
        part_segment,
        segments,
        position,
        sq_dist,
        programs,
        tiles,
    )
