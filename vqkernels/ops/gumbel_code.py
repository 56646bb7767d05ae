"""The straight-through Gumbel-softmax over all codes, forward and backward: `gumbel_code`, `gumbel_code_backward`.

    l_j = -|x - c_j|^2,   y = softmax((l + g) / tau),   i = argmax_j (l_j + g_j),   z = c_i
    KL  = ln K + sum_j q_j ln q_j,   q = softmax(l)

g is drawn from the seed, again in the backward pass, and logits are made again, so that nothing of size N x K is kept.
Backward takes z for sum_j y_j c_j, with y hard as a factor of the codes' gradient and soft for its own:

    w      = y (a - sum_j y_j a_j) / tau + dL/dKL q (ln q - sum_j q_j ln q_j),   a_j = dL/dz . c_j
    dL/dx  = sum_j w_j (-2) (x - c_j)
    dL/dc_j = sum_n w_nj 2 (x_n - c_j) + sum_{n : i_n = j} dL/dz_n
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import philox
from vqkernels.checks import check_count, check_pair, check_seed, check_temperature
from vqkernels.dispatch import Op
from vqkernels.ops._arithmetic import arithmetic
from vqkernels.ops._layout import collapse
from vqkernels.ops._logits import Chunk, at_least_tiny, centred, chunks, half_logits
from vqkernels.ops.philox import philox_op

_ARGUMENTS = "Tensor x, Tensor codebook, Tensor seed, Tensor temperature, SymInt row_offset"


class GumbelCode(NamedTuple):
    """What `gumbel_code` returns."""

    z: Tensor
    indices: Tensor
    kl: Tensor


def gumbel_noise(seed: Tensor, rows: int, num_codes: int, row_offset: int, dtype: torch.dtype) -> Tensor:
    """Gumbel(0, 1) variables of rows `row_offset`, `row_offset` + 1, ...: (rows, K) in float32 or float64."""
    words, _ = philox_op(seed, rows, (num_codes + 3) // 4, philox.GUMBEL, row_offset)
    return philox.gumbels(words, dtype).flatten(1)[:, :num_codes]


def _noise(chunk: Chunk, num_codes: int, seed: Tensor, row_offset: int) -> Tensor:
    start, count = chunk.rows.start + row_offset, chunk.rows.stop - chunk.rows.start
    return gumbel_noise(seed, count, num_codes, start, chunk.x.dtype)


def _reference(
    x: Tensor, codebook: Tensor, seed: Tensor, temperature: Tensor, row_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    flat, dtype = x.reshape(-1, x.shape[-1]), arithmetic(x, codebook)
    z = torch.empty_like(flat, memory_format=torch.contiguous_format)
    indices = torch.empty(len(flat), dtype=torch.int64, device=x.device)
    kl = torch.empty(len(flat), dtype=dtype, device=x.device)
    # autocast would make the products half ones
    with torch.autocast(x.device.type, enabled=False):
        codes = centred(codebook, dtype)
        for chunk in chunks(flat, codes):
            logits = half_logits(chunk, codes).mul_(2)
            log_q = torch.log_softmax(logits, dim=1)
            # nan where logits left the range of their dtype: such a row is treated like one that is not finite
            divergence = math.log(len(codebook)) + log_q.exp().mul_(log_q).sum(1)
            kl[chunk.rows] = torch.where(chunk.finite, divergence.clamp_min(0), torch.nan)
            good = kl[chunk.rows].isfinite()
            best = logits.add_(_noise(chunk, len(codebook), seed, row_offset)).argmax(1)
            indices[chunk.rows] = torch.where(good, best, 0)
            chosen = codebook[indices[chunk.rows]].to(x.dtype)
            z[chunk.rows] = torch.where(good[:, None], chosen, torch.nan)
    shape = x.shape[:-1]
    return torch.empty_like(x).copy_(z.view(x.shape)), indices.view(shape), kl.view(shape)


def _reference_backward(
    grad: Tensor,
    grad_kl: Tensor,
    x: Tensor,
    codebook: Tensor,
    seed: Tensor,
    temperature: Tensor,
    row_offset: int,
    indices: Tensor,
    kl: Tensor,
) -> tuple[Tensor, Tensor]:
    flat, dtype = x.reshape(-1, x.shape[-1]), arithmetic(x, codebook)
    upstream, upstream_kl = grad.reshape(flat.shape), grad_kl.flatten()
    index, alive = indices.flatten(), kl.flatten().isfinite()
    grad_x = torch.empty_like(flat, memory_format=torch.contiguous_format)
    total = torch.zeros(codebook.shape, dtype=dtype, device=x.device)
    weight = torch.zeros(len(codebook), dtype=torch.float64, device=x.device)
    tau = at_least_tiny(temperature, dtype)
    with torch.autocast(x.device.type, enabled=False):
        codes = centred(codebook, dtype)
        for chunk in chunks(flat, codes):
            good = alive[chunk.rows, None]
            g = torch.where(good, upstream[chunk.rows].to(dtype), 0)
            logits = half_logits(chunk, codes).mul_(2)
            w = torch.log_softmax(logits, dim=1)
            logits.add_(_noise(chunk, len(codebook), seed, row_offset))
            q = w.exp()
            w.sub_((q * w).sum(1, keepdim=True)).mul_(q).mul_(upstream_kl[chunk.rows, None])
            y = torch.softmax(logits.sub_(logits.amax(1, keepdim=True)).div_(tau), dim=1)
            a = torch.mm(g, codes.rows.t(), out=q)
            # y comes first: where it is 0, a / tau may be out of range
            w.addcdiv_(a.sub_((y * a).sum(1, keepdim=True)).mul_(y), tau)
            # what is zero times what is not finite
            w = torch.where(good, w, 0)
            # sum_j w_j = 0, so the row itself has no part in its gradient
            moved = torch.mm(w, codes.rows).mul_(2)
            grad_x[chunk.rows] = torch.where(good, moved, torch.nan).to(x.dtype)
            total.addmm_(w.t(), torch.where(good, chunk.x, 0), alpha=2)
            total.index_add_(0, index[chunk.rows], g)
            weight += w.sum(0)
    total.addcmul_(codes.rows, weight[:, None].to(dtype), value=-2)
    return torch.empty_like(x).copy_(grad_x.view(x.shape)), total.to(codebook.dtype)


def _fake(x: Tensor, codebook: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[:-1]
    indices = x.new_empty(shape, dtype=torch.int64)
    return torch.empty_like(x), indices, x.new_empty(shape, dtype=arithmetic(x, codebook))


def _fake_backward(
    grad: Tensor, grad_kl: Tensor, x: Tensor, codebook: Tensor, *rest
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), codebook.new_empty(codebook.shape)


gumbel_code_op = Op(
    "gumbel_code", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", reference=_reference, fake=_fake
)
gumbel_code_backward_op = Op(
    "gumbel_code_backward",
    f"(Tensor grad, Tensor grad_kl, {_ARGUMENTS}, Tensor indices, Tensor kl) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
)


class _GumbelCode(torch.autograd.Function):
    @staticmethod
    def forward(x, codebook, seed, temperature, row_offset, backend):
        return gumbel_code_op(x, codebook, seed, temperature, row_offset, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, row_offset, backend = inputs
        _, indices, kl = output
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(*tensors, indices, kl)
        ctx.row_offset, ctx.backend = row_offset, backend

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _, grad_kl):
        *tensors, indices, kl = ctx.saved_tensors
        found = gumbel_code_backward_op(
            grad, grad_kl, *tensors, ctx.row_offset, indices, kl, backend=ctx.backend
        )
        return *found, None, None, None, None


def gumbel_code(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> GumbelCode:
    """Draw a code for each row by the Gumbel-max trick, with the gradient of the Gumbel-softmax, in chunks of rows.

        y = softmax((l + g) / tau),   l_j = -|x - c_j|^2,   g_j ~ Gumbel(0, 1)             (DiVeQ eq. 5)
        z = sum_j y_j c_j, with y one-hot in value, at argmax_j y_j, and soft in gradient  (straight-through)
        KL(softmax(l) || uniform) = ln K + sum_j q_j ln q_j,   q = softmax(l)              (eq. 6)

    Nothing of size N x K is kept: backward draws the noise and makes the logits again. They are float32 products of
    latents and codes less the mean code m, within (D + 6) eps (|x - m| + |c_j - m|) |c_j - m| of l_j up to one number
    per row; float64 where an input is. g_j = -ln max(-ln U', 2^-25) with U' in (0, 1] a multiple of 2^-24, so it is
    finite. Gradients reach x and the codebook, through z and KL.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device, K >= 1.
        temperature: tau > 0, a number or a 0-d tensor, whose value is not looked at.
        seed: an int, a 0-d int64 tensor on x's device, or None to draw one from torch.
        row_offset: number of the first row: two halves of a batch with offsets 0 and N/2 equal the whole.
        backend: "reference"; the default.

    Returns:
        z: (..., D) the codes, dtype of x. A row of x with a NaN or Inf, or so far off that its logits leave the range
            of their dtype, gives a row of NaN.
        indices: (...) int64, the lowest where several are largest; 0 for such a row.
        kl: (...) in [0, ln K], float32, or float64 when an input is float64; NaN for such a row.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or values do not fit, or K = 0.
        BackendError: `backend` cannot run these inputs.
    """
    check_pair("gumbel_code", x, codebook)
    tau = check_temperature("gumbel_code", temperature, x.device)
    check_count("gumbel_code", "row_offset", row_offset)
    seed = check_seed("gumbel_code", seed, x.device)
    z, indices, kl = _GumbelCode.apply(collapse(x), codebook, seed, tau, row_offset, backend)
    shape = x.shape[:-1]
    return GumbelCode(z.view(x.shape), indices.view(shape), kl.view(shape))
