"""A code drawn for each row with a probability that falls with its distance: `sample_code`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels import philox
from vqkernels.checks import check_count, check_pair, check_seed, check_temperature
from vqkernels.dispatch import Op
from vqkernels.ops._arithmetic import arithmetic
from vqkernels.ops._layout import collapse
from vqkernels.ops._logits import at_least_tiny, centred, chunks, half_logits
from vqkernels.ops.nearest_code import nearest_code_op
from vqkernels.ops.philox import philox_op

# probabilities are added up in groups of so many codes, then over groups
_GROUP = 32


def _reference(x: Tensor, codebook: Tensor, seed: Tensor, temperature: Tensor, row_offset: int) -> Tensor:
    nearest = None
    # only a cpu can look at a value for free
    if temperature.device.type != "cpu" or float(temperature) == 0:
        nearest, _ = nearest_code_op(x, codebook, None, True, [])
        if temperature.device.type == "cpu":
            return nearest
    flat, dtype = x.reshape(-1, x.shape[-1]), arithmetic(x, codebook)
    words, _ = philox_op(seed, len(flat), 1, philox.SAMPLING, row_offset)
    uniform = philox.uniforms(words)[:, 0, :1].double()
    indices = torch.empty(len(flat), dtype=torch.int64, device=x.device)
    # autocast would make the products half ones
    with torch.autocast(x.device.type, enabled=False):
        codes = centred(codebook, dtype)
        for chunk in chunks(flat, codes):
            logits = half_logits(chunk, codes)
            logits.sub_(logits.amax(1, keepdim=True)).mul_(2).div_(at_least_tiny(temperature, dtype))
            drawn, total = _invert(logits.exp_(), uniform[chunk.rows])
            indices[chunk.rows] = torch.where(chunk.finite & total.isfinite(), drawn, 0)
    found = indices.view(x.shape[:-1])
    return found if nearest is None else torch.where(temperature == 0, nearest, found)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first code whose sum of weights (n, K) up to itself exceeds uniform (n, 1) times all of them, and that sum."""
    n, num_codes = weights.shape
    padded = F.pad(weights, (0, -num_codes % _GROUP)).view(n, -1, _GROUP)
    # a sum of 32 in float32 would be off by more than a step of the uniform number
    sums = padded.sum(2, dtype=torch.float64).cumsum_(1)  # (n, groups)
    total = sums[:, -1:]
    target = uniform * total
    group = torch.searchsorted(sums, target, right=True).clamp_max_(sums.shape[1] - 1)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp_min(0)), 0)
    inside = padded[torch.arange(n, device=weights.device), group[:, 0]].double()  # (n, 32)
    code = torch.searchsorted(inside.cumsum(1), target - before, right=True)
    # the sum over a group and the sums within it round differently: then it is the last one with a weight
    last = torch.where(inside > 0, torch.arange(_GROUP, device=weights.device), 0).amax(1, keepdim=True)
    return (group * _GROUP + torch.minimum(code, last))[:, 0], total[:, 0]


def _fake(x: Tensor, *rest) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


sample_code_op = Op(
    "sample_code",
    "(Tensor x, Tensor codebook, Tensor seed, Tensor temperature, SymInt row_offset) -> Tensor",
    reference=_reference,
    fake=_fake,
)


def sample_code(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Draw a code for each row, nearer ones more often, in chunks of rows.

        P(i = j | x) = softmax_j(-|x - c_j|^2 / tau)        (Huh et al. eq. 12)

    One uniform number U per row, a multiple of 2^-24, chooses the first code whose cumulative probability exceeds it,
    so a probability is kept within 2^-24 and the error of the logits: float32 products of latents and codes less the
    mean code m, within (D + 6) eps (|x - m| + |c_j - m|) |c_j - m| / tau; float64 where an input is. No gradient flows.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device, K >= 1.
        temperature: tau >= 0 in units of x squared, a number or a 0-d tensor, whose value is not looked at; 0 takes
            the nearest code, by the contract of `nearest_code`.
        seed: an int, a 0-d int64 tensor on x's device, or None to draw one from torch.
        row_offset: number of the first row: two halves of a batch with offsets 0 and N/2 equal the whole.
        backend: "reference"; the default.

    Returns:
        (...) int64; 0 for a row of x with a NaN or Inf, or so far off that its logits leave the range of their dtype.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or values do not fit, or K = 0.
        BackendError: `backend` cannot run these inputs.
    """
    check_pair("sample_code", x, codebook)
    tau = check_temperature("sample_code", temperature, x.device, zero=True)
    check_count("sample_code", "row_offset", row_offset)
    seed = check_seed("sample_code", seed, x.device)
    indices = sample_code_op(collapse(x.detach()), codebook.detach(), seed, tau, row_offset, backend=backend)
    return indices.view(x.shape[:-1])
