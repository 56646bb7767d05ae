"""The directional reparameterization, backward, in Triton: one row kernel that draws the noise again.

The gradient of the codebook is added up by atomics or, where these would be slow or torch forbids them, by sums in
a fixed order over rows sorted by code.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import TYPES, Configuration, on_device_of
from vqkernels.kernels._directions import direction, pull, pulled
from vqkernels.kernels._noise import FIRST, SECOND
from vqkernels.kernels._rows import grid_of, load_each, load_rows, store_rows, tile_of, tile_rows
from vqkernels.kernels._segments import key_dtype, segment_form, segment_sums
from vqkernels.kernels.directional import LARGEST_NOISE

# elements of x up to which sums are made by atomics: fewer are added in some 60 us at 73 G additions per second,
# about what a sort and the walks along its result take to start; more of them, or hot codes, would take longer
MOST_ATOMICS = 1 << 22


@triton.jit(do_not_specialize=["outer", "num_codes", "row_offset"])
def _directional_backward(
    grad,
    x,
    codes,
    indices,
    position,
    seed,
    grad_x,
    sums,
    keys,
    factors,
    outer,
    inner,
    num_codes,
    features,
    noise_std,
    row_offset,
    grad_outer,
    grad_inner,
    grad_feature,
    x_outer,
    x_inner,
    x_feature,
    out_outer,
    out_inner,
    out_feature,
    stride_code,
    stride_feature,
    DIRECTION: tl.constexpr,
    POINTS: tl.constexpr,
    ATOMIC: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dx, and either dL/dcodes by atomics or, per row, what the sums in a fixed order need."""
    plane, begin, at, live = tile_rows(outer, inner, EVEN, BLOCK_N)
    rows = (plane * inner + begin) + at
    column = tl.arange(0, BLOCK_D)
    value = load_rows(
        x + (plane * x_outer + begin * x_inner) + at * x_inner, live, column, features, x_feature, EVEN
    )
    g = load_rows(
        grad + (plane * grad_outer + begin * grad_inner) + at * grad_inner,
        live,
        column,
        features,
        grad_feature,
        EVEN,
    )
    index = load_each(indices + rows, live, EVEN)
    alive = (index >= 0) & (index <= num_codes - POINTS)
    index = tl.where(alive, index, 0)
    start = codes + index * stride_code
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if POINTS == 2:
        weight_2 = load_each(position + rows, live, EVEN).to(tl.float32)
        weight = 1.0 - weight_2
    key = tl.load(seed)
    number = rows + row_offset

    e = load_rows(start, live, column, features, stride_feature, EVEN) - value
    w = direction(e, key, number, features, noise_std, FIRST, DIRECTION, EVEN, BLOCK_N, BLOCK_D)
    left, first, second, bad = pull(value, g, e, w, weight, live, alive)
    h = pulled(e, first, second)
    left -= h
    if ATOMIC:
        good = live & alive & (bad == 0)
        add_to_codes(sums + index * features, h, good, column, features)
    if POINTS == 2:
        e = load_rows(start + stride_code, live, column, features, stride_feature, EVEN) - value
        w = direction(e, key, number, features, noise_std, SECOND, DIRECTION, EVEN, BLOCK_N, BLOCK_D)
        _, first_2, second_2, _ = pull(value, g, e, w, weight_2, live, alive)
        h = pulled(e, first_2, second_2)
        left -= h
        if ATOMIC:
            add_to_codes(sums + (index + 1) * features, h, good, column, features)
    out = grad_x + (plane * out_outer + begin * out_inner) + at * out_inner
    store_rows(out, left, live, column, features, out_feature, EVEN)
    if not ATOMIC:
        total = outer.to(tl.int64) * inner
        counted = tl.where(alive & (bad == 0), index, num_codes)
        tl.store(keys + rows, counted.to(keys.dtype.element_ty), mask=live)
        tl.store(factors + rows, first, mask=live)
        tl.store(factors + total + rows, second, mask=live)
        if POINTS == 2:
            tl.store(factors + 2 * total + rows, first_2, mask=live)
            tl.store(factors + 3 * total + rows, second_2, mask=live)


@triton.jit
def add_to_codes(start, h, good, feature, features):
    """Add rows h to those that begin at `start`, where they are good."""
    mask = good[:, None] & (feature < features)[None, :]
    tl.atomic_add(start[:, None] + feature[None, :], h, mask=mask, sem="relaxed")


@functools.cache
def _form(
    grad: torch.dtype,
    x: torch.dtype,
    codes: torch.dtype,
    position: torch.dtype | None,
    keys: torch.dtype | None,
    direction: int,
    features: int,
    strided: bool = False,
) -> Configuration:
    points = 1 if position is None else 2
    tile = tile_of(features, points, strided)
    near, far = ("grad_inner", "x_inner", "out_inner"), ("grad_feature", "x_feature", "out_feature")
    ones, multiples = (near, far) if strided else (far, near)
    return Configuration(
        name=f"directional_backward_{TYPES[grad]}_{TYPES[x]}_{TYPES[codes]}_{direction}_{points}_d{tile.features}"
        f"{'' if tile.even else '_masked'}{'_strided' if strided else ''}{'_atomic' if keys is None else ''}",
        kernel=_directional_backward,
        constants={
            "DIRECTION": direction,
            "POINTS": points,
            "ATOMIC": keys is None,
            "EVEN": tile.even,
            "BLOCK_N": tile.rows,
            "BLOCK_D": tile.features,
        },
        types={
            "grad": f"*{TYPES[grad]}",
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "indices": "*i64",
            "position": "*fp32" if position is None else f"*{TYPES[position]}",
            "seed": "*i64",
            "grad_x": f"*{TYPES[x]}",
            "sums": "*fp32",
            "keys": "*i16" if keys == torch.int16 else "*i32",
            "factors": "*fp32",
            "noise_std": "fp32",
        },
        ones=(*ones, "stride_feature"),
        multiples=(*multiples, "inner", "features", "grad_outer", "x_outer", "out_outer", "stride_code"),
        warps=tile.warps,
    )


def configurations() -> list[Configuration]:
    """The forms in which these kernels are launched; other dtypes and block sizes compile to the like."""
    half, single, narrow, wide = torch.bfloat16, torch.float32, torch.int16, torch.int32
    return [
        _form(half, half, single, None, None, 0, 64),
        _form(half, half, single, None, narrow, 0, 512),
        _form(single, single, single, single, None, 0, 256),
        _form(half, half, half, single, wide, 0, 1000),
        _form(single, single, single, single, narrow, 1, 256),
        _form(single, single, single, None, None, 2, 7),
        _form(half, half, single, None, narrow, 0, 256, True),
        _form(single, single, single, single, narrow, 0, 512, True),
        segment_form(half, single, narrow, 1, 512),
        segment_form(single, single, wide, 2, 256),
        segment_form(single, single, wide, 1, 64, parts=True),
        segment_form(single, single, wide, 2, 256, parts=True),
    ]


def launch(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    position: Tensor | None,
    seed: Tensor,
    direction: int,
    noise_std: float,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """dL/dx in the strides of `empty_like(x)` and dL/dcodebook in the codebook's dtype."""
    grad_x = torch.empty_like(x)
    num_codes, features, rows = *codebook.shape, indices.numel()
    if not rows:
        return grad_x, codebook.new_zeros(codebook.shape)
    atomic = x.numel() <= MOST_ATOMICS and not torch.are_deterministic_algorithms_enabled()
    points = 1 if position is None else 2
    sums = x.new_zeros((num_codes, features) if atomic else (1,), dtype=torch.float32)
    keys = x.new_empty((1 if atomic else rows,), dtype=key_dtype(num_codes))
    factors = sums.new_empty((2 * points, 1 if atomic else rows))
    form = _form(
        grad.dtype,
        x.dtype,
        codebook.dtype,
        None if position is None else position.dtype,
        None if atomic else keys.dtype,
        direction,
        features,
        x.stride(-1) != 1 and features > 1,
    )
    with on_device_of(x):
        form.launch(
            grid_of(x.shape[0], x.shape[1], form.constants["BLOCK_N"]),
            grad,
            x,
            codebook,
            indices.contiguous(),
            x if position is None else position.contiguous(),
            seed,
            grad_x,
            sums,
            keys,
            factors,
            *x.shape[:2],
            num_codes,
            features,
            min(noise_std, LARGEST_NOISE),
            row_offset,
            *grad.stride(),
            *x.stride(),
            *grad_x.stride(),
            *codebook.stride(),
        )
        if not atomic:
            keys, order = torch.sort(keys, stable=True)
            sums = segment_sums(x, codebook, factors, order, keys, num_codes)
    return grad_x, sums.to(codebook.dtype)
