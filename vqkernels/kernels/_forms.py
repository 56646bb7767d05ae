"""Which form of the search runs: tiles, groups, warps and stages by buckets of the sizes and the GPU's generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vqkernels.kernels._common import INTERPRETED

# points are padded to a multiple of it; every tile of points divides it
PAD = 256
# rows of more features are read again for every tile of points, in blocks of so many features
LONGEST_RESIDENT = 256
LOOP_BLOCK = 64


@dataclass(frozen=True)
class Form:
    """One way to search.

    Attributes:
        block_n, block_k: rows and points of a tile.
        group: codes that are reduced to one before they are compared: 2 to 16; 2 or 4 if packed.
        packed: keep the code itself and the next one, not the group: more instructions, no choice at the end.
        warps, stages: what the compiler calls num_warps and num_stages.
        parts: parts of a tile that are held by different threads, so that no group crosses them.
        described: points are read through a tensor descriptor, for rows of one chunk or of many.
    """

    block_n: int
    block_k: int
    group: int
    packed: bool
    warps: int
    stages: int
    parts: int = 1
    described: bool = False

    @property
    def members(self) -> int:
        """Codes among which the finish chooses."""
        return 1 if self.packed else self.group

    @property
    def span(self) -> int:
        """How far apart the pairs of codes of a group are."""
        return 2 * self.block_k // (self.group * self.parts)


def chunks_of(features: int) -> tuple[int, ...]:
    """Features held on chip, as up to three powers of two of 16 or more; () if the row is too long for that."""
    if features > LONGEST_RESIDENT:
        return ()
    left, chunks = -(-features // 16), []
    while left:
        # the third must take all that is left
        exponent = left.bit_length() - 1 if len(chunks) < 2 or left & (left - 1) == 0 else left.bit_length()
        chunks.append(16 << exponent)
        left = max(0, left - (1 << exponent))
    # 240 features would be 128 + 64 + 64
    return tuple(chunks) if len(set(chunks)) == len(chunks) else (256,)


def padded_features_of(features: int) -> int:
    """Features of the searched copies."""
    return sum(chunks_of(features)) or -(-features // LOOP_BLOCK) * LOOP_BLOCK


_forced: Form | None = None


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """Search in this form inside the block, for tests and tuning."""
    global _forced
    previous, _forced = _forced, form
    try:
        yield
    finally:
        _forced = previous


def bucket(arch: int, features: int, num_points: int) -> tuple[int, int, int]:
    """What the choice depends on: generation, and the sizes rounded up to a few steps."""
    # consumer Blackwell has the shared memory of Ampere
    generation = 80 if arch >= 120 or arch < 90 else 100 if arch >= 100 else 90
    width = next((step for step in (64, 128, 256) if features <= step), 512)
    codes = next((step for step in (4096, 16384) if num_points <= step), 1 << 16)
    return generation, width, codes


# the accumulators and the two groups of each slot live in registers, rows and the stages of points in shared memory:
# two programs per multiprocessor where both fit, so that one compares while the other multiplies
_TABLE: dict[tuple[int, int, int], Form] = {
    (90, 64, 4096): Form(128, 128, 4, False, 4, 3),
    (90, 64, 16384): Form(128, 128, 8, False, 4, 3),
    (90, 64, 65536): Form(128, 128, 16, False, 4, 3),
    (90, 128, 4096): Form(128, 128, 4, False, 4, 2),
    (90, 128, 16384): Form(128, 128, 8, False, 4, 2),
    (90, 128, 65536): Form(128, 128, 8, False, 4, 2),
    (90, 256, 4096): Form(128, 128, 4, True, 8, 2),
    (90, 256, 16384): Form(128, 128, 4, False, 8, 2),
    (90, 256, 65536): Form(128, 128, 16, False, 8, 2),
    (90, 512, 4096): Form(128, 128, 4, True, 8, 3),
    (90, 512, 16384): Form(128, 256, 4, False, 8, 3),
    (90, 512, 65536): Form(128, 256, 8, False, 8, 3),
    (80, 64, 4096): Form(128, 64, 4, False, 4, 3),
    (80, 64, 16384): Form(128, 64, 8, False, 4, 3),
    (80, 64, 65536): Form(128, 64, 8, False, 4, 3),
    (80, 128, 4096): Form(128, 64, 4, False, 4, 3),
    (80, 128, 16384): Form(128, 64, 8, False, 4, 3),
    (80, 128, 65536): Form(128, 64, 8, False, 4, 3),
    (80, 256, 4096): Form(128, 64, 4, True, 8, 2),
    (80, 256, 16384): Form(128, 64, 4, False, 8, 2),
    (80, 256, 65536): Form(128, 64, 8, False, 8, 2),
    (80, 512, 4096): Form(128, 128, 4, True, 8, 3),
    (80, 512, 16384): Form(128, 128, 4, False, 8, 3),
    (80, 512, 65536): Form(128, 128, 8, False, 8, 3),
}
# on Blackwell the second four of eight warps hold the second half of a tile, and a thread a whole row of it: groups of
# 4 leave no register for the tile of 128
_TABLE |= {
    (100, width, codes): replace(
        form, block_k=64 if form.warps == form.group == 4 else min(form.block_k, 128), parts=form.warps // 4
    )
    for (generation, width, codes), form in _TABLE.items()
    if generation == 90
}


def choose(arch: int, features: int, num_points: int, scaled: bool) -> Form:
    """The form for these sizes on a GPU of compute capability arch / 10; rows that are scaled need more registers."""
    if _forced is not None:
        return _forced
    if INTERPRETED:
        return Form(512, 256, 8, False, 4, 2)
    form = _TABLE[bucket(arch, features, num_points)]
    crowded = form.warps == 4 and form.block_k == 128 and (form.group == 4 or features > 64)
    return replace(form, block_k=64) if scaled and crowded else form


def alternatives(arch: int, features: int, num_points: int, scaled: bool) -> list[Form]:
    """Forms to measure beside the chosen one: other groups, tiles and warps, and descriptors where they exist."""
    form = choose(arch, features, num_points, scaled)
    others = [replace(form, group=group) for group in (4, 8, 16) if not form.packed and group != form.group]
    others.append(replace(form, packed=not form.packed, group=4))
    others += [replace(form, stages=stages) for stages in (2, 3, 4) if stages != form.stages]
    if form.block_k > 64 and form.parts == 1:
        others.append(replace(form, block_k=form.block_k // 2))
    if form.warps == 4:
        others.append(replace(form, block_n=256, block_k=64, warps=8, parts=2 if arch >= 100 else 1))
    if arch >= 90 and len(chunks_of(features)) <= 1:
        others += [replace(each, described=True) for each in (form, *others[:2])]
    return others


def all_buckets() -> list[tuple[int, int, int]]:
    """Every line of the table: generation, largest features, largest number of codes."""
    return list(_TABLE)
