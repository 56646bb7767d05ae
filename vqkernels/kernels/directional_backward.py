"""The directional reparameterization, backward, in Triton: one kernel that draws the noise again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import TYPES, Configuration, on_device_of, row_offsets
from vqkernels.kernels._directions import any_not_finite, direction, load_rows, pulled, wide_sum
from vqkernels.kernels._noise import FIRST, SECOND
from vqkernels.kernels._segments import segment_form, segment_sums, segments
from vqkernels.kernels.directional import LARGEST_NOISE, store_rows, tile_of


@triton.jit
def _strength(w_square, g_w, weight):
    """weight (g . u) of each row, 0 for a zero direction."""
    length = tl.sqrt(w_square)
    return tl.where(length > 0, weight * (g_w / length).to(tl.float32), 0.0)


@triton.jit
def _add_to_codes(sums, index, feature, features, h, good, mask):
    at = sums + index[:, None] * features + feature[None, :]
    tl.atomic_add(at, h, mask=mask & good[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes", "row_offset"])
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
    strengths,
    distances,
    num_rows,
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
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dx, and either dL/dcodes by atomics or, per row, what the sums in a fixed order need."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    column = tl.arange(0, BLOCK_D)
    index = tl.load(indices + rows, mask=live, other=-1)
    alive = (index >= 0) & (index <= num_codes - POINTS)
    index = tl.where(alive, index, 0)
    weight = tl.zeros((BLOCK_N,), tl.float32)
    if POINTS == 2:
        weight = tl.load(position + rows, mask=live, other=0.0).to(tl.float32)
    key = tl.load(seed)
    number = rows + row_offset
    x_start = x + row_offsets(rows, inner, x_outer, x_inner)
    g_start = grad + row_offsets(rows, inner, grad_outer, grad_inner)
    out_start = grad_x + row_offsets(rows, inner, out_outer, out_inner)

    if WHOLE:
        mask = live[:, None] & (column < features)[None, :]
        value = load_rows(x_start, column, x_feature, mask)
        g = load_rows(g_start, column, grad_feature, mask)
        bad = any_not_finite(value)
        good = alive & (bad == 0)
        _, e, w = direction(
            value, codes, index, key, number, 0, column, mask, noise_std, stride_code, stride_feature,
            FIRST, DIRECTION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        strength = _strength(wide_sum(w, w), wide_sum(g, w), 1.0 - weight)
        distance = tl.sqrt(wide_sum(e, e)).to(tl.float32)
        h = pulled(e, strength, distance)
        left = g - h
        if ATOMIC:
            _add_to_codes(sums, index, column, features, h, good, mask)
        if POINTS == 2:
            _, e, w = direction(
                value, codes, index + 1, key, number, 0, column, mask, noise_std, stride_code, stride_feature,
                SECOND, DIRECTION, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            strength_2 = _strength(wide_sum(w, w), wide_sum(g, w), weight)
            distance_2 = tl.sqrt(wide_sum(e, e)).to(tl.float32)
            h = pulled(e, strength_2, distance_2)
            left = left - h
            if ATOMIC:
                _add_to_codes(sums, index + 1, column, features, h, good, mask)
        else:
            strength_2 = strength
            distance_2 = distance
        store_rows(out_start, column, out_feature, left, bad, alive, mask)
    else:
        bad = tl.zeros((BLOCK_N,), tl.int32)
        e_square = tl.zeros((BLOCK_N,), tl.float64)
        w_square = tl.zeros((BLOCK_N,), tl.float64)
        g_w = tl.zeros((BLOCK_N,), tl.float64)
        e_square_2 = tl.zeros((BLOCK_N,), tl.float64)
        w_square_2 = tl.zeros((BLOCK_N,), tl.float64)
        g_w_2 = tl.zeros((BLOCK_N,), tl.float64)
        for first in range(0, features, BLOCK_D):
            feature = first + column
            mask = live[:, None] & (feature < features)[None, :]
            value = load_rows(x_start, feature, x_feature, mask)
            g = load_rows(g_start, feature, grad_feature, mask)
            bad = tl.maximum(bad, any_not_finite(value))
            _, e, w = direction(
                value, codes, index, key, number, first, feature, mask, noise_std, stride_code,
                stride_feature, FIRST, DIRECTION, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            e_square += wide_sum(e, e)
            w_square += wide_sum(w, w)
            g_w += wide_sum(g, w)
            if POINTS == 2:
                _, e, w = direction(
                    value, codes, index + 1, key, number, first, feature, mask, noise_std, stride_code,
                    stride_feature, SECOND, DIRECTION, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                e_square_2 += wide_sum(e, e)
                w_square_2 += wide_sum(w, w)
                g_w_2 += wide_sum(g, w)
        good = alive & (bad == 0)
        strength = _strength(w_square, g_w, 1.0 - weight)
        strength_2 = _strength(w_square_2, g_w_2, weight)
        distance = tl.sqrt(e_square).to(tl.float32)
        distance_2 = tl.sqrt(e_square_2).to(tl.float32)
        # what is left needs no noise
        for first in range(0, features, BLOCK_D):
            feature = first + column
            mask = live[:, None] & (feature < features)[None, :]
            value = load_rows(x_start, feature, x_feature, mask)
            left = load_rows(g_start, feature, grad_feature, mask)
            e = load_rows(codes + index * stride_code, feature, stride_feature, mask) - value
            h = pulled(e, strength, distance)
            left -= h
            if ATOMIC:
                _add_to_codes(sums, index, feature, features, h, good, mask)
            if POINTS == 2:
                e = load_rows(codes + (index + 1) * stride_code, feature, stride_feature, mask) - value
                h = pulled(e, strength_2, distance_2)
                left -= h
                if ATOMIC:
                    _add_to_codes(sums, index + 1, feature, features, h, good, mask)
            store_rows(out_start, feature, out_feature, left, bad, alive, mask)
    if not ATOMIC:
        tl.store(keys + rows, tl.where(good, index, num_codes), mask=live)
        tl.store(strengths + rows, strength, mask=live)
        tl.store(distances + rows, distance, mask=live)
        if POINTS == 2:
            tl.store(strengths + num_rows.to(tl.int64) + rows, strength_2, mask=live)
            tl.store(distances + num_rows.to(tl.int64) + rows, distance_2, mask=live)


def _form(
    grad: torch.dtype,
    x: torch.dtype,
    codes: torch.dtype,
    position: torch.dtype | None,
    direction: int,
    atomic: bool,
    features: int,
) -> Configuration:
    block_n, block_d = tile_of(features)
    whole, points = features <= block_d, 1 if position is None else 2
    return Configuration(
        name=f"directional_backward_{TYPES[grad]}_{TYPES[x]}_{TYPES[codes]}_{direction}_{points}_d{block_d}"
        f"{'' if whole else '_loop'}{'_atomic' if atomic else ''}",
        kernel=_directional_backward,
        constants={
            "DIRECTION": direction,
            "POINTS": points,
            "ATOMIC": atomic,
            "WHOLE": whole,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
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
            "keys": "*i64",
            "strengths": "*fp32",
            "distances": "*fp32",
            "noise_std": "fp32",
        },
        ones=("grad_feature", "x_feature", "out_feature", "stride_feature"),
        multiples=(
            "features",
            "grad_outer",
            "grad_inner",
            "x_outer",
            "x_inner",
            "out_outer",
            "out_inner",
            "stride_code",
        ),
    )


def configurations() -> list[Configuration]:
    """The forms in which these kernels are launched; other dtypes and block sizes compile to the like."""
    half, single = torch.bfloat16, torch.float32
    return [
        _form(half, half, single, None, 0, True, 64),
        _form(single, single, single, single, 0, True, 256),
        _form(single, single, single, single, 0, True, 1024),
        _form(single, single, single, single, 1, False, 256),
        _form(single, single, single, None, 2, True, 16),
        segment_form(single, single, 2, 256),
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
    atomic = not torch.are_deterministic_algorithms_enabled()
    points = 1 if position is None else 2
    sums = x.new_zeros((num_codes, features) if atomic else (1,), dtype=torch.float32)
    kept = 1 if atomic else rows
    keys = x.new_empty((kept,), dtype=torch.int64)
    strengths, distances = x.new_empty((2, points * kept), dtype=torch.float32)
    kind = None if position is None else position.dtype
    form = _form(grad.dtype, x.dtype, codebook.dtype, kind, direction, atomic, features)
    with on_device_of(x):
        form.launch(
            (triton.cdiv(rows, form.constants["BLOCK_N"]),),
            grad,
            x,
            codebook,
            indices.contiguous(),
            x if position is None else position.contiguous(),
            seed,
            grad_x,
            sums,
            keys,
            strengths,
            distances,
            rows,
            x.shape[1],
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
            order, offsets = segments(keys, num_codes)
            sums = segment_sums(x, codebook, strengths, distances, order, offsets, points)
    return grad_x, sums.to(codebook.dtype)
