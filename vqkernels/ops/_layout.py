"""How `(..., D)` becomes the `(B, M, D)` that ops take."""

from __future__ import annotations

import math

from torch import Tensor


def collapse(x: Tensor) -> Tensor:
    """View `(..., D)` as `(B, M, D)`, copying only where the leading dims do not collapse to two.

    NCHW latents seen as (N, H, W, C) collapse to (N, H * W, C); a contiguous tensor collapses to (1, N, D).
    """
    *leading, features = x.shape
    if x.numel() == 0:
        return x.reshape(1, math.prod(leading), features)
    # runs of leading dims that one stride serves, innermost first: [size, stride]
    runs: list[list[int]] = []
    for size, stride in zip(reversed(leading), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1][0] *= size
        else:
            runs.append([size, stride])
    if len(runs) > 2:
        return x.contiguous().view(1, math.prod(leading), features)
    inner = runs[0][0] if runs else 1
    return x.view(runs[1][0] if len(runs) == 2 else 1, inner, features)
