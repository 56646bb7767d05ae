"""The directional reparameterization, forward, in Triton: gather, direction, noise and z in one kernel."""

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
    on_device_of,
    row_offsets,
)
from vqkernels.kernels._directions import DETACH, any_not_finite, direction, load_rows, wide_sum
from vqkernels.kernels._noise import FIRST, SECOND

_LARGEST_BLOCK = 512
# elements of a tile: what 128 threads hold in registers
_TILE = 1 << 16 if INTERPRETED else 1 << 11
# of noise_std: beyond it the noise alone gives the direction, and float32 arithmetic has room to spare
LARGEST_NOISE = 1e34


@triton.jit(do_not_specialize=["num_rows", "inner", "last", "row_offset"])
def _directional(
    x,
    codes,
    indices,
    position,
    seed,
    z,
    num_rows,
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
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    column = tl.arange(0, BLOCK_D)
    index = tl.load(indices + rows, mask=live, other=0)
    alive = (index >= 0) & (index <= last)
    index = tl.where(alive, index, 0)
    weight = tl.zeros((BLOCK_N,), tl.float32)
    if POINTS == 2:
        weight = tl.load(position + rows, mask=live, other=0.0).to(tl.float32)
    key = tl.load(seed)
    number = rows + row_offset
    x_start = x + row_offsets(rows, inner, x_outer, x_inner)
    z_start = z + row_offsets(rows, inner, z_outer, z_inner)

    if WHOLE:
        mask = live[:, None] & (column < features)[None, :]
        value = load_rows(x_start, column, x_feature, mask)
        bad = any_not_finite(value)
        point, e, w = direction(
            value, codes, index, key, number, 0, column, mask, noise_std, stride_code, stride_feature,
            FIRST, DIRECTION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        factor = _factor(wide_sum(e, e), wide_sum(w, w), 1.0 - weight)
        moved = _moved(value, point, w, factor, 1.0 - weight, DIRECTION)
        if POINTS == 2:
            point, e, w = direction(
                value, codes, index + 1, key, number, 0, column, mask, noise_std, stride_code, stride_feature,
                SECOND, DIRECTION, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            factor = _factor(wide_sum(e, e), wide_sum(w, w), weight)
            moved += _moved(0.0, point, w, factor, weight, DIRECTION)
        store_rows(z_start, column, z_feature, moved, bad, alive, mask)
    else:
        bad = tl.zeros((BLOCK_N,), tl.int32)
        e_square = tl.zeros((BLOCK_N,), tl.float64)
        w_square = tl.zeros((BLOCK_N,), tl.float64)
        e_square_2 = tl.zeros((BLOCK_N,), tl.float64)
        w_square_2 = tl.zeros((BLOCK_N,), tl.float64)
        for first in range(0, features, BLOCK_D):
            feature = first + column
            mask = live[:, None] & (feature < features)[None, :]
            value = load_rows(x_start, feature, x_feature, mask)
            bad = tl.maximum(bad, any_not_finite(value))
            if DIRECTION != DETACH:
                point, e, w = direction(
                    value, codes, index, key, number, first, feature, mask, noise_std, stride_code,
                    stride_feature, FIRST, DIRECTION, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                e_square += wide_sum(e, e)
                w_square += wide_sum(w, w)
                if POINTS == 2:
                    point, e, w = direction(
                        value, codes, index + 1, key, number, first, feature, mask, noise_std, stride_code,
                        stride_feature, SECOND, DIRECTION, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                    e_square_2 += wide_sum(e, e)
                    w_square_2 += wide_sum(w, w)
        factor = _factor(e_square, w_square, 1.0 - weight)
        factor_2 = _factor(e_square_2, w_square_2, weight)
        for first in range(0, features, BLOCK_D):
            feature = first + column
            mask = live[:, None] & (feature < features)[None, :]
            value = load_rows(x_start, feature, x_feature, mask)
            point, e, w = direction(
                value, codes, index, key, number, first, feature, mask, noise_std, stride_code,
                stride_feature, FIRST, DIRECTION, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            moved = _moved(value, point, w, factor, 1.0 - weight, DIRECTION)
            if POINTS == 2:
                point, e, w = direction(
                    value, codes, index + 1, key, number, first, feature, mask, noise_std, stride_code,
                    stride_feature, SECOND, DIRECTION, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                moved += _moved(0.0, point, w, factor_2, weight, DIRECTION)
            store_rows(z_start, feature, z_feature, moved, bad, alive, mask)


@triton.jit
def _factor(e_square, w_square, weight):
    # a distance that is nan stays nan, a vector of length 0 moves nothing
    length = tl.sqrt(w_square).to(tl.float32)
    return weight * tl.sqrt(e_square).to(tl.float32) * tl.where(length > 0, 1.0 / length, 0.0)


@triton.jit
def _moved(value, point, w, factor, weight, DIRECTION: tl.constexpr):
    if DIRECTION == DETACH:
        return weight[:, None] * point
    else:
        return value + factor[:, None] * w


@triton.jit
def store_rows(start, feature, stride_feature, moved, bad, alive, mask):
    """Store a tile: NaN for rows with a NaN or Inf, 0 for rows whose index is out of range."""
    moved = tl.where(bad[:, None] == 0, moved, float("nan"))
    moved = tl.where(alive[:, None], moved, 0.0)
    at = start[:, None] + feature.to(tl.int64)[None, :] * stride_feature
    tl.store(at, moved.to(start.dtype.element_ty), mask=mask)


def tile_of(features: int) -> tuple[int, int]:
    """Rows and features of a tile."""
    block = feature_block(features, _LARGEST_BLOCK)
    # the loop over blocks keeps more sums
    tile = _TILE if features <= block else _TILE // 2
    return max(1, tile // block), block


def _form(
    x: torch.dtype, codes: torch.dtype, position: torch.dtype | None, direction: int, features: int
) -> Configuration:
    block_n, block_d = tile_of(features)
    whole, points = features <= block_d, 1 if position is None else 2
    return Configuration(
        name=f"directional_{TYPES[x]}_{TYPES[codes]}_{direction}_{points}_d{block_d}"
        f"{'' if whole else '_loop'}",
        kernel=_directional,
        constants={
            "DIRECTION": direction,
            "POINTS": points,
            "WHOLE": whole,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
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
        ones=("x_feature", "z_feature", "stride_feature"),
        multiples=("features", "x_inner", "x_outer", "z_inner", "z_outer", "stride_code"),
    )


def configurations() -> list[Configuration]:
    """The forms in which this kernel is launched; other dtypes and block sizes compile to the like."""
    half, single = torch.bfloat16, torch.float32
    return [
        _form(half, single, None, 0, 64),
        _form(single, single, single, 0, 256),
        _form(single, single, single, 0, 1024),
        _form(single, single, None, 1, 1024),
        _form(half, half, single, 1, 64),
        _form(single, single, None, 2, 16),
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
    form = _form(
        x.dtype, codebook.dtype, None if position is None else position.dtype, direction, x.shape[-1]
    )
    with on_device_of(x):
        form.launch(
            (triton.cdiv(indices.numel(), form.constants["BLOCK_N"]),),
            x,
            codebook,
            indices.contiguous(),
            x if position is None else position.contiguous(),
            seed,
            z,
            indices.numel(),
            x.shape[1],
            len(codebook) - (1 if position is None else 2),
            x.shape[-1],
            min(noise_std, LARGEST_NOISE),
            row_offset,
            *x.stride(),
            *z.stride(),
            *codebook.stride(),
        )
    return z
