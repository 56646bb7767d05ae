"""Straight-through Gumbel-softmax: values and gradients against a float64 transcription with the same noise."""

import math

import pytest
import torch
from conftest import DTYPES, INTERPRETED

from vqkernels import philox
from vqkernels.ops import _logits, gumbel_code
from vqkernels.testing import DEVICE, LAYOUTS, clusters, strided

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the op has no triton body")
SEED = 987654321987
SHAPES = [(1, 1, 1), (3, 5, 4), (17, 129, 7), (129, 40, 130)]


def noise(n, k, row_offset=0, seed=SEED):
    rows = torch.arange(n, device=DEVICE) + row_offset
    words = philox.words(torch.tensor(seed, device=DEVICE), rows, -(-k // 4), 3).flatten(1)[:, :k]
    exponential = -(((words >> 8) + 1).double() * 2.0**-24).log()
    return -exponential.clamp_min(2.0**-25).log()


def transcription(x, codes, tau, g, indices=None):
    """DiVeQ eq. 5 and 6 by autograd: z, KL and the noisy logits, in the dtype of x."""
    logits = -(x[:, None] - codes).square().sum(2)
    soft = torch.softmax((logits + g) / tau, dim=1)
    indices = (logits + g).argmax(1) if indices is None else indices
    hard = torch.nn.functional.one_hot(indices, len(codes)).to(x)
    q = torch.log_softmax(logits, dim=1)
    return (hard + soft - soft.detach()) @ codes, math.log(len(codes)) + (q.exp() * q).sum(1), logits + g


def bounds(x, codes, tau, grad, grad_kl, dtype):
    """Largest error of a noisy logit, of KL and of dL/dx of each row (N, 1), and of dL/dc, for arithmetic in `dtype`.

    A logit is a product of D terms of centred vectors (`_logits`); g is two logarithms of size up to 18. Softmax turns
    an absolute error of its argument into a relative one of its values, twice, and adds up K terms.
    """
    (n, d), k, eps = x.shape, len(codes), torch.finfo(dtype).eps
    x, codes, grad = x.double(), codes.double(), grad.double()
    near, far = (x - codes.mean(0)).norm(dim=1, keepdim=True), (codes - codes.mean(0)).norm(dim=1).max()
    logit = (d + 6) * eps * (near + far) * far
    noisy = logit + eps * (40 + 2 * near * far + far**2)
    a = grad.norm(dim=1, keepdim=True) * far
    soft, flat = 4 * noisy / tau + (k + 16) * eps, 4 * logit + (k + 16 + 2 * (near + far) * far) * eps
    kl = flat * (2 * math.log(k) + 2)
    w = (4 * soft.exp() * soft * a + (2 * d + 8) * eps * a) / tau + grad_kl.abs().double()[:, None] * 4 * kl
    size = 2 * a / tau + 2 * grad_kl.abs().double()[:, None] * math.log(k)
    at_x = 2 * far * (w + (k + 2) * eps * size)
    at_code = (
        2 * (near + far) * (w + (n + 4) * eps * size) + (n + 4) * eps * grad.norm(dim=1, keepdim=True)
    ).sum()
    return noisy, kl, at_x, at_code


def differentiate(x, codes, grad, grad_kl, **options):
    x, codes = x.detach().requires_grad_(), codes.detach().requires_grad_()
    found = gumbel_code(x, codes, seed=SEED, **options)
    torch.autograd.backward((found.z, found.kl), (grad.view(found.z.shape), grad_kl.view(found.kl.shape)))
    return found, x.grad, codes.grad


def check(x, codes, tau=0.7, row_offset=0):
    """Everything that the op returns, within the derived bounds."""
    n, d, k = x.shape[:-1].numel(), x.shape[-1], len(codes)
    arithmetic = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    grad, grad_kl = torch.randn(n, d, device=DEVICE).to(x.dtype), torch.randn(n, device=DEVICE).to(arithmetic)
    found, grad_x, grad_codes = differentiate(x, codes, grad, grad_kl, temperature=tau, row_offset=row_offset)
    assert found.z.dtype == grad_x.dtype == x.dtype and grad_codes.dtype == codes.dtype
    assert (
        found.z.shape == x.shape
        and found.kl.dtype == arithmetic
        and grad_x.stride() == torch.empty_like(x).stride()
    )
    indices = found.indices.flatten()
    flat = x.detach().reshape(n, d).double().requires_grad_()
    wide = codes.detach().double().requires_grad_()
    z, kl, noisy = transcription(flat, wide, tau, noise(n, k, row_offset), indices)
    torch.autograd.backward((z, kl), (grad.double(), grad_kl.double()))
    at_logit, at_kl, at_x, at_code = bounds(flat.detach(), wide.detach(), tau, grad, grad_kl, arithmetic)
    gap = noisy.amax(1) - noisy.gather(1, indices[:, None])[:, 0]
    assert (gap <= 2 * at_logit[:, 0]).all()
    assert torch.equal(found.z, codes.detach()[found.indices].to(x.dtype))
    assert ((found.kl.detach().flatten() - kl.detach()).abs() <= at_kl[:, 0]).all()
    assert (found.kl >= 0).all() and (found.kl <= math.log(k) * (1 + 4e-7)).all()
    stored = torch.finfo(x.dtype).eps * flat.grad.abs() + torch.finfo(x.dtype).tiny
    assert ((grad_x.reshape(n, d).double() - flat.grad).abs() <= at_x + stored).all()
    stored = torch.finfo(codes.dtype).eps * wide.grad.abs() + torch.finfo(codes.dtype).tiny
    assert ((grad_codes.double() - wide.grad).abs() <= at_code + stored).all()
    return at_x, flat.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_autograd(shape, dtype):
    x, codes = clusters(*shape, scale=shape[2] ** -0.5)
    check(x.to(dtype), codes.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    x, codes = clusters(60, 9, 10, scale=0.3)
    check(strided(x, layout), codes)


@pytest.mark.parametrize(
    "pair", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)]
)
def test_mixed_dtypes(pair):
    x, codes = clusters(33, 9, 10, scale=0.3)
    check(x.to(pair[0]), codes.to(pair[1]))


@pytest.mark.parametrize("tau", [0.05, 1.0, 30.0])
def test_temperatures(tau):
    x, codes = clusters(33, 9, 10, scale=0.3)
    check(x, codes, tau)
    assert torch.equal(
        gumbel_code(x, codes, seed=1, temperature=tau).z,
        gumbel_code(x, codes, seed=1, temperature=torch.tensor(tau, device=DEVICE)).z,
    )


def test_a_common_offset_costs_nothing():
    """At an offset of 1e3 the bound is that of centred data, where squared norms alone would be off by more than 1."""
    x, codes = clusters(60, 9, 16, spread=0.3, scale=0.25, offset=1e3)
    at_x, expected = check(x, codes, 0.5)
    assert at_x.max() < 1e-2 * expected.abs().max()


def test_derivatives_are_those_of_the_soft_codes():
    """Finite differences of KL, and of z with y soft in its own gradient and hard as the codes' factor."""
    x, codes = (t.double() for t in clusters(5, 6, 3, scale=0.4))
    leaves = x.requires_grad_(), codes.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: gumbel_code(x, c, seed=SEED).kl, leaves)
    g, indices, fixed = noise(5, 6), gumbel_code(x, codes, seed=SEED).indices, codes.detach().clone()

    def surrogate(x, codes):
        logits = -(x[:, None] - codes).square().sum(2)
        return codes[indices] + torch.softmax((logits + g) / 0.6, dim=1) @ fixed

    assert torch.autograd.gradcheck(surrogate, leaves)
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(surrogate(x, codes), leaves, grad)
    found = torch.autograd.grad(gumbel_code(x, codes, temperature=0.6, seed=SEED).z, leaves, grad)
    *_, at_x, at_code = bounds(x.detach(), fixed, 0.6, grad, torch.zeros(5, device=DEVICE), torch.float64)
    assert ((found[0] - expected[0]).abs() <= at_x).all() and (
        (found[1] - expected[1]).abs() <= at_code
    ).all()


def test_draws_by_probability():
    """The share of each code is softmax(l), whatever tau: within six standard deviations."""
    n, k = 200_000, 7
    codes = torch.randn(k, 3, device=DEVICE).double()
    x = torch.randn(1, 3, device=DEVICE).double()
    p = torch.softmax(-(x - codes).square().sum(1), 0)
    found = gumbel_code(x.expand(n, 3), codes, temperature=0.3, seed=5).indices.bincount(minlength=k)
    # the noise has steps of 2^-24 in its uniform number: at most k of them between two codes
    assert ((found - n * p).abs() <= 6 * (n * p * (1 - p)).sqrt() + 1 + n * k * 2.0**-24).all()


def test_cold():
    """As tau falls, y becomes one-hot, and no gradient passes through it."""
    x, codes = (t.double() for t in clusters(50, 9, 10, scale=0.3))
    grad, none = torch.randn(50, 10, device=DEVICE).double(), torch.zeros(50, device=DEVICE).double()
    warm, *_ = differentiate(x, codes, grad, none)
    noisy = transcription(x, codes, 1.0, noise(50, 9))[2].topk(2, dim=1).values
    gap, tau = noisy[:, 0] - noisy[:, 1], 1e-3
    cold, grad_x, grad_codes = differentiate(x, codes, grad, none, temperature=tau)
    far = (codes - codes.mean(0)).norm(dim=1).max()
    # the others weigh 8 exp(-gap / tau) at most; 2 |w| |c|, |w| <= 2 |a| / tau of that
    limit = 4 * grad.norm(dim=1) * far**2 / tau * 8 * (-gap / tau).exp()
    assert torch.equal(cold.z, warm.z)
    assert (grad_x.norm(dim=1) <= limit * (1 + 1e-6) + 1e-300).all() and limit.median() < 1e-9
    hard = torch.zeros_like(codes).index_add_(0, cold.indices, grad)
    size = 2 * limit.sum() * (1 + (x.norm(dim=1).max() + far) / far)
    assert ((grad_codes - hard).abs() <= size + 50 * 2.2e-16 * grad.norm(dim=1).sum()).all()


def test_below_the_range_of_float32():
    x, codes = clusters(50, 9, 10)
    grad, none = torch.randn(50, 10, device=DEVICE), torch.zeros(50, device=DEVICE)
    _, grad_x, grad_codes = differentiate(x, codes, grad, none, temperature=1e-60)
    assert grad_x.isfinite().all() and grad_codes.isfinite().all()


def test_chunks_change_nothing(monkeypatch):
    x, codes = clusters(129, 40, 10, scale=0.3)
    grad, grad_kl = torch.randn(129, 10, device=DEVICE), torch.rand(129, device=DEVICE)
    whole = differentiate(x, codes, grad, grad_kl)
    monkeypatch.setattr(_logits, "rows_at_once", lambda num_codes, device: 7)
    parts = differentiate(x, codes, grad, grad_kl)
    _, at_kl, at_x, at_code = bounds(x, codes, 1.0, grad, grad_kl, torch.float32)
    assert torch.equal(whole[0].indices, parts[0].indices) and torch.equal(whole[0].z, parts[0].z)
    assert ((whole[0].kl - parts[0].kl).abs() <= 2 * at_kl[:, 0]).all()
    assert ((whole[1] - parts[1]).abs() <= 2 * at_x).all()
    assert ((whole[2] - parts[2]).abs() <= 2 * at_code).all()


def test_rows_at_once():
    for num_codes in (1, 1000, 16384, 2**20, 2**26):
        rows = _logits.rows_at_once(num_codes, torch.device("cpu"))
        assert rows >= 1 and (rows == 1 or rows * num_codes <= 2**22)


def test_row_offset():
    """Two halves of a batch equal the whole, beyond 2^32 too."""
    x, codes = clusters(40, 19, 10, scale=0.3)
    for first in (0, 2**32 - 20):
        whole = gumbel_code(x, codes, seed=3, row_offset=first)
        halves = [
            gumbel_code(part, codes, seed=3, row_offset=first + start)
            for start, part in ((0, x[:20]), (20, x[20:]))
        ]
        assert torch.equal(whole.indices, torch.cat([half.indices for half in halves]))
        assert torch.equal(whole.z, torch.cat([half.z for half in halves]))
    check(x, codes, row_offset=2**32 - 20)
    assert not torch.equal(halves[1].indices, gumbel_code(x[20:], codes, seed=3).indices)


def test_rows_that_are_not_finite():
    """NaN out, NaN back, nothing to the codebook, and no other row changes."""
    x, codes = clusters(40, 9, 10, scale=0.3)
    grad, grad_kl = torch.randn(40, 10, device=DEVICE), torch.rand(40, device=DEVICE)
    keep = torch.ones(40, dtype=torch.bool, device=DEVICE)
    keep[[4, 20, 39, 30]] = False
    silent = torch.where(keep[:, None], grad, 0), torch.where(keep, grad_kl, 0)
    first, gx0, gc0 = differentiate(torch.where(keep[:, None], x, 0), codes, *silent)
    # the last one is finite, but its logits are not
    x[4, 3], x[20, 0], x[39, 9], x[30, 1] = torch.nan, torch.inf, -torch.inf, 3e38
    second, gx, gc = differentiate(x, codes * 1, grad, grad_kl)
    assert second.z[[4, 20, 39]].isnan().all() and gx[[4, 20, 39]].isnan().all()
    assert second.kl[[4, 20, 39]].isnan().all() and not second.indices[[4, 20, 39]].any()
    assert torch.equal(second.z[keep], first.z[keep]) and torch.equal(second.kl[keep], first.kl[keep])
    assert torch.equal(gx[keep], gx0[keep])
    _, _, _, at_code = bounds(torch.where(keep[:, None], x, 0), codes, 1.0, *silent, torch.float32)
    if not second.z[30].isfinite().all():
        assert ((gc - gc0).abs() <= 2 * at_code).all()
    assert gc.isfinite().all()


def test_logits_out_of_range():
    """A row whose logits float32 cannot hold is refused aloud; float64 holds them."""
    x, codes = clusters(5, 9, 10)
    x[2], codes = 1e38 * x[2], 1e3 * codes
    found, grad_x, grad_codes = differentiate(
        x, codes, torch.ones(5, 10, device=DEVICE), torch.ones(5, device=DEVICE)
    )
    assert found.z[2].isnan().all() and grad_x[2].isnan().all() and found.kl[2].isnan()
    assert found.z[[0, 1, 3, 4]].isfinite().all() and grad_codes.isfinite().all()
    assert gumbel_code(x.double(), codes).z.isfinite().all()


def test_codes_that_are_not_finite():
    """They are never drawn and have no gradient; where there is no other, rows are NaN."""
    x, codes = clusters(40, 9, 10, scale=0.3)
    grad, grad_kl = torch.randn(40, 10, device=DEVICE), torch.rand(40, device=DEVICE)
    bad = codes.clone()
    bad[[2, 8], 3] = torch.tensor([torch.nan, torch.inf], device=DEVICE)
    found, grad_x, grad_codes = differentiate(x, bad, grad, grad_kl)
    assert found.z.isfinite().all() and grad_x.isfinite().all() and grad_codes.isfinite().all()
    assert not grad_codes[[2, 8]].any() and grad_codes[[0, 1, 3]].any()
    found, grad_x, grad_codes = differentiate(x, torch.full_like(codes, torch.nan), grad, grad_kl)
    assert found.z.isnan().all() and grad_x.isnan().all() and not grad_codes.any() and not found.indices.any()


def test_backward_twice():
    x, codes = (t.requires_grad_() for t in clusters(40, 9, 10, scale=0.3))
    z, _, kl = gumbel_code(x, codes, seed=1)
    total = z.square().sum() + kl.sum()
    first = torch.autograd.grad(total, (x, codes), retain_graph=True)
    second = torch.autograd.grad(total, (x, codes))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # each output alone
    assert torch.autograd.grad(gumbel_code(x, codes, seed=1).kl.sum(), x)[0].any()
    assert torch.autograd.grad(gumbel_code(x, codes, seed=1).z.sum(), x)[0].any()


def test_autocast_changes_nothing():
    x, codes = clusters(40, 9, 10, scale=0.3)
    grad, grad_kl = torch.randn(40, 10, device=DEVICE), torch.rand(40, device=DEVICE)
    plain = differentiate(x, codes, grad, grad_kl)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = differentiate(x, codes, grad, grad_kl)
    assert torch.equal(plain[0].kl, cast[0].kl) and torch.equal(plain[0].indices, cast[0].indices)
    assert torch.equal(plain[1], cast[1]) and torch.equal(plain[2], cast[2])


def test_empty_batch():
    x = torch.zeros(2, 0, 4, device=DEVICE, requires_grad=True)
    codes = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    z, indices, kl = gumbel_code(x, codes)
    (z.sum() + kl.sum()).backward()
    assert z.shape == x.grad.shape == x.shape and indices.shape == (2, 0) and not codes.grad.any()


def test_gumbels_are_finite():
    words = torch.tensor([0, 255, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1], device=DEVICE)
    for dtype in (torch.float32, torch.float64):
        found = philox.gumbels(words, dtype)
        assert found.dtype == dtype and found.isfinite().all() and (found.diff() >= 0).all()
        assert abs(found[0] + math.log(24 * math.log(2))) < 1e-6
        assert abs(found[-1] - 25 * math.log(2)) < 4e-6 and abs(found[-3] - 24 * math.log(2)) < 4e-6


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0; got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and above 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
        (
            {"temperature": torch.ones(2)},
            ValueError,
            r"temperature must be a number or 0-d; got shape \(2,\)",
        ),
        ({"temperature": torch.ones((), dtype=torch.int64)}, TypeError, "temperature must be float16"),
        ({"row_offset": -1}, ValueError, "row_offset must be at least 0"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"backend": "native"}, RuntimeError, "has no body for gumbel_code"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        gumbel_code(torch.zeros(2, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE), **options)
