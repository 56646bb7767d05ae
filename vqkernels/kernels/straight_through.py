"""The code in place of each row and the squared error, in Triton: one kernel that reads x once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import TYPES, Configuration, on_device_of
from vqkernels.kernels._directions import any_not_finite
from vqkernels.kernels._rows import grid_of, load_each, load_rows, store_rows, tile_of, tile_rows


@triton.jit(do_not_specialize=["outer", "num_codes"])
def _straight_through(
    x,
    codes,
    indices,
    z,
    sq_dist,
    parts,
    outer,
    inner,
    num_codes,
    features,
    x_outer,
    x_inner,
    x_feature,
    z_outer,
    z_inner,
    z_feature,
    stride_code,
    stride_feature,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z and |x - c|^2 of each row, and per program the sum of these and the number of rows that have one."""
    plane, first, at, live = tile_rows(outer, inner, EVEN, BLOCK_N)
    rows = (plane * inner + first) + at
    column = tl.arange(0, BLOCK_D)
    start = x + (plane * x_outer + first * x_inner) + at * x_inner
    value = load_rows(start, live, column, features, x_feature, EVEN)
    index = load_each(indices + rows, live, EVEN)
    alive = (index >= 0) & (index < num_codes)
    start = codes + tl.where(alive, index, 0) * stride_code
    code = load_rows(start, live, column, features, stride_feature, EVEN)
    e = code - value
    # 0 in rows that count, NaN in rows with a NaN or Inf
    mark = tl.where(any_not_finite(value) == 1, float("nan"), 0.0)
    square = tl.where(alive, tl.sum(e * e, axis=1) + mark, 0.0)
    moved = tl.where(alive[:, None], code + mark[:, None], 0.0)
    out = z + (plane * z_outer + first * z_inner) + at * z_inner
    store_rows(out, moved, live, column, features, z_feature, EVEN)
    tl.store(sq_dist + rows, square, mask=live)
    counted = live & alive & (mark == 0.0)
    number = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(
        0
    )
    part = parts + number.to(tl.int64) * 2
    tl.store(part, tl.sum(tl.where(counted, square, 0.0), axis=0))
    tl.store(part + 1, tl.sum(tl.where(counted, 1.0, 0.0), axis=0))


@functools.cache
def _form(x: torch.dtype, codes: torch.dtype, features: int, strided: bool = False) -> Configuration:
    tile = tile_of(features, strided=strided)
    rows_are_near = ("x_inner", "z_inner"), ("x_feature", "z_feature")
    ones, multiples = rows_are_near if strided else rows_are_near[::-1]
    return Configuration(
        name=f"straight_through_{TYPES[x]}_{TYPES[codes]}_d{tile.features}"
        f"{'' if tile.even else '_masked'}{'_strided' if strided else ''}",
        kernel=_straight_through,
        constants={"EVEN": tile.even, "BLOCK_N": tile.rows, "BLOCK_D": tile.features},
        types={
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "indices": "*i64",
            "z": f"*{TYPES[x]}",
            "sq_dist": "*fp32",
            "parts": "*fp32",
        },
        ones=(*ones, "stride_feature"),
        multiples=(*multiples, "inner", "features", "x_outer", "z_outer", "stride_code"),
        warps=tile.warps,
    )


def configurations() -> list[Configuration]:
    """The forms in which this kernel is launched; other dtypes and block sizes compile to the like."""
    half, single = torch.bfloat16, torch.float32
    return [
        _form(half, single, 64),
        _form(single, single, 256),
        _form(half, half, 1000),
        _form(single, single, 7),
        _form(half, single, 256, True),
    ]


def launch(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z in the strides of `empty_like(x)`, squared distances (B, M), their sum and number (2,) float64."""
    z, sq_dist = torch.empty_like(x), x.new_empty(indices.shape, dtype=torch.float32)
    if not x.numel():
        return z, sq_dist, x.new_zeros(2, dtype=torch.float64)
    form = _form(x.dtype, codebook.dtype, x.shape[-1], x.stride(-1) != 1 and x.shape[-1] > 1)
    grid = grid_of(x.shape[0], x.shape[1], form.constants["BLOCK_N"])
    parts = sq_dist.new_empty(grid[0] * grid[1] * grid[2], 2)
    with on_device_of(x):
        form.launch(
            grid,
            x,
            codebook,
            indices.contiguous(),
            z,
            sq_dist,
            parts,
            *x.shape[:2],
            len(codebook),
            x.shape[-1],
            *x.stride(),
            *z.stride(),
            *codebook.stride(),
        )
    return z, sq_dist, parts.sum(0, dtype=torch.float64)
