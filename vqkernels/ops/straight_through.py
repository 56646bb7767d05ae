"""The code in place of each row, with a gradient that is a linear map of the upstream one, and the squared error.

One op serves the straight-through estimator, the synchronized update and the rotation trick: z is the code itself,
d_n = |x_n - c_i|^2, and from g = dL/dz and the gradient of the squared error

    dL/dx   = T g + commitment pull (x - c_i)
    dL/dc_i = codebook_weight pull (c_i - x) + sync g

where T is the identity, or rho R^T of the rotation that takes x to c_i = rho R x (DiVeQ eq. 4). One pass over rows
forward and one backward; nothing as large as x is made but z and dL/dx.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import kernels, native
from vqkernels.checks import check_flag, check_indices, check_number, check_pair, refuse
from vqkernels.dispatch import Op
from vqkernels.ops._arithmetic import arithmetic
from vqkernels.ops._layout import collapse

# |x/|x| + c/|c|| up to which x and c are antiparallel: no backend can tell such a plane of rotation
ANTIPARALLEL = 2.0**-18
_CHUNK = 1 << 20


class StraightThrough(NamedTuple):
    """What `straight_through` returns."""

    z: Tensor
    loss: Tensor


def _chunks(x: Tensor, codebook: Tensor, indices: Tensor) -> Iterator[tuple]:
    """Rows at a time: slice, x and its codes in float64, safe indices, which rows are alive and which finite."""
    n, d = indices.numel(), x.shape[-1]
    flat, index = x.reshape(n, d), indices.flatten()
    for start in range(0, n, max(1, _CHUNK // d)):
        rows = slice(start, min(n, start + max(1, _CHUNK // d)))
        alive = (index[rows] >= 0) & (index[rows] < len(codebook))
        safe = torch.where(alive, index[rows], 0)
        xs = flat[rows].double()
        yield rows, xs, codebook[safe].double(), safe, alive[:, None], xs.isfinite().all(1, keepdim=True)


def _turned(g: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """rho R^T g of float64 rows (n, D), with rho = |c|/|x|, s = x/|x| + c/|c| and

    R = I - 2 s s^T / |s|^2 + 2 (c/|c|) (x/|x|)^T,   or I - 2 x x^T / |x|^2 where s is 0
    """
    x_norm, c_norm = x.norm(dim=1, keepdim=True), c.norm(dim=1, keepdim=True)
    u = torch.where(x_norm > 0, x / x_norm, 0)
    v = torch.where(c_norm > 0, c / c_norm, 0)
    s = u + v
    square = s.square().sum(1, keepdim=True)
    opposite = square <= ANTIPARALLEL**2
    turned = g - 2 * s * ((s * g).sum(1, keepdim=True) / square) + 2 * u * (v * g).sum(1, keepdim=True)
    turned = torch.where(opposite, g - 2 * u * (u * g).sum(1, keepdim=True), turned)
    turned = torch.where(c_norm > 0, turned * (c_norm / x_norm), 0)
    return torch.where(x_norm > 0, turned, g)


def _reference(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kind = arithmetic(x, codebook)
    z, flat = torch.empty_like(x), x.new_empty(indices.numel(), x.shape[-1])
    sq_dist, totals = x.new_empty(indices.numel(), dtype=kind), x.new_zeros(2, dtype=torch.float64)
    for rows, xs, cs, _, alive, good in _chunks(x, codebook, indices):
        square = (xs - cs).square().sum(1, keepdim=True)
        flat[rows] = torch.where(alive, torch.where(good, cs, torch.nan), 0).to(x.dtype)
        sq_dist[rows] = torch.where(alive, torch.where(good, square, torch.nan), 0).to(kind)[:, 0]
        totals[0] += torch.where(alive & good, square, 0).sum()
        totals[1] += (alive & good).sum()
    return z.copy_(flat.view(x.shape)), sq_dist.view(indices.shape), totals


def _reference_backward(
    grad: Tensor,
    pull: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    rotation: bool,
    commitment: float,
    codebook_weight: float,
    sync: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    flat = x.new_empty(indices.numel(), x.shape[-1])
    upstream, pull = grad.reshape(flat.shape), pull.double()
    grad_codebook = torch.zeros(codebook.shape, dtype=torch.float64, device=x.device)
    for rows, xs, cs, safe, alive, good in _chunks(x, codebook, indices):
        g = upstream[rows].double()
        pulled = (_turned(g, xs, cs) if rotation else g) + commitment * pull * (xs - cs)
        flat[rows] = torch.where(alive, torch.where(good, pulled, torch.nan), 0).to(x.dtype)
        own = torch.zeros_like(g)
        if codebook_weight != 0:
            own += codebook_weight * pull * (cs - xs)
        if sync != 0:
            own += sync * g
        grad_codebook.index_add_(0, safe, torch.where(alive & good, own, 0))
    grad_x, empty_codebook = _fake_backward(
        grad, pull, x, codebook, indices, rotation, commitment, codebook_weight, sync, need_x, need_codebook
    )
    if need_x:
        grad_x.copy_(flat.view(x.shape))
    return grad_x, grad_codebook.to(codebook.dtype) if need_codebook else empty_codebook


def _fake(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sq_dist = x.new_empty(indices.shape, dtype=arithmetic(x, codebook))
    return torch.empty_like(x), sq_dist, x.new_empty((2,), dtype=torch.float64)


def _fake_backward(
    grad: Tensor,
    pull: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    rotation: bool,
    commitment: float,
    codebook_weight: float,
    sync: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty((0,)),
        codebook.new_empty(codebook.shape) if need_codebook else codebook.new_empty((0,)),
    )


straight_through_op = Op(
    "straight_through",
    "(Tensor x, Tensor codebook, Tensor indices) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
straight_through_op.add_native(native.MISSING, why_not=native.why_not_cpu_only)
straight_through_op.add("triton", kernels.lazy("straight_through"), why_not=kernels.why_not)

straight_through_backward_op = Op(
    "straight_through_backward",
    "(Tensor grad, Tensor pull, Tensor x, Tensor codebook, Tensor indices, bool rotation, float commitment, "
    "float codebook_weight, float sync, bool need_x, bool need_codebook) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
)
straight_through_backward_op.add_native(native.MISSING, why_not=native.why_not_cpu_only)
straight_through_backward_op.add("triton", kernels.lazy("straight_through_backward"), why_not=kernels.why_not)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x, codebook, indices, mean_rows, rotation, commitment, codebook_weight, sync, backend):
        z, sq_dist, totals = straight_through_op(x, codebook, indices, backend=backend)
        rows = totals[1].clamp_min(1) if mean_rows is None else mean_rows.double()
        scale = 1 / (rows * x.shape[-1])
        loss = (commitment + codebook_weight) * totals[0] * scale
        return z, loss.to(sq_dist.dtype), scale.to(sq_dist.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, codebook, indices, _, *options, backend = inputs
        scale = output[2]
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, codebook, indices, scale)
        ctx.options, ctx.backend = options, backend

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_loss, _):
        x, codebook, indices, scale = ctx.saved_tensors
        if grad is None:
            # a view of one number: nothing as large as x
            grad = x.new_zeros(()).expand(x.shape)
        pull = scale.new_zeros(()) if grad_loss is None else 2 * grad_loss * scale
        need_x, need_codebook, *_ = ctx.needs_input_grad
        # without its share of dL/dz a code has a gradient from the loss alone: where that has none, neither has the code
        *_, sync = ctx.options
        need_codebook = need_codebook and (grad_loss is not None or sync != 0)
        arguments = (grad, pull, x, codebook, indices, *ctx.options, need_x, need_codebook)
        grad_x, grad_codebook = straight_through_backward_op(*arguments, backend=ctx.backend)
        return (
            grad_x if need_x else None,
            grad_codebook if need_codebook else None,
            *(None,) * 7,
        )


def straight_through(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    rotation: bool = False,
    commitment: float = 0.25,
    codebook_weight: float = 1.0,
    sync: float = 0.0,
    mean_rows: Tensor | None = None,
    backend: str | None = None,
) -> StraightThrough:
    """Put the selected code in place of each row; the gradient crosses to x by the identity or by a rotation.

        z    = x + sg[c_i - x]                                 (straight-through; DiVeQ section 2)
        z    = sg[rho R] x,  rho R x = c_i                      (rotation trick, DiVeQ eq. 4)
        z   += sync (c_i - sg[c_i])                             (synchronized update, Huh eq. 21)
        loss = codebook_weight |sg[x] - c_i|^2 + commitment |x - sg[c_i]|^2, means        (DiVeQ eq. 2)

    The value of z is c_i itself in each case. R = I - 2 s s^T/|s|^2 + 2 (c/|c|)(x/|x|)^T with s = x/|x| + c/|c|;
    I - 2 x x^T/|x|^2 where x and c are antiparallel (|s| <= 2^-18). A row x = 0 passes g unchanged, and then a
    code c = 0 passes none. For backward only `x`, `codebook`, `indices` and 0-d tensors are kept.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device.
        indices: (...) int64 code of each row; a row whose index is out of range (such as -1 for a masked row)
            gives 0, has no gradient and no part in the loss.
        rotation: whether dL/dx takes the rotation and the ratio of lengths rather than g itself.
        commitment: weight of the squared error for x.
        codebook_weight: weight of the squared error for the code; 0 where codes are not learned by gradient.
        sync: nu, the share of dL/dz that the code receives.
        mean_rows: 0-d tensor, > 0, the number of rows that the loss is a mean over; by default those that are
            finite and not masked, and at least 1.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs.

    Returns:
        z: (..., D), dtype of x. A row of x with a NaN or Inf gives a row of NaN, NaN dL/dx and no more.
        loss: 0-d float32, or float64 when an input is float64.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or values do not fit.
        BackendError: `backend` cannot run these inputs.
    """
    name = "straight_through"
    check_pair(name, x, codebook)
    check_indices(name, indices, x.shape[:-1], x.device)
    check_flag(name, "rotation", rotation)
    weights = [
        check_number(name, word, value)
        for word, value in (("commitment", commitment), ("codebook_weight", codebook_weight), ("sync", sync))
    ]
    if mean_rows is not None:
        _check_mean_rows(name, mean_rows, x.device)
        mean_rows = mean_rows.detach()
    flat = collapse(x)
    index = indices.reshape(flat.shape[:-1])
    z, loss, _ = _StraightThrough.apply(flat, codebook, index, mean_rows, rotation, *weights, backend)
    return StraightThrough(z.view(x.shape), loss)


def _check_mean_rows(op: str, mean_rows: object, device: torch.device) -> None:
    if not isinstance(mean_rows, Tensor):
        fix = "Pass torch.tensor(rows, device=x.device)"
        refuse(TypeError, op, "mean_rows", "be a 0-d tensor", type(mean_rows).__name__, fix)
    if mean_rows.dim() != 0:
        fix = "Pass one number for the whole batch"
        refuse(ValueError, op, "mean_rows", "be a 0-d tensor", f"shape {tuple(mean_rows.shape)}", fix)
    if mean_rows.device != device:
        fix = "Call mean_rows.to(x.device)"
        refuse(ValueError, op, "mean_rows", f"be on {device} as x is", mean_rows.device, fix)
