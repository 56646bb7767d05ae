"""The directional reparameterization family, forward and backward: `directional`, `directional_backward`.

One formula serves DiVeQ, DiVeQ-detach, NSVQ, SF-DiVeQ and SF-DiVeQ-detach: selected points p_m with weights w_m,
e_m = p_m - x, r_m = |e_m| and a unit direction u_m that carries no gradient,

    z       = x + sum_m w_m r_m u_m
    dL/dx   = g - sum_m w_m (g . u_m) e_m / r_m
    dL/dp_m =         w_m (g . u_m) e_m / r_m          (0 where r_m = 0)

with u = (v + e)/|v + e| ("noisy", DiVeQ eq. 8 and 12), e/|e| ("detach", eq. 16; z is then the point itself) or
v/|v| ("random", NSVQ eq. 7), and 0 for a zero vector. v is drawn from the seed, again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import kernels, native, philox
from vqkernels.checks import (
    check_choice,
    check_count,
    check_indices,
    check_noise_std,
    check_pair,
    check_position,
    check_seed,
)
from vqkernels.dispatch import Op
from vqkernels.ops._layout import collapse

NOISE_STD = 1e-3**0.5
DIRECTIONS = ("noisy", "detach", "random")
_NOISY, _DETACH, _RANDOM = range(3)
_CHUNK = 1 << 20

_ARGUMENTS = (
    "Tensor x, Tensor codebook, Tensor indices, Tensor? position, Tensor seed, "
    "int direction, float noise_std, SymInt row_offset"
)


def _points(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    position: Tensor | None,
    seed: Tensor,
    direction: int,
    noise_std: float,
    row: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each selected point: its index (n,), weight (n, 1), difference e (n, D) and unit direction u (n, D)."""
    weights = [torch.ones_like(x[:, :1])] if position is None else [1 - position[:, None], position[:, None]]
    for m, weight in enumerate(weights):
        e = codebook[indices + m].double() - x
        if direction == _DETACH:
            u = e
        else:
            words = philox.words(seed, row, (x.shape[1] + 3) // 4, philox.NOISE + m)
            v = philox.normals(words).flatten(1)[:, : x.shape[1]].double()
            u = noise_std * v + e if direction == _NOISY else v
        length = u.norm(dim=1, keepdim=True)
        yield indices + m, weight, e, torch.where(length > 0, u / length, 0)


def _chunks(
    x: Tensor, codebook: Tensor, indices: Tensor, position: Tensor | None, row_offset: int
) -> Iterator[tuple]:
    """Rows at a time: slice, x in float64, safe indices, position, row numbers, and which rows are alive."""
    n, d = indices.numel(), x.shape[-1]
    flat, index = x.reshape(n, d), indices.flatten()
    last = len(codebook) - (1 if position is None else 2)
    for start in range(0, n, max(1, _CHUNK // d)):
        rows = slice(start, min(n, start + max(1, _CHUNK // d)))
        alive = (index[rows] >= 0) & (index[rows] <= last)
        row = torch.arange(rows.start, rows.stop, device=x.device) + row_offset
        at = None if position is None else position.flatten()[rows].double()
        yield rows, flat[rows].double(), torch.where(alive, index[rows], 0), at, row, alive[:, None]


def _reference(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    position: Tensor | None,
    seed: Tensor,
    direction: int,
    noise_std: float,
    row_offset: int,
) -> Tensor:
    z = torch.empty_like(x)
    flat = x.new_empty(indices.numel(), x.shape[-1])
    for rows, xs, index, at, row, alive in _chunks(x, codebook, indices, position, row_offset):
        moved = torch.zeros_like(xs) if direction == _DETACH else xs
        for m, weight, e, u in _points(xs, codebook, index, at, seed, direction, noise_std, row):
            moved = moved + weight * (
                codebook[m].double() if direction == _DETACH else e.norm(dim=1, keepdim=True) * u
            )
        moved = torch.where(xs.isfinite().all(1, keepdim=True), moved, torch.nan)
        flat[rows] = torch.where(alive, moved, 0).to(x.dtype)
    return z.copy_(flat.view(x.shape))


def _reference_backward(
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
    grad_x = torch.empty_like(x)
    flat = x.new_empty(indices.numel(), x.shape[-1])
    upstream = grad.reshape(flat.shape)
    grad_codebook = torch.zeros(codebook.shape, dtype=torch.float64, device=x.device)
    for rows, xs, index, at, row, alive in _chunks(x, codebook, indices, position, row_offset):
        g = upstream[rows].double()
        good = xs.isfinite().all(1, keepdim=True)
        pulled = g
        for m, weight, e, u in _points(xs, codebook, index, at, seed, direction, noise_std, row):
            r = e.norm(dim=1, keepdim=True)
            h = torch.where(r > 0, weight * (g * u).sum(1, keepdim=True) * e / r, 0)
            pulled = pulled - h
            grad_codebook.index_add_(0, m, torch.where(good & alive, h, 0))
        flat[rows] = torch.where(alive, torch.where(good, pulled, torch.nan), 0).to(x.dtype)
    return grad_x.copy_(flat.view(x.shape)), grad_codebook.to(codebook.dtype)


def _fake(x: Tensor, *rest) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, codebook: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), codebook.new_empty(codebook.shape)


directional_op = Op("directional", f"({_ARGUMENTS}) -> Tensor", reference=_reference, fake=_fake)
directional_op.add_native(native.MISSING, why_not=native.why_not)
directional_op.add("triton", kernels.lazy("directional"), why_not=kernels.why_not)

directional_backward_op = Op(
    "directional_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
)
directional_backward_op.add_native(native.MISSING, why_not=native.why_not)
directional_backward_op.add("triton", kernels.lazy("directional_backward"), why_not=kernels.why_not)


class _Directional(torch.autograd.Function):
    @staticmethod
    def forward(x, codebook, indices, position, seed, direction, noise_std, row_offset, backend):
        return directional_op(
            x, codebook, indices, position, seed, direction, noise_std, row_offset, backend=backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, direction, noise_std, row_offset, backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.backend = (direction, noise_std, row_offset), backend

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = directional_backward_op(grad, *ctx.saved_tensors, *ctx.options, backend=ctx.backend)
        return *saved, None, None, None, None, None, None, None


def apply_directional(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    position: Tensor | None,
    seed: Tensor,
    direction: str,
    noise_std: float,
    row_offset: int,
    backend: str | None,
) -> Tensor:
    """`directional` on inputs that are already checked."""
    flat = collapse(x)
    index = indices.reshape(flat.shape[:-1])
    at = None if position is None else position.detach().reshape(flat.shape[:-1])
    z = _Directional.apply(
        flat, codebook, index, at, seed, DIRECTIONS.index(direction), noise_std, row_offset, backend
    )
    return z.view(x.shape)


def directional(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    direction: str = "noisy",
    position: Tensor | None = None,
    noise_std: float = NOISE_STD,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Move each row to its selected code by the directional reparameterization, differentiably.

        z = x + sum_m w_m |p_m - x| sg[u_m]        (DiVeQ eq. 7, 8, 12 and 16)

    with one point c_i, or, with `position` l, the two points c_i and c_{i+1} with weights 1 - l and l.
    Gradients reach x and the codebook; `indices`, `position` and the direction carry none.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device.
        indices: (...) int64 code of each row, or segment with `position`; a row whose index is out of range
            (such as -1 for a masked row) gives 0 and has no gradient.
        direction: "noisy" (u along v + e), "detach" (u along e; z is the point itself), "random" (u along v).
        position: (...) in [0, 1], or None.
        noise_std: standard deviation of v in units of x, >= 0; used by "noisy" only.
        seed: of the noise: an int, a 0-d int64 tensor on x's device, or None to draw one from torch.
        row_offset: number of the first row: two halves of a batch with offsets 0 and N/2 equal the whole.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs.

    Returns:
        z: (..., D), dtype of x. A row of x with a NaN or Inf gives a row of NaN.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or values do not fit.
        BackendError: `backend` cannot run these inputs.
    """
    name = "directional"
    check_pair(name, x, codebook, min_codes=1 if position is None else 2)
    check_indices(name, indices, x.shape[:-1], x.device)
    check_choice(name, "direction", direction, DIRECTIONS)
    if position is not None:
        check_position(name, position, x.shape[:-1], x.device)
    noise_std = check_noise_std(name, noise_std)
    check_count(name, "row_offset", row_offset)
    seed = check_seed(name, seed, x.device)
    return apply_directional(x, codebook, indices, position, seed, direction, noise_std, row_offset, backend)
