"""Run every op on every backend at small awkward shapes and compare with float64; made for compute-sanitizer.

    compute-sanitizer --tool memcheck python bench/every_op.py [--device cuda] [--seconds 40]

The inputs are on the device, the expectations on the CPU, so that few kernels run that are not ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels import philox
from vqkernels.ops import OPS
from vqkernels.ops.philox import philox_op
from vqkernels.testing import brute_force, brute_force_segment, family, family_bounds, strided

# N, K, D: a single pair, tails of every tile, more codes than rows, long rows, an odd number of features
SHAPES = [(129, 130, 17), (1, 1, 1), (300, 1000, 64), (65, 257, 130), (127, 33, 8), (33, 70, 515)]
LAYOUTS = ("contiguous", "sliced", "channels")
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
SEED, NOISE = 987654321, 0.03

Case = tuple[str, Callable[[], None]]


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise where two tensors differ in a bit, NaN counting as equal."""
    found = found.cpu()
    if not torch.allclose(found.double(), expected.double(), rtol=0, atol=0, equal_nan=True):
        wrong = int((found.double() != expected.double()).sum())
        raise ValueError(f"{what}: {wrong} of {expected.numel()} values differ from float64")


def within(found: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Raise where an error exceeds its bound."""
    error = (found.cpu().double() - expected).abs()
    if not (error <= bound).all():
        raise ValueError(f"{what}: error {float((error - bound).max()):.3g} above its bound")


class Inputs:
    """Latents with a row that is not finite, codes with a duplicate, and where they live."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, device: torch.device):
        n, k, d = shape
        generator = torch.Generator().manual_seed(n + k + d)
        # numbers that are the same in every dtype: both sides search the same rows
        self.codes = torch.randn(k, d, generator=generator).to(dtype)
        self.x = (torch.randn(n, d, generator=generator) + self.codes.float()[torch.arange(n) % k] / 2).to(
            dtype
        )
        if n > 8:
            self.x[5, d // 2] = torch.nan
        if k > 8:
            self.codes[7] = self.codes[3]
        self.on_codes = self.codes.to(device)
        self.on_x = strided(self.x.to(device), layout)
        self.finite = self.x.isfinite().all(1)
        self.grad = torch.randn(n, d, generator=generator).to(dtype)


def nearest(inputs: Inputs, backend: str, exact: bool) -> None:
    """Indices and distances equal brute force; without exactness, the distance is that of the index."""
    expected, least = brute_force(inputs.x, inputs.codes)
    indices, sq_dist = vq.nearest_code(inputs.on_x, inputs.on_codes, exact=exact, backend=backend)
    if exact:
        same(indices.flatten(), expected, "indices")
        same(sq_dist.flatten(), least.to(sq_dist.dtype), "sq_dist")
        return
    chosen = inputs.codes.double()[indices.flatten().cpu()]
    regret = ((inputs.x.double() - chosen).square().sum(1) - least)[inputs.finite]
    # a search that works in half precision misses by what that resolves
    reach = inputs.x.double()[inputs.finite].norm(dim=1).amax() + inputs.codes.double().norm(dim=1).amax()
    if not (regret <= 2.0**-7 * reach**2).all():
        raise ValueError(f"exact=False: regret {float(regret.max()):.3g}")


def prepared(inputs: Inputs, backend: str) -> None:
    """A prepared codebook finds the same."""
    handle = vq.prepare(inputs.on_codes, backend=backend)
    indices = vq.nearest_code(inputs.on_x, handle, backend=backend).indices
    same(indices.flatten(), brute_force(inputs.x, inputs.codes)[0], "indices of a handle")


def grouped(inputs: Inputs, backend: str) -> None:
    """Two groups in one call, the second of negated codes in another order, find what each finds alone."""
    books = torch.stack([inputs.codes, -inputs.codes.flip(0)])
    on_books, on_x = books.to(inputs.on_x.device), inputs.on_x
    indices, sq_dist = vq.nearest_code(on_x.expand(2, *on_x.shape), on_books, backend=backend)
    for group, codes in enumerate(books):
        expected, least = brute_force(inputs.x, codes)
        same(indices[group].flatten(), expected, f"indices of group {group}")
        same(sq_dist[group].flatten(), least.to(sq_dist.dtype), f"sq_dist of group {group}")


def segment(inputs: Inputs, backend: str) -> None:
    """Segments, positions and distances equal brute force."""
    expected = brute_force_segment(inputs.x, inputs.codes)
    found = vq.nearest_segment(inputs.on_x, inputs.on_codes, backend=backend)
    for got, wanted, what in zip(found, expected, ("segments", "position", "sq_dist"), strict=True):
        same(got.flatten(), wanted.to(got.dtype), what)


def sums(inputs: Inputs, backend: str) -> None:
    """Counts equal a float64 loop, sums within the roundings of their additions."""
    k, d = inputs.codes.shape
    indices = torch.arange(len(inputs.x)) % (k + 1) - 1
    on = indices.to(inputs.on_x.device).view(inputs.on_x.shape[:-1])
    counts, total = vq.code_sums(inputs.on_x, on, k, backend=backend)
    used = inputs.finite & (indices >= 0)
    wanted = torch.zeros(k, d, dtype=torch.float64).index_add_(0, indices[used], inputs.x[used].double())
    size = torch.zeros(k, d, dtype=torch.float64).index_add_(0, indices[used], inputs.x[used].double().abs())
    number = torch.bincount(indices[used], minlength=k)
    same(counts, number, "counts")
    within(total, wanted, (number[:, None] + 1) * torch.finfo(total.dtype).eps * size, "sums")


def move(inputs: Inputs, backend: str, direction: str, curve: bool) -> None:
    """z and both gradients within the bounds of float64 autograd."""
    n, k = len(inputs.x), len(inputs.codes)
    indices = torch.arange(n) % (k - 1 if curve else k)
    position = torch.linspace(0, 1, n) if curve else None
    device, leading = inputs.on_x.device, inputs.on_x.shape[:-1]
    x, codes = inputs.on_x.detach().requires_grad_(), inputs.on_codes.detach().requires_grad_()
    at = None if position is None else position.to(device).view(leading)
    options = {"direction": direction, "noise_std": NOISE, "seed": torch.full((), SEED, device=device)}
    z = vq.directional(x, codes, indices.to(device).view(leading), position=at, backend=backend, **options)
    z.backward(inputs.grad.to(device).view(z.shape))
    keep = inputs.finite
    flat, table = (t.double().clone().requires_grad_() for t in (inputs.x[keep], inputs.codes))
    # noise depends on the number of a row, so the oracle sees all rows, those that are not finite as zeros
    whole = torch.zeros(n, flat.shape[1], dtype=torch.float64).index_put((keep.nonzero()[:, 0],), flat)
    chosen = {"position": position, "seed": SEED, "noise_std": NOISE, "direction": direction}
    f = family(whole, table, indices, **chosen)
    grad = torch.where(keep[:, None], inputs.grad.double(), 0)
    f.z.backward(grad)
    arithmetic = torch.promote_types(inputs.x.dtype, torch.float32)
    kinds = {"direction": direction, "noise_std": NOISE, "dtype": arithmetic, "stored": inputs.x.dtype}
    z_bound, x_bound, p_bounds = family_bounds(f, whole.detach(), grad, **kinds)
    width = inputs.x.shape[1]
    within(z.detach().reshape(n, width)[keep.to(device)], f.z.detach()[keep], z_bound[keep], "z")
    within(x.grad.reshape(n, width)[keep.to(device)], flat.grad, x_bound[keep], "gradient of x")
    bound, size = torch.zeros_like(table), torch.zeros_like(table)
    for m, (each, weight) in enumerate(zip(p_bounds, f.weights, strict=True)):
        bound.index_add_(0, indices + m, torch.where(keep[:, None], each, 0).expand(n, width))
        size.index_add_(0, indices + m, (weight * grad.norm(dim=1, keepdim=True)).expand(n, width))
    rows = int(torch.bincount(indices, minlength=k).max())
    eps = rows * torch.finfo(arithmetic).eps + torch.finfo(inputs.codes.dtype).eps
    within(codes.grad, table.grad, bound + size * eps, "gradient of the codebook")


def cross(inputs: Inputs, backend: str, rotation: bool) -> None:
    """z is the code; the loss and both gradients are those of float64 formulas."""
    n, k, d = len(inputs.x), *inputs.codes.shape
    indices = torch.arange(n) % k
    device, leading = inputs.on_x.device, inputs.on_x.shape[:-1]
    x, codes = inputs.on_x.detach().requires_grad_(), inputs.on_codes.detach().requires_grad_()
    chosen = {"rotation": rotation, "commitment": 0.25, "codebook_weight": 1.0, "sync": 0.5}
    z, loss = vq.straight_through(x, codes, indices.to(device).view(leading), **chosen, backend=backend)
    keep = inputs.finite
    upstream = int(keep.sum()) * d / 2.0
    torch.autograd.backward((z, loss), (inputs.grad.to(device).view(z.shape), loss.new_tensor(upstream)))
    flat, g = inputs.x[keep].double(), inputs.grad[keep].double()
    c = inputs.codes.double()[indices[keep]]
    arithmetic = torch.promote_types(inputs.x.dtype, torch.float32)
    eps, store = torch.finfo(arithmetic).eps, torch.finfo(inputs.x.dtype).eps
    same(z.detach().reshape(n, d)[keep.to(device)], c, "z")
    square = (flat - c).square().sum(1).sum() * 1.25 / (2 * upstream)
    within(loss.detach(), square, (d + 8) * eps * square, "loss")
    expected, bound = g, 2 * eps * g.abs()
    if rotation:
        lengths = flat.norm(dim=1, keepdim=True), c.norm(dim=1, keepdim=True)
        u, v = flat / lengths[0], c / lengths[1]
        s, rho = u + v, lengths[1] / lengths[0]
        size = s.norm(dim=1, keepdim=True)
        mirrored = g - 2 * u * (u * g).sum(1, keepdim=True)
        turned = g - 2 * s * (s * g).sum(1, keepdim=True) / size**2 + 2 * u * (v * g).sum(1, keepdim=True)
        expected = rho * torch.where(size > 2.0**-18, turned, mirrored)
        lost = torch.where(size > 2.0**-18, 8 / size, 8)
        bound = rho * g.norm(dim=1, keepdim=True) * (d + 16) * eps * (1 + lost)
    expected = expected + 0.25 * (flat - c)
    bound = bound + 8 * eps * (flat - c).abs()
    bound = bound + store * (expected.abs() + bound)
    within(x.grad.reshape(n, d)[keep.to(device)], expected, bound, "gradient of x")
    own, table = c - flat + 0.5 * g, torch.zeros(k, d, dtype=torch.float64)
    expected = table.index_add(0, indices[keep], own)
    terms = table.index_add(0, indices[keep], (c - flat).abs() + 0.5 * g.abs())
    rows = int(torch.bincount(indices, minlength=k).max())
    bound = (rows + 8) * eps * terms + store * expected.abs()
    within(codes.grad, expected, bound, "gradient of the codebook")


def words(backend: str, device: torch.device) -> None:
    """Random words to the bit."""
    seed = torch.full((), SEED, device=device)
    found, _ = philox_op(seed, 37, 5, 1, 2**32 - 9, backend=backend)
    rows = torch.arange(37) + 2**32 - 9
    same(found, philox.words(torch.tensor(SEED), rows, 5, 1), "words")


def of_op(op: str, inputs: Inputs, backend: str) -> Iterator[Case]:
    """What is run of an op on one set of inputs."""
    if op == "nearest_code":
        yield "", lambda: nearest(inputs, backend, True)
        yield "fast", lambda: nearest(inputs, backend, False)
        yield "grouped", lambda: grouped(inputs, backend)
        if hasattr(vq, "prepare"):
            yield "prepared", lambda: prepared(inputs, backend)
    elif op == "nearest_segment" and len(inputs.codes) > 1 and inputs.x.numel() * len(inputs.codes) < 1 << 21:
        yield "", lambda: segment(inputs, backend)
    elif op == "code_sums":
        yield "", lambda: sums(inputs, backend)
    elif op == "directional_backward":
        # forward and backward together; float64 normals would be another bound
        yield "noisy", lambda: move(inputs, backend, "noisy", False)
        if len(inputs.codes) > 1:
            yield "curve", lambda: move(inputs, backend, "noisy", True)
    elif op == "straight_through_backward":
        yield "identity", lambda: cross(inputs, backend, False)
        yield "rotation", lambda: cross(inputs, backend, True)


def cases(device: torch.device, backends: Sequence[str]) -> Iterator[Case]:
    """Every case, so ordered that a run that is cut short has seen every op and backend."""
    for backend in backends:
        if OPS["philox"].explain_for(device, ())[backend] is None:
            yield f"philox {backend}", lambda backend=backend: words(backend, device)
    for number, shape in enumerate(SHAPES):
        for turn, dtype in enumerate(DTYPES):
            layout = LAYOUTS[(number + turn) % len(LAYOUTS)]
            inputs = Inputs(shape, dtype, layout, device)
            for op in (
                "nearest_code",
                "directional_backward",
                "straight_through_backward",
                "code_sums",
                "nearest_segment",
            ):
                for backend in backends:
                    if OPS[op].explain_for(device, (dtype, dtype))[backend] is not None:
                        continue
                    for words_, run in of_op(op, inputs, backend):
                        kind = str(dtype).removeprefix("torch.")
                        yield f"{op} {backend} {words_} {shape} {kind} {layout}", run


def main() -> int:
    """Run until the time is over; 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this long")
    parser.add_argument("--backends", nargs="+", default=["triton", "native"])
    options = parser.parse_args()
    began = time.perf_counter()
    device = torch.device(options.device)
    for backend in options.backends:
        reason = OPS["nearest_code"].explain_for(device)[backend]
        if reason is not None:
            print(f"{backend}: {reason}")
    chosen = list(cases(device, options.backends))
    wrong = done = 0
    for name, run in chosen:
        if time.perf_counter() - began > options.seconds:
            break
        try:
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
        except (ValueError, RuntimeError) as error:
            wrong += 1
            print(f"WRONG {name}: {error}", flush=True)
            if "CUDA" in str(error):
                # nothing can run on the device after this
                break
        done += 1
    print(f"{done} of {len(chosen)} cases in {time.perf_counter() - began:.0f} s, {wrong} wrong")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
