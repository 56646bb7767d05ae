"""The backward of `straight_through` in Triton: one row kernel, and sums by code.

Sums are made by atomics, or in a fixed order over rows sorted by code, as those of `directional_backward`.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import TYPES, Configuration, on_device_of
from vqkernels.kernels._directions import any_not_finite, inverse_of, power_of
from vqkernels.kernels._rows import grid_of, load_each, load_rows, store_rows, tile_of, tile_rows
from vqkernels.kernels._segments import key_dtype, segment_sums
from vqkernels.kernels.directional_backward import MOST_ATOMICS, add_to_codes

# of |x/|x| + c/|c||^2: below it x and c are antiparallel
_OPPOSITE = tl.constexpr(2.0**-36)
# what becomes of a gradient: nothing, atomics, or keys for sums in a fixed order
_NONE = tl.constexpr(0)
_ATOMIC = tl.constexpr(1)
_SORTED = tl.constexpr(2)


@triton.jit
def _turned(g, x, c):
    """rho R^T g of rows; g where x = 0, and 0 where c = 0."""
    # powers of two bring every row near 1: what is left of the range is that of the result
    x_power, c_power, g_power = power_of(x), power_of(c), power_of(g)
    x, c, g_near = x * x_power[:, None], c * c_power[:, None], g * g_power[:, None]
    x_square, c_square = tl.sum(x * x, axis=1), tl.sum(c * c, axis=1)
    x_norm, c_norm = tl.sqrt(x_square), tl.sqrt(c_square)
    u = x * tl.where(x_norm > 0, 1.0 / x_norm, 0.0)[:, None]
    v = c * tl.where(c_norm > 0, 1.0 / c_norm, 0.0)[:, None]
    s = u + v
    square = tl.sum(s * s, axis=1)
    g_s, g_u, g_v = tl.sum(g_near * s, axis=1), tl.sum(g_near * u, axis=1), tl.sum(g_near * v, axis=1)
    opposite = square <= _OPPOSITE
    along_s = tl.where(opposite, 0.0, 2.0 * g_s / square)
    along_u = tl.where(opposite, -2.0 * g_u, 2.0 * g_v)
    turned = g_near - along_s[:, None] * s + along_u[:, None] * u
    rho = (c_norm / x_norm) * (x_power * inverse_of(c_power))
    turned = (turned * inverse_of(g_power)[:, None]) * rho[:, None]
    turned = tl.where((c_norm == 0.0)[:, None], 0.0, turned)
    return tl.where((x_norm == 0.0)[:, None], g, turned)


@triton.jit(do_not_specialize=["outer", "num_codes"])
def _straight_through_backward(
    grad,
    pull,
    x,
    codes,
    indices,
    grad_x,
    sums,
    keys,
    outer,
    inner,
    num_codes,
    features,
    commitment,
    codebook_weight,
    sync,
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
    ROTATION: tl.constexpr,
    NEED_X: tl.constexpr,
    SUMS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dx, and either dL/dcodes by atomics or each row's key, K for rows that count for nothing."""
    plane, begin, at, live = tile_rows(outer, inner, EVEN, BLOCK_N)
    rows = (plane * inner + begin) + at
    column = tl.arange(0, BLOCK_D)
    start = x + (plane * x_outer + begin * x_inner) + at * x_inner
    value = load_rows(start, live, column, features, x_feature, EVEN)
    start = grad + (plane * grad_outer + begin * grad_inner) + at * grad_inner
    g = load_rows(start, live, column, features, grad_feature, EVEN)
    index = load_each(indices + rows, live, EVEN)
    alive = (index >= 0) & (index < num_codes)
    index = tl.where(alive, index, 0)
    code = load_rows(codes + index * stride_code, live, column, features, stride_feature, EVEN)
    strength = tl.load(pull).to(tl.float32)
    bad = any_not_finite(value)
    e = code - value
    if NEED_X:
        left = g
        if ROTATION:
            left = _turned(g, value, code)
        left -= (commitment * strength) * e
        left += tl.where(bad == 1, float("nan"), 0.0)[:, None]
        left = tl.where(alive[:, None], left, 0.0)
        out = grad_x + (plane * out_outer + begin * out_inner) + at * out_inner
        store_rows(out, left, live, column, features, out_feature, EVEN)
    good = live & alive & (bad == 0)
    if SUMS == _ATOMIC:
        own = (codebook_weight * strength) * e + sync * g
        add_to_codes(sums + index * features, own, good, column, features)
    if SUMS == _SORTED:
        tl.store(keys + rows, tl.where(good, index, num_codes).to(keys.dtype.element_ty), mask=live)


@functools.cache
def _form(
    grad: torch.dtype,
    x: torch.dtype,
    codes: torch.dtype,
    keys: torch.dtype | None,
    rotation: bool,
    features: int,
    strided: bool = False,
    need_x: bool = True,
    need_codebook: bool = True,
) -> Configuration:
    tile = tile_of(features, 2 if rotation else 1, strided)
    near, far = ("grad_inner", "x_inner", "out_inner"), ("grad_feature", "x_feature", "out_feature")
    ones, multiples = (near, far) if strided else (far, near)
    return Configuration(
        name=f"straight_through_backward_{TYPES[grad]}_{TYPES[x]}_{TYPES[codes]}_{int(rotation)}_d{tile.features}"
        f"{'' if tile.even else '_masked'}{'_strided' if strided else ''}"
        f"{'_frozen' if not need_codebook else '_atomic' if keys is None else ''}{'' if need_x else '_codes'}",
        kernel=_straight_through_backward,
        constants={
            "ROTATION": rotation,
            "NEED_X": need_x,
            "SUMS": 0 if not need_codebook else 1 if keys is None else 2,
            "EVEN": tile.even,
            "BLOCK_N": tile.rows,
            "BLOCK_D": tile.features,
        },
        types={
            "grad": f"*{TYPES[grad]}",
            "pull": "*fp32",
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "indices": "*i64",
            "grad_x": f"*{TYPES[x]}",
            "sums": "*fp32",
            "keys": "*i16" if keys == torch.int16 else "*i32",
            "commitment": "fp32",
            "codebook_weight": "fp32",
            "sync": "fp32",
        },
        ones=(*ones, "stride_feature"),
        multiples=(*multiples, "inner", "features", "grad_outer", "x_outer", "out_outer", "stride_code"),
        warps=tile.warps,
    )


def configurations() -> list[Configuration]:
    """The forms in which this kernel is launched; other dtypes and block sizes compile to the like."""
    half, single, narrow, wide = torch.bfloat16, torch.float32, torch.int16, torch.int32
    return [
        _form(half, half, single, None, False, 64),
        _form(half, half, single, narrow, True, 512),
        _form(single, single, single, None, True, 256),
        _form(half, half, half, wide, False, 1000),
        _form(single, single, single, narrow, True, 7),
        _form(half, half, single, narrow, False, 256, True),
        _form(single, single, single, None, True, 64, need_codebook=False),
        _form(single, single, single, narrow, False, 64, need_x=False),
    ]


def launch(
    grad: Tensor,
    pull: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    rotation: bool,
    commitment: float,
    codebook_weight: float,
    sync: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """dL/dx in the strides of `empty_like(x)` and dL/dcodebook in the codebook's dtype; empty where not needed."""
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    num_codes, features, rows = *codebook.shape, indices.numel()
    if not rows or not (need_x or need_codebook):
        return grad_x, codebook.new_zeros(codebook.shape if need_codebook else 0)
    atomic = x.numel() <= MOST_ATOMICS and not torch.are_deterministic_algorithms_enabled()
    sums = x.new_zeros((num_codes, features) if need_codebook and atomic else (1,), dtype=torch.float32)
    keys = x.new_empty((rows if need_codebook and not atomic else 1,), dtype=key_dtype(num_codes))
    form = _form(
        grad.dtype,
        x.dtype,
        codebook.dtype,
        None if atomic else keys.dtype,
        rotation and need_x,
        features,
        x.stride(-1) != 1 and features > 1,
        need_x,
        need_codebook,
    )
    with on_device_of(x):
        form.launch(
            grid_of(x.shape[0], x.shape[1], form.constants["BLOCK_N"]),
            grad,
            pull,
            x,
            codebook,
            indices.contiguous(),
            grad_x,
            sums,
            keys,
            *x.shape[:2],
            num_codes,
            features,
            commitment,
            codebook_weight,
            sync,
            *grad.stride(),
            *x.stride(),
            *(grad_x.stride() if need_x else (0, 0, 0)),
            *codebook.stride(),
        )
        if need_codebook and not atomic:
            keys, order = torch.sort(keys, stable=True)
            sums = _sorted_sums(grad, pull, x, codebook, order, keys, codebook_weight, sync)
    return grad_x, sums.to(codebook.dtype) if need_codebook else codebook.new_empty(0)


def _sorted_sums(
    grad: Tensor,
    pull: Tensor,
    x: Tensor,
    codebook: Tensor,
    order: Tensor,
    keys: Tensor,
    codebook_weight: float,
    sync: float,
) -> Tensor:
    """dL/dcodebook (K, D) float32 from rows sorted by code."""
    num_codes, rows = len(codebook), len(order)
    if sync != 0:
        upstream = sync * segment_sums(grad, None, None, order, keys, num_codes)
        if codebook_weight == 0:
            return upstream
    factors = pull.new_ones((2, rows), dtype=torch.float32)
    factors[1] = codebook_weight * pull
    total = segment_sums(x, codebook, factors, order, keys, num_codes)
    return total if sync == 0 else total + upstream
