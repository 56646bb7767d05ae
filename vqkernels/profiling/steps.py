"""What a step of a layer must give: ours to the bounds of float64, a peer's as far as its codes say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.checks import check_seed
from vqkernels.profiling.float64 import family, family_bounds
from vqkernels.profiling.oracle import Oracle
from vqkernels.profiling.peers import Bound, Contender, Layer

# rows at either end of a batch whose steps of ours are held to float64
ROWS = 2048
SEED = 20240607
NOISE_STD = 1e-3**0.5


def drawn(device: torch.device) -> Tensor:
    """The seed that the next layer of ours will draw; torch stands where it will draw it."""
    torch.manual_seed(SEED)
    seed = check_seed("bench", None, device)
    torch.manual_seed(SEED)
    return seed


class Part(NamedTuple):
    """What some rows of a batch must give, in float64, and how far each value may be from it."""

    z: Tensor
    grad_x: Tensor
    grad_codes: Tensor
    z_bound: Tensor
    x_bound: Tensor
    codes_bound: Tensor


def part(function: str, x: Tensor, codes: Tensor, grad: Tensor, seed: Tensor, row_offset: int) -> Part:
    """Codes as the reference finds them, values and gradients as float64 autograd of the published formulas.

    Args:
        function: "diveq" or "sf_diveq".
        x: (N, D), rows from `row_offset` on. codes: (K, D). grad: (N, D), of z. seed: of dither and noise.
        row_offset: number of the first row.
    """
    d = x.shape[1]
    found = getattr(vq, function)(x, codes, seed=seed, row_offset=row_offset, backend="reference")
    position = found.position if function == "sf_diveq" else None
    flat, wide = (t.detach().double().requires_grad_() for t in (x, codes))
    noise = {"direction": "noisy", "noise_std": NOISE_STD}
    f = family(flat, wide, found[1], position=position, seed=int(seed), row_offset=row_offset, **noise)
    grad_x, grad_codes = torch.autograd.grad(f.z, (flat, wide), grad.double())
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    z_bound, x_bound, p_bounds = family_bounds(
        f, flat.detach(), grad, dtype=arithmetic, stored=x.dtype, **noise
    )
    total, size = torch.zeros_like(grad_codes), torch.zeros_like(grad_codes)
    for m, bound in enumerate(p_bounds):
        total.index_add_(0, found[1] + m, bound.expand(-1, d))
        length = f.weights[m] * grad.double().norm(dim=1, keepdim=True)
        size.index_add_(0, found[1] + m, length.expand(-1, d))
    # sums of so many terms in the precision of the arithmetic, stored in that of the codes
    terms = int(torch.bincount(found[1]).max())
    total += size * (terms * torch.finfo(arithmetic).eps + torch.finfo(codes.dtype).eps)
    return Part(f.z.detach(), grad_x, grad_codes, z_bound, x_bound, total)


def _within(what: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
    # what is not a number is within no bound
    good = (found.double() - expected).abs() <= bound
    if not bool(good.all()):
        wrong = int((~good).sum())
        raise ValueError(f"{what}: {wrong} of {good.numel()} values are not those of float64")


class Expected:
    """What the steps of ours must give for one batch; of all layers of one function the same."""

    def __init__(self, function: str, x: Tensor, codes: Tensor, grad: Tensor):
        self.x, self.codes, self.grad = x, codes, grad
        self.seed = drawn(x.device)
        with torch.no_grad():
            found = getattr(vq, function)(x, codes, seed=self.seed)
        self.indices = found[1]
        self.position = found.position if function == "sf_diveq" else None
        self.rows = min(ROWS, len(x))
        self.first = part(function, x[: self.rows], codes, grad[: self.rows], self.seed, 0)
        start = len(x) - self.rows
        self.last = part(function, x[start:], codes, grad[start:], self.seed, start)

    def check_first(self, z: Tensor, grad_x: Tensor, grad_codes: Tensor) -> None:
        """A step of the first rows alone: z and both gradients; raises where one is beyond its bound."""
        expected = self.first
        _within("z", z, expected.z, expected.z_bound)
        _within("gradient of x", grad_x, expected.grad_x, expected.x_bound)
        _within("gradient of the codes", grad_codes, expected.grad_codes, expected.codes_bound)

    def check_all(self, z: Tensor, grad_x: Tensor, grad_codes: Tensor) -> None:
        """A step of all rows: z and the gradient of x at both ends, and the sums of both gradients."""
        ends = ((slice(self.rows), self.first), (slice(len(self.x) - self.rows, None), self.last))
        for rows, expected in ends:
            _within("z", z[rows], expected.z, expected.z_bound)
            _within("gradient of x", grad_x[rows], expected.grad_x, expected.x_bound)
        total = grad_x.sum(0, dtype=torch.float64) + grad_codes.sum(0, dtype=torch.float64)
        bound = self.sum_bound(grad_x, grad_codes)
        _within("sum of both gradients", total, self.grad.sum(0, dtype=torch.float64), bound)

    def sum_bound(self, grad_x: Tensor, grad_codes: Tensor) -> Tensor:
        """Largest error of what x and the codes get together, (D,), which is what z got.

        In the arithmetic of a row 4 eps (|g| + sum_m |dL/dp_m|), where the second is at most the first; in the sum of
        a code eps |dL/dp_m| for each of its terms; and what storing both gradients rounds.
        """
        eps = torch.finfo(torch.promote_types(self.x.dtype, torch.float32)).eps
        of_x, of_codes = (
            torch.finfo(t.dtype).eps * t.abs().sum(0, dtype=torch.float64) for t in (grad_x, grad_codes)
        )
        length = torch.linalg.vector_norm(self.grad, dim=1, dtype=torch.float64)
        terms = torch.bincount(self.indices, minlength=len(self.codes))
        if self.position is None:
            # what z got and x did not, the code got
            given = (self.grad - grad_x).abs() + torch.finfo(grad_x.dtype).eps * grad_x.abs()
            summed = (terms[self.indices][:, None] * given).sum(0, dtype=torch.float64)
            return of_x + of_codes + eps * (8 * length.sum() + summed)
        terms[1:] += terms[:-1].clone()
        summed = torch.zeros_like(of_x)
        for m, weight in enumerate((1 - self.position, self.position)):
            error = (self.codes[self.indices + m] - self.x).float()
            # |w (g . u) e / r| with a unit u; a row on its code gives nothing
            most = weight * length * terms[self.indices + m] / error.norm(dim=1).clamp_min(1e-30)
            summed += (most[:, None] * error.abs()).sum(0)
        return of_x + of_codes + eps * (8 * length.sum() + summed)


def check_peer(layer: Layer, before: Tensor | None, x: Tensor, z: Tensor) -> None:
    """A peer's rows move as far as the nearest of its codes is, or on a curve no farther than a code; else ValueError.

    Args:
        layer: of a peer.
        before: (K, D) its codes before the call, which may change them; None where it shows none.
        x: (N, D) what it was called with. z: (N, D) what it gave.
    """
    if before is None:
        return
    oracle = Oracle(x, before)
    rows = oracle.x.double()
    step = (z[oracle.rows].double() - rows).norm(dim=1)
    # a search in the precision of x may take a code whose rounded distance is no greater
    slack = (
        x.shape[1] * torch.finfo(x.dtype).eps * (rows.norm(dim=1) + before.double().norm(dim=1).amax()) ** 2
    )
    if layer.curve:
        farthest = torch.cdist(rows, before.double()).amax(1)
        wrong = (step.square() > farthest.square() + slack) | (step == 0)
    else:
        wrong = (step.square() - oracle.sq_dist).abs() > slack
    if bool(wrong.any()) or not bool(step.isfinite().all()):
        raise ValueError(
            f"{int(wrong.sum())} of {len(wrong)} checked rows do not move as far as its codes are"
        )


class Steps:
    """Checks of the layers of one case."""

    def __init__(self, x: Tensor, codes: Tensor, grad: Tensor):
        self.x, self.codes, self.grad = x, codes, grad
        self._expected: dict[str, Expected] = {}
        self._before: Tensor | None = None

    def begin(self, layer: Layer | None) -> None:
        """Before the call that will be checked: what it draws becomes known, and what it changes is kept."""
        shown = None if layer is None or layer.codes is None else layer.codes()
        self._before = None if shown is None else shown.detach().clone()
        drawn(self.x.device)

    def check(self, contender: Contender, run: Bound, result: Sequence[Tensor]) -> None:
        """The step of all rows, and of ours one of some rows more; ValueError where it is not what it must be."""
        z, *grads = result
        if z.shape != self.x.shape or not all(t.isfinite().all() for t in (z, *grads)):
            raise ValueError("output or gradient of another shape, or not finite")
        if not contender.ours:
            check_peer(run.layer or Layer(lambda x: x), self._before, self.x, z)
            return
        if contender.function is None:
            raise ValueError("a layer of ours must name the function it runs")
        expected = self._expect(contender.function)
        expected.check_all(*_three(z, grads))
        drawn(self.x.device)
        some: Any = run(self.x[: expected.rows])
        expected.check_first(*_three(some[0], some[1:]))

    def _expect(self, function: str) -> Expected:
        if function not in self._expected:
            self._expected[function] = Expected(function, self.x, self.codes, self.grad)
        return self._expected[function]


def _three(z: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if len(grads) != 2:
        raise ValueError(f"{len(grads)} gradients, where x and the codes get one each")
    return z, grads[0], grads[1]
