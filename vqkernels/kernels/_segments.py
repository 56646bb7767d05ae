"""Sums of rows by code in a fixed order: rows sorted by code, walked in chunks of a fixed length.

A program walks some chunks side by side and adds up runs of equal codes in registers. A run inside a chunk is that
code's sum; the first and the last run of a chunk may go on in its neighbours, so they become two entries of a
shorter list, sorted like the first, and are walked again, until one chunk holds all. No code makes a program
longer than another, however many rows it has, and nothing but the sorted codes says where a run ends.
"""

# triton's stubs do not know what its compiler accepts
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import INTERPRETED, TYPES, Configuration, cdiv
from vqkernels.kernels._directions import pulled
from vqkernels.kernels._rows import load_rows, tile_of

# vectors of each chunk in registers: its run, and some of the four entries that are on their way
_VECTORS = 2
# entries of a chunk: longer ones leave less to the next level, shorter ones are more programs
_CHUNK = 32
_LONG_CHUNK = 64
_MANY_ENTRIES = 1 << 18
_LARGEST_BLOCK = 1 << 13 if INTERPRETED else 256
_KEYS = {torch.int16: "i16", torch.int32: "i32"}


@triton.jit
def _entry(
    x,
    codes,
    factors,
    order,
    keys,
    at,
    entries,
    num_codes,
    feature,
    features,
    x_row,
    stride_code,
    stride_feature,
    POINTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The code of an entry of each chunk, and what it adds to the sums of its points."""
    live = at < entries
    key = tl.load(keys + at, mask=live, other=num_codes).to(tl.int32)
    if PARTS:
        start = x + at * (x_row * (2 if POINTS == 2 else 1))
        value = load_rows(start, live, feature, features, 1, False)
        other = value
        if POINTS == 2:
            other = load_rows(start + x_row, live, feature, features, 1, False)
    else:
        row = tl.load(order + at, mask=live, other=0)
        value = load_rows(x + row * x_row, live, feature, features, 1, False)
        other = value
        if POINTS > 0:
            # what belongs to no code is dropped later, but must not be read outside
            index = tl.minimum(key, num_codes - POINTS).to(tl.int64)
            start = codes + index * stride_code
            factor = factors + row
            e = load_rows(start, live, feature, features, stride_feature, False) - value
            first = tl.load(factor, mask=live, other=0.0)
            second = tl.load(factor + entries, mask=live, other=0.0)
            if POINTS == 2:
                e_2 = load_rows(start + stride_code, live, feature, features, stride_feature, False) - value
                first_2 = tl.load(factor + 2 * entries, mask=live, other=0.0)
                second_2 = tl.load(factor + 3 * entries, mask=live, other=0.0)
                other = pulled(e_2, first_2, second_2)
            value = pulled(e, first, second)
            if POINTS == 1:
                other = value
    return key, value, other


@triton.jit
def _place(current, part, in_part, num_codes, POINTS: tl.constexpr):
    """The row of a run's sum: its code's, or that of the part with this number; negative if it has none."""
    place = tl.where(in_part == 1, num_codes + part, tl.where(current < num_codes, current, -1))
    return place * 2 if POINTS == 2 else place


@triton.jit
def _take(
    current, head, total, total_2, key, value, other, sums, part, num_codes, feature, features,
    POINTS: tl.constexpr,
):  # fmt: skip
    """Add an entry to its chunk's run, after the run before it, if it ends here, was stored."""
    ends = key != current
    place = _place(current, part, head, num_codes, POINTS)
    _store(sums, place, ends, total, total_2, feature, features, POINTS)
    total = tl.where(ends[:, None], 0.0, total) + value
    if POINTS == 2:
        total_2 = tl.where(ends[:, None], 0.0, total_2) + other
    return key, tl.where(ends, 0, head), total, total_2


@triton.jit
def _store(sums, place, ends, total, total_2, feature, features, POINTS: tl.constexpr):
    """Store a run that ends in row `place` of the sums, which parts follow; nowhere if it is negative."""
    at = sums + place[:, None] * features + feature[None, :]
    mask = (ends & (place >= 0))[:, None] & (feature < features)[None, :]
    tl.store(at, total, mask=mask)
    if POINTS == 2:
        tl.store(at + features, total_2, mask=mask)


@triton.jit(do_not_specialize=["entries", "chunk", "num_codes", "last", "first_part"])
def _segment_sums(
    x,
    codes,
    factors,
    order,
    keys,
    sums,
    part_keys,
    first_part,
    entries,
    chunk,
    num_codes,
    last,
    features,
    x_row,
    stride_code,
    stride_feature,
    POINTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One level: sums of x (POINTS = 0), of the gradients of one or two points, or of parts of a level before."""
    number = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = number * chunk
    exists = begin < entries
    current = tl.load(keys + begin, mask=exists, other=num_codes).to(tl.int32)
    if tl.program_id(1) == 0:
        tl.store(part_keys + 2 * number, current, mask=exists)
    # 1 while the chunk's first run lasts, whose sum is a part; the last level has no parts
    in_parts = tl.where(exists & (last == 0), 1, 0)
    head = in_parts
    part = first_part + 2 * number
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_2 = total
    wide = entries.to(tl.int64)
    for at in range(0, chunk, 4):
        here = begin + at
        key_0, value_0, other_0 = _entry(
            x, codes, factors, order, keys, here, wide, num_codes, feature, features, x_row, stride_code,
            stride_feature, POINTS, PARTS,
        )  # fmt: skip
        key_1, value_1, other_1 = _entry(
            x, codes, factors, order, keys, here + 1, wide, num_codes, feature, features, x_row, stride_code,
            stride_feature, POINTS, PARTS,
        )  # fmt: skip
        key_2, value_2, other_2 = _entry(
            x, codes, factors, order, keys, here + 2, wide, num_codes, feature, features, x_row, stride_code,
            stride_feature, POINTS, PARTS,
        )  # fmt: skip
        key_3, value_3, other_3 = _entry(
            x, codes, factors, order, keys, here + 3, wide, num_codes, feature, features, x_row, stride_code,
            stride_feature, POINTS, PARTS,
        )  # fmt: skip
        current, head, total, total_2 = _take(
            current, head, total, total_2, key_0, value_0, other_0, sums, part, num_codes, feature, features,
            POINTS,
        )  # fmt: skip
        current, head, total, total_2 = _take(
            current, head, total, total_2, key_1, value_1, other_1, sums, part, num_codes, feature, features,
            POINTS,
        )  # fmt: skip
        current, head, total, total_2 = _take(
            current, head, total, total_2, key_2, value_2, other_2, sums, part, num_codes, feature, features,
            POINTS,
        )  # fmt: skip
        current, head, total, total_2 = _take(
            current, head, total, total_2, key_3, value_3, other_3, sums, part, num_codes, feature, features,
            POINTS,
        )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(part_keys + 2 * number + 1, current, mask=in_parts == 1)
    # a chunk of one run is its first part, and its second is nothing
    place = _place(current, part + 1 - head, in_parts, num_codes, POINTS)
    _store(sums, place, exists, total, total_2, feature, features, POINTS)
    nothing = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    place = _place(current, part + 1, head, num_codes, POINTS)
    _store(sums, place, head == 1, nothing, nothing, feature, features, POINTS)


@functools.cache
def segment_form(
    x: torch.dtype, codes: torch.dtype, keys: torch.dtype, points: int, features: int, parts: bool = False
) -> Configuration:
    """The form of `_segment_sums` for these dtypes, points per row (0: sums of x itself) and features."""
    tile = tile_of(min(features, _LARGEST_BLOCK), _VECTORS)
    return Configuration(
        name=f"segment_sums_{'parts' if parts else f'{TYPES[x]}_{TYPES[codes]}_{_KEYS[keys]}'}_{points}"
        f"_d{tile.features}",
        kernel=_segment_sums,
        constants={"POINTS": points, "PARTS": parts, "BLOCK_N": tile.rows, "BLOCK_D": tile.features},
        types={
            "x": f"*{TYPES[x]}",
            "codes": f"*{TYPES[codes]}",
            "factors": "*fp32",
            "order": "*i64",
            "keys": f"*{_KEYS[keys]}",
            "sums": "*fp32",
            "part_keys": "*i32",
        },
        ones=("stride_feature",),
        multiples=("features", "x_row", "stride_code"),
        warps=tile.warps,
    )


def key_dtype(num_codes: int) -> torch.dtype:
    """The narrowest integers that hold 0 .. K: a radix sort passes once over each of their bytes."""
    return torch.int16 if num_codes < 1 << 15 else torch.int32


def segment_sums(
    x: Tensor, codes: Tensor | None, factors: Tensor | None, order: Tensor, keys: Tensor, num_codes: int
) -> Tensor:
    """Sums over the rows of each code, in a fixed order: of x, or of the gradients of its points.

    Args:
        x: (B, M, D) rows.
        codes: (K, D), or None to add up x itself.
        factors: (2, N) or (4, N) float32, those of `pull` for one or two points of each row.
        order: (N,) int64 row numbers sorted by code.
        keys: (N,) their codes, K for rows that count for nothing.
        num_codes: K.

    Returns:
        (K, D) float32. The gradient of a row's second point belongs to the code after its first.
    """
    features, entries = x.shape[-1], len(order)
    points = 0 if factors is None else len(factors) // 2
    both = 2 if points == 2 else 1
    # neighbours in the order are not neighbours in memory: rows must be read whole
    rows = x if x.shape[0] == 1 and x.stride(-1) == 1 else x.contiguous().view(1, entries, features)
    levels = [entries]
    while levels[-1] > _chunk(levels[-1]):
        levels.append(2 * cdiv(levels[-1], _chunk(levels[-1])))
    # the sums, and after them the parts of every level, so that one pointer serves all
    sums = x.new_empty((num_codes + sum(levels[1:]), both, features), dtype=torch.float32)
    sums[:num_codes].zero_()
    table = rows[0] if codes is None else codes
    form = segment_form(x.dtype, table.dtype, keys.dtype, points, features)
    source, stride, x_row, begin = rows, (table.stride(0), table.stride(1)), rows.stride(1), 0
    for entries in levels:
        chunk = _chunk(entries)
        chunks = cdiv(entries, chunk)
        part_keys = keys.new_empty((2 * chunks,), dtype=torch.int32)
        form.launch(
            (
                cdiv(chunks, form.constants["BLOCK_N"]),
                cdiv(features, form.constants["BLOCK_D"]),
            ),
            source,
            table,
            sums if factors is None else factors,
            order,
            keys,
            sums,
            part_keys,
            begin,
            entries,
            chunk,
            num_codes,
            int(chunks == 1),
            features,
            x_row,
            *stride,
        )
        source, keys = sums[num_codes + begin :], part_keys
        begin += 2 * chunks
        form = segment_form(torch.float32, torch.float32, torch.int32, points, features, parts=True)
        table, stride, x_row = sums, (features, 1), features
    # a copy, because the parts are larger than the sums may be
    total = sums[:num_codes, 0].clone()
    if both == 2:
        total[1:] += sums[: num_codes - 1, 1]
    return total


def _chunk(entries: int) -> int:
    # entries are taken in fours
    return _LONG_CHUNK if entries >= _MANY_ENTRIES else min(_CHUNK, 4 * cdiv(entries, 4))
