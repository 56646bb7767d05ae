"""How `(..., D)` becomes the `(B, M, D)` that ops take, and `(G, ..., D)` the `(G, B, M, D)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def collapse(x: Tensor) -> Tensor:
    """View `(..., D)` as `(B, M, D)`, copying only where the leading dims do not collapse to two.

    NCHW latents seen as (N, H, W, C) collapse to (N, H * W, C); a contiguous tensor collapses to (1, N, D).
    """
    *leading, features = x.shape
    if x.numel() == 0:
        return x.reshape(1, math.prod(leading), features)
    outer, inner = _two(leading, x.stride()[:-1])
    return (x if outer else x.contiguous()).view(outer or 1, inner, features)


def collapse_groups(x: Tensor) -> Tensor:
    """View `(G, ..., D)` as `(G, B, M, D)`, each group as `collapse` does."""
    groups, *leading, features = x.shape
    if x.numel() == 0:
        return x.reshape(groups, 1, math.prod(leading), features)
    outer, inner = _two(leading, x.stride()[1:-1])
    return (x if outer else x.contiguous()).view(groups, outer or 1, inner, features)


def _two(leading: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Sizes of the two dims that these collapse to; 0 and their product where they do not."""
    # runs of leading dims that one stride serves, innermost first: [size, stride]
    runs: list[list[int]] = []
    for size, stride in zip(reversed(leading), reversed(strides), strict=True):
        if size == 1:
            continue
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1][0] *= size
        else:
            runs.append([size, stride])
    if len(runs) > 2:
        return 0, math.prod(leading)
    return runs[1][0] if len(runs) == 2 else 1, runs[0][0] if runs else 1
