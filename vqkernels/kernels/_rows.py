"""Tiles of whole rows: which rows a program owns, how they are read and written, and how large a tile is."""

# triton's stubs do not know what its compiler accepts
# pyright: reportIndexIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vqkernels.kernels._common import INTERPRETED, cdiv

_LANES = 32
# elements of a tile in each thread's registers, of all points of a row together
_PER_THREAD = 16
# rows side by side in memory that fill the 32 bytes in which memory is read
_STRIDED_ROWS = 16
# of such a tile: more threads would have too few registers
_STRIDED_ELEMENTS = 4096
# programs along the second axis of a grid
_LARGEST_GRID = 65535


class Tile(NamedTuple):
    """Rows and features of a tile, the warps that hold it, and whether it needs no masks to be read."""

    rows: int
    features: int
    warps: int
    even: bool


def tile_of(features: int, points: int = 1, strided: bool = False) -> Tile:
    """The tile for rows of so many features.

    Args:
        features: of a row.
        points: of each row, which share the registers.
        strided: whether not features but rows lie side by side in memory.
    """
    per_thread = _PER_THREAD // points
    block = max(4, triton.next_power_of_2(features))
    if INTERPRETED:
        return Tile(max(1, (1 << 16) // block), block, 4, features == block and not strided)
    elements = 4 * _LANES * per_thread
    rows = max(1, elements // block)
    if strided:
        rows = max(rows, min(_STRIDED_ROWS, _STRIDED_ELEMENTS // block))
    warps = min(16, max(4, rows * block // (_LANES * per_thread)))
    # where rows lie side by side, repeating the last one would hide that from the compiler
    return Tile(rows, block, warps, features == block and not strided)


def grid_of(outer: int, inner: int, tile: int) -> tuple[int, int, int]:
    """Programs for (B, M, D) rows, `tile` rows of one outer index each: no row needs a division."""
    planes = cdiv(outer, _LARGEST_GRID)
    return cdiv(inner, tile), cdiv(outer, planes), planes


@triton.jit
def tile_rows(outer, inner, EVEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a program of `grid_of`: its outer index, its first inner one, the others from there, and which exist.

    With EVEN those that do not repeat the last row, so that nothing but what is written needs a mask.
    """
    plane = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    at = tl.arange(0, BLOCK_N)
    left = tl.minimum(inner - first, BLOCK_N).to(tl.int32)
    live = at < tl.where(plane < outer, left, 0)
    if EVEN:
        plane = tl.minimum(plane, outer - 1)
        at = tl.minimum(at, left - 1)
    return plane.to(tl.int64), first, at.to(tl.int64), live


@triton.jit
def load_each(start, live, EVEN: tl.constexpr):
    """One element of each row; 0 in rows that do not exist unless EVEN."""
    if EVEN:
        return tl.load(start)
    else:
        return tl.load(start, mask=live, other=0)


@triton.jit
def load_rows(start, live, feature, features, stride_feature, EVEN: tl.constexpr):
    """A float32 tile of rows that begin at `start`; 0 where there is nothing."""
    at = start[:, None] + feature.to(tl.int64)[None, :] * stride_feature
    if EVEN:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=live[:, None] & (feature < features)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(start, tile, live, feature, features, stride_feature, EVEN: tl.constexpr):
    """Write a tile."""
    at = start[:, None] + feature.to(tl.int64)[None, :] * stride_feature
    mask = live[:, None] if EVEN else live[:, None] & (feature < features)[None, :]
    tl.store(at, tile.to(start.dtype.element_ty), mask=mask)
