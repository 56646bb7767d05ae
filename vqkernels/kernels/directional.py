"""The directional reparameterization, forward, in Triton: gather, direction, noise and z in one kernel."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import TYPES, Configuration, on_device_of
from vqkernels.kernels._directions import DETACH, any_not_finite, direction, step
from vqkernels.kernels._noise import FIRST, SECOND
from vqkernels.kernels._rows import grid_of, load_each, load_rows, store_rows, tile_of, tile_rows

# of noise_std: beyond it the noise alone gives the direction, and float32 arithmetic has room to spare
LARGEST_NOISE = 1e34


@triton.jit(do_not_specialize=["outer", "last", "row_offset"])
def _directional(
    x,
    codes,
    indices,
    position,
    seed,
    z,
    outer,
    inner,
    last,
    features,
    noise_std,
    row_offset,
    x_outer,
    x_inner,
    x_feature,
    z_outer,
    z_inner,
    z_feature,
    stride_code,
    stride_feature,
    DIRECTION: tl.constexpr,
    POINTS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    plane, first, at, live = tile_rows(outer, inner, EVEN, BLOCK_N)
    rows = (plane * inner + first) + at
    column = tl.arange(0, BLOCK_D)
    value = load_rows(
        x + (plane * x_outer + first * x_inner) + at * x_inner, live, column, features, x_feature, EVEN
    )
    index = load_each(indices + rows, live, EVEN)
    alive = (index >= 0) & (index <= last)
    start = codes + tl.where(alive, index, 0) * stride_code
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if POINTS == 2:
        second = load_each(position + rows, live, EVEN).to(tl.float32)
        weight = 1.0 - second
    key = tl.load(seed)
    number = rows + row_offset
    point = load_rows(start, live, column, features, stride_feature, EVEN)
    if DIRECTION == DETACH:
        weight = tl.where(any_not_finite(value) == 1, float("nan"), weight)
        moved = weight[:, None] * point
        if POINTS == 2:
            point = load_rows(start + stride_code, live, column, features, stride_feature, EVEN)
            moved += second[:, None] * point
        moved = tl.where(alive[:, None], moved, 0.0)
    else:
        e = point - value
        w = direction(e, key, number, features, noise_std, FIRST, DIRECTION, EVEN, BLOCK_N, BLOCK_D)
        moved, w, factor = step(value, e, w, weight, live, alive)
        moved += factor[:, None] * w
        if POINTS == 2:
            point = load_rows(start + stride_code, live, column, features, stride_feature, EVEN)
            e = point - value
            w = direction(e, key, number, features, noise_std, SECOND, DIRECTION, EVEN, BLOCK_N, BLOCK_D)
            _, w, factor = step(value, e, w, second, live, alive)
            moved += factor[:, None] * w
    out = z + (plane * z_outer + first * z_inner) + at * z_inner
    store_rows(out, moved, live, column, features, z_feature, EVEN)


@functools.cache
def _form(
    x: torch.dtype,
    codes: torch.dtype,
    position: torch.dtype | None,
    direction: int,
    features: int,
    strided: bool = False,
) -> Configuration:
    points = 1 if position is None else 2
    tile = tile_of(features, points, strided)
    rows_are_near = ("x_inner", "z_inner"), ("x_feature", "z_feature")
    ones, multiples = rows_are_near if strided else rows_are_near[::-1]
    return Configuration(
        name=f"directional_{TYPES[x]}_{TYPES[codes]}_{direction}_{points}_d{tile.features}"
        f"{'' if tile.even else '_masked'}{'_strided' if strided else ''}",
        kernel=_directional,
        constants={
            "DIRECTION": direction,
            "POINTS": points,
            "EVEN": tile.even,
            "BLOCK_N": tile.rows,
            "BLOCK_D": tile.features,
        },
        types={
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "indices": "*i64",
            "position": "*fp32" if position is None else f"*{TYPES[position]}",
            "seed": "*i64",
            "z": f"*{TYPES[x]}",
            "noise_std": "fp32",
        },
        ones=(*ones, "stride_feature"),
        multiples=(*multiples, "inner", "features", "x_outer", "z_outer", "stride_code"),
        warps=tile.warps,
    )


def configurations() -> list[Configuration]:
    """The forms in which this kernel is launched; other dtypes and block sizes compile to the like."""
    half, single = torch.bfloat16, torch.float32
    return [
        _form(half, single, None, 0, 64),
        _form(half, single, None, 0, 512),
        _form(single, single, None, 0, 64),
        _form(single, single, single, 0, 256),
        _form(half, half, single, 0, 1000),
        _form(half, single, single, 0, 48),
        _form(single, single, None, 1, 4096),
        _form(half, half, single, 1, 64),
        _form(single, single, None, 2, 7),
        _form(half, single, None, 0, 256, True),
        _form(single, single, single, 0, 512, True),
    ]


def launch(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    position: Tensor | None,
    seed: Tensor,
    direction: int,
    noise_std: float,
    row_offset: int,
) -> Tensor:
    """z of (B, M, D) rows, in the dtype and the strides of `empty_like(x)`."""
    z = torch.empty_like(x)
    if not x.numel():
        return z
    kind = None if position is None else position.dtype
    form = _form(x.dtype, codebook.dtype, kind, direction, x.shape[-1], x.stride(-1) != 1 and x.shape[-1] > 1)
    with on_device_of(x):
        form.launch(
            grid_of(x.shape[0], x.shape[1], form.constants["BLOCK_N"]),
            x,
            codebook,
            indices.contiguous(),
            x if position is None else position.contiguous(),
            seed,
            z,
            *x.shape[:2],
            len(codebook) - (1 if position is None else 2),
            x.shape[-1],
            min(noise_std, LARGEST_NOISE),
            row_offset,
            *x.stride(),
            *z.stride(),
            *codebook.stride(),
        )
    return z
