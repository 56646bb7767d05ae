"""Counts and sums of the rows of each code in Triton: by atomics, or in a fixed order over sorted rows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import TYPES, Configuration, on_device_of
from vqkernels.kernels._directions import any_not_finite
from vqkernels.kernels._rows import grid_of, load_each, load_rows, tile_of, tile_rows
from vqkernels.kernels._segments import key_dtype, segment_form, segment_sums
from vqkernels.kernels.directional_backward import MOST_ATOMICS


@triton.jit(do_not_specialize=["outer", "num_codes"])
def _code_sums(
    x,
    indices,
    counts,
    sums,
    keys,
    outer,
    inner,
    num_codes,
    features,
    x_outer,
    x_inner,
    x_feature,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add rows to their codes, or, with KEYS, write each row's code, K for rows that count for nothing."""
    plane, begin, at, live = tile_rows(outer, inner, EVEN, BLOCK_N)
    rows = (plane * inner + begin) + at
    column = tl.arange(0, BLOCK_D)
    start = x + (plane * x_outer + begin * x_inner) + at * x_inner
    value = load_rows(start, live, column, features, x_feature, EVEN)
    index = load_each(indices + rows, live, EVEN)
    good = (index >= 0) & (index < num_codes) & (any_not_finite(value) == 0)
    if KEYS:
        tl.store(keys + rows, tl.where(good, index, num_codes).to(keys.dtype.element_ty), mask=live)
    else:
        good = good & live
        tl.atomic_add(counts + index, tl.full((BLOCK_N,), 1, tl.int64), mask=good, sem="relaxed")
        mask = good[:, None] & (column < features)[None, :]
        tl.atomic_add(sums + index[:, None] * features + column[None, :], value, mask=mask, sem="relaxed")


@functools.cache
def _form(x: torch.dtype, keys: torch.dtype | None, features: int, strided: bool = False) -> Configuration:
    tile = tile_of(features, strided=strided)
    ones, multiples = (("x_inner",), ("x_feature",)) if strided else (("x_feature",), ("x_inner",))
    return Configuration(
        name=f"code_sums_{TYPES[x]}_d{tile.features}{'' if tile.even else '_masked'}"
        f"{'_strided' if strided else ''}_{'atomic' if keys is None else str(keys)[6:]}",
        kernel=_code_sums,
        constants={
            "KEYS": keys is not None,
            "EVEN": tile.even,
            "BLOCK_N": tile.rows,
            "BLOCK_D": tile.features,
        },
        types={
            "x": f"*{TYPES[x]}",
            "indices": "*i64",
            "counts": "*i64",
            "sums": "*fp32",
            "keys": "*i16" if keys == torch.int16 else "*i32",
        },
        ones=ones,
        multiples=(*multiples, "inner", "features", "x_outer"),
        warps=tile.warps,
    )


def configurations() -> list[Configuration]:
    """The forms in which these kernels are launched; other dtypes and block sizes compile to the like."""
    half, single, narrow, wide = torch.bfloat16, torch.float32, torch.int16, torch.int32
    return [
        _form(single, None, 64),
        _form(half, narrow, 1000),
        _form(half, wide, 256, True),
        segment_form(half, half, narrow, 0, 512),
        segment_form(single, single, wide, 0, 64, parts=True),
    ]


def launch(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts (K,) int64 and sums (K, D) float32 of (B, M, D) rows."""
    rows, features = indices.numel(), x.shape[-1]
    if not rows:
        counts = x.new_zeros((num_codes,), dtype=torch.int64)
        return counts, x.new_zeros((num_codes, features), dtype=torch.float32)
    atomic = x.numel() <= MOST_ATOMICS and not torch.are_deterministic_algorithms_enabled()
    kept = num_codes if atomic else 1
    counts = x.new_zeros((kept,), dtype=torch.int64)
    sums = x.new_zeros((kept, features), dtype=torch.float32)
    keys = x.new_empty((1 if atomic else rows,), dtype=key_dtype(num_codes))
    form = _form(x.dtype, None if atomic else keys.dtype, features, x.stride(-1) != 1 and features > 1)
    with on_device_of(x):
        form.launch(
            grid_of(x.shape[0], x.shape[1], form.constants["BLOCK_N"]),
            x,
            indices.contiguous(),
            counts,
            sums,
            keys,
            *x.shape[:2],
            num_codes,
            features,
            *x.stride(),
        )
        if not atomic:
            keys, order = torch.sort(keys, stable=True)
            begins = torch.arange(num_codes + 1, dtype=keys.dtype, device=keys.device)
            counts = torch.searchsorted(keys, begins).diff()
            sums = segment_sums(x, None, None, order, keys, num_codes)
    return counts, sums
