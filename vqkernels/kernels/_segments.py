"""Sums of rows by code in a fixed order: rows sorted by code, one program per code and block of features."""

# triton's stubs do not know what its compiler accepts
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import INTERPRETED, TYPES, Configuration, feature_block, row_offsets
from vqkernels.kernels._directions import load_rows, pulled

_LARGEST_BLOCK = 128
_TILE = 1 << 15 if INTERPRETED else 1 << 12


@triton.jit(do_not_specialize=["num_rows", "inner"])
def _segment_sums(
    x,
    codes,
    strength,
    distance,
    order,
    offsets,
    sums,
    num_rows,
    inner,
    features,
    x_outer,
    x_inner,
    x_feature,
    stride_code,
    stride_feature,
    POINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of x (POINTS = 0) or of the codes' gradients: code j is point m of the rows with key j - m."""
    code = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    seen = feature < features
    total = tl.zeros((BLOCK_D,), tl.float32)
    for m in tl.static_range(POINTS if POINTS > 0 else 1):
        key = tl.maximum(code - m, 0)
        begin = tl.load(offsets + key)
        end = tl.load(offsets + key + 1)
        # the first code is nobody's second point
        end = tl.where(code >= m, end, begin)
        for first in range(begin, end, BLOCK_N):
            live = first + column < end
            rows = tl.load(order + first + column, mask=live, other=0)
            mask = live[:, None] & seen[None, :]
            value = load_rows(x + row_offsets(rows, inner, x_outer, x_inner), feature, x_feature, mask)
            if POINTS > 0:
                at = codes + code * stride_code + feature.to(tl.int64) * stride_feature
                e = tl.load(at, mask=seen, other=0.0).to(tl.float32)[None, :] - value
                pull = tl.load(strength + m * num_rows.to(tl.int64) + rows, mask=live, other=0.0)
                r = tl.load(distance + m * num_rows.to(tl.int64) + rows, mask=live, other=0.0)
                value = tl.where(mask, pulled(e, pull, r), 0.0)
            total += tl.sum(value, axis=0)
    tl.store(sums + code * features + feature, total, mask=seen)


def segment_form(x: torch.dtype, codes: torch.dtype, points: int, features: int) -> Configuration:
    """The form of `_segment_sums` for these dtypes, points per row (0: sums of x itself) and features."""
    block = feature_block(features, _LARGEST_BLOCK)
    return Configuration(
        name=f"segment_sums_{TYPES[x]}_{TYPES[codes]}_{points}_d{block}",
        kernel=_segment_sums,
        constants={"POINTS": points, "BLOCK_N": _TILE // block, "BLOCK_D": block},
        types={
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "strength": "*fp32",
            "distance": "*fp32",
            "order": "*i64",
            "offsets": "*i64",
            "sums": "*fp32",
        },
        ones=("x_feature", "stride_feature"),
        multiples=("features", "x_inner", "x_outer", "stride_code"),
    )


def segments(keys: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Row numbers sorted by key, stably, and where each code's rows begin: (N,) and (K + 1,) int64."""
    in_order, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(in_order, torch.arange(num_codes + 1, device=keys.device))


def segment_sums(
    x: Tensor, codes: Tensor, strength: Tensor, distance: Tensor, order: Tensor, offsets: Tensor, points: int
) -> Tensor:
    """(K, D) float32 sums over the rows of each code, in a fixed order; points = 0 sums x itself."""
    num_codes, features = len(offsets) - 1, x.shape[-1]
    sums = x.new_empty((num_codes, features), dtype=torch.float32)
    form = segment_form(x.dtype, codes.dtype, points, features)
    form.launch(
        (num_codes, triton.cdiv(features, form.constants["BLOCK_D"])),
        x,
        codes,
        strength,
        distance,
        order,
        offsets,
        sums,
        len(order),
        x.shape[1],
        features,
        *x.stride(),
        *codes.stride()[-2:],
    )
    return sums
