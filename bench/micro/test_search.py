"""One search at a time: exact and not, prepared, on the curve, and the preparation alone."""

from __future__ import annotations

import torch
from every_op import same

import vqkernels as vq
from vqkernels.testing import brute_force, brute_force_segment

# rows that are compared with float64
CHECKED = 48


def test_nearest_code(benchmark, inputs, need):
    need("nearest_code")
    run = lambda: vq.nearest_code(inputs.on_x, inputs.on_codes, backend="native")  # noqa: E731
    check(inputs, run())
    benchmark(run)


def test_nearest_code_fast(benchmark, inputs, need):
    need("nearest_code")
    run = lambda: vq.nearest_code(inputs.on_x, inputs.on_codes, exact=False, backend="native")  # noqa: E731
    indices, sq_dist = (each.flatten()[:CHECKED] for each in run())
    _, least = brute_force(inputs.x[:CHECKED], inputs.codes)
    chosen = (inputs.x[:CHECKED].double() - inputs.codes.double()[indices]).square().sum(1)
    good = inputs.finite[:CHECKED]
    # it is the distance of the code that was chosen, and that is as near as half precision can tell
    torch.testing.assert_close(sq_dist[good].double(), chosen[good], rtol=1e-5, atol=1e-5)
    reach = inputs.x.double()[inputs.finite].norm(dim=1).amax() + inputs.codes.double().norm(dim=1).amax()
    assert (chosen[good] - least[good] <= 2.0**-7 * reach**2).all()
    benchmark(run)


def test_nearest_code_prepared(benchmark, inputs, need):
    need("nearest_code")
    handle = vq.prepare(inputs.on_codes, backend="native")
    run = lambda: vq.nearest_code(inputs.on_x, handle, backend="native")  # noqa: E731
    check(inputs, run())
    benchmark(run)


def test_prepare(benchmark, inputs, need):
    need("nearest_code")
    run = lambda: vq.prepare(inputs.on_codes, backend="native")  # noqa: E731
    check(inputs, vq.nearest_code(inputs.on_x, run(), backend="native"))
    benchmark(run)


def test_nearest_segment(benchmark, inputs, need):
    need("nearest_segment")
    run = lambda: vq.nearest_segment(inputs.on_x, inputs.on_codes, backend="native")  # noqa: E731
    found = run()
    rows = min(CHECKED, (1 << 18) // inputs.codes.numel() + 1)
    expected = brute_force_segment(inputs.x[:rows], inputs.codes)
    for got, wanted, what in zip(found, expected, ("segments", "position", "sq_dist"), strict=True):
        same(got.flatten()[:rows], wanted.to(got.dtype), what)
    benchmark(run)


def check(inputs, found):
    """The first rows equal float64, distances too."""
    indices, least = brute_force(inputs.x[:CHECKED], inputs.codes)
    same(found.indices.flatten()[:CHECKED], indices, "indices")
    same(found.sq_dist.flatten()[:CHECKED], least.to(found.sq_dist.dtype), "sq_dist")
