"""Counts and sums of the rows of each code in Triton: by atomics, or in a fixed order if torch must."""

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
from vqkernels.kernels._directions import any_not_finite, load_rows
from vqkernels.kernels._segments import segment_form, segment_sums, segments

_LARGEST_BLOCK = 512
_TILE = 1 << 16 if INTERPRETED else 1 << 12


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes"])
def _code_sums(
    x,
    indices,
    counts,
    sums,
    keys,
    num_rows,
    inner,
    num_codes,
    features,
    x_outer,
    x_inner,
    x_feature,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add rows to their codes, or, with KEYS, write each row's code, K for rows that count for nothing."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < num_rows
    column = tl.arange(0, BLOCK_D)
    index = tl.load(indices + rows, mask=live, other=-1)
    start = x + row_offsets(rows, inner, x_outer, x_inner)
    bad = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, features, BLOCK_D):
        feature = first + column
        value = load_rows(start, feature, x_feature, live[:, None] & (feature < features)[None, :])
        bad = tl.maximum(bad, any_not_finite(value))
    good = (index >= 0) & (index < num_codes) & (bad == 0)
    if KEYS:
        tl.store(keys + rows, tl.where(good, index, num_codes), mask=live)
    else:
        tl.atomic_add(counts + index, tl.full((BLOCK_N,), 1, tl.int64), mask=good, sem="relaxed")
        for first in range(0, features, BLOCK_D):
            feature = first + column
            mask = good[:, None] & (feature < features)[None, :]
            value = load_rows(start, feature, x_feature, mask)
            tl.atomic_add(
                sums + index[:, None] * features + feature[None, :], value, mask=mask, sem="relaxed"
            )


def _form(x: torch.dtype, keys: bool, features: int) -> Configuration:
    block = feature_block(features, _LARGEST_BLOCK)
    return Configuration(
        name=f"code_sums_{TYPES[x]}_{'keys' if keys else 'atomic'}_d{block}",
        kernel=_code_sums,
        constants={"KEYS": keys, "BLOCK_N": max(1, _TILE // block), "BLOCK_D": block},
        types={"x": f"*{TYPES[x]}", "indices": "*i64", "counts": "*i64", "sums": "*fp32", "keys": "*i64"},
        ones=("x_feature",),
        multiples=("features", "x_inner", "x_outer"),
    )


def configurations() -> list[Configuration]:
    """The forms in which these kernels are launched; other dtypes and block sizes compile to the like."""
    return [
        _form(torch.float32, False, 64),
        _form(torch.bfloat16, True, 1024),
        segment_form(torch.float32, torch.float32, 0, 256),
    ]


def launch(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts (K,) int64 and sums (K, D) float32 of (B, M, D) rows."""
    counts = x.new_zeros((num_codes,), dtype=torch.int64)
    sums = x.new_zeros((num_codes, x.shape[-1]), dtype=torch.float32)
    if not indices.numel():
        return counts, sums
    fixed_order = torch.are_deterministic_algorithms_enabled()
    keys = torch.empty(indices.numel() if fixed_order else 1, dtype=torch.int64, device=x.device)
    form = _form(x.dtype, fixed_order, x.shape[-1])
    with on_device_of(x):
        form.launch(
            (triton.cdiv(indices.numel(), form.constants["BLOCK_N"]),),
            x,
            indices.contiguous(),
            counts,
            sums,
            keys,
            indices.numel(),
            x.shape[1],
            num_codes,
            x.shape[-1],
            *x.stride(),
        )
        if fixed_order:
            order, offsets = segments(keys, num_codes)
            return offsets.diff(), segment_sums(x, x, sums, sums, order, offsets, 0)
    return counts, sums
