"""Stochastic sampling: every draw against float64 sums of probabilities, and how often each code is drawn."""

import pytest
import torch
from conftest import DTYPES, INTERPRETED

from vqkernels import philox
from vqkernels.ops import _logits, sample_code
from vqkernels.testing import DEVICE, LAYOUTS, brute_force, clusters, strided

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the op has no triton body")
SEED = 314159265358
SHAPES = [(1, 1, 1), (3, 5, 4), (40, 32, 7), (129, 33, 130), (200, 129, 17)]


def check(x, codes, tau, row_offset=0):
    """Each draw is the first code whose sum exceeds U, up to the error of the logits."""
    found = sample_code(x, codes, temperature=tau, seed=SEED, row_offset=row_offset)
    assert found.shape == x.shape[:-1] and found.dtype == torch.int64
    arithmetic = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    d, eps = x.shape[-1], torch.finfo(arithmetic).eps
    x, codes, found = x.reshape(-1, d).double(), codes.double(), found.flatten()
    rows = torch.arange(len(x), device=DEVICE) + row_offset
    uniform = philox.uniforms(philox.words(torch.tensor(SEED, device=DEVICE), rows, 1, 4))[:, 0, :1].double()
    p = torch.softmax(-(x[:, None] - codes).square().sum(2) / tau, dim=1)
    upper = p.cumsum(1)
    near, far = (x - codes.mean(0)).norm(dim=1, keepdim=True), (codes - codes.mean(0)).norm(dim=1).max()
    logit = (d + 6) * eps * (near + far) * far + 2 * eps * (2 * near * far + far**2)
    # a relative error of every weight moves a share of the sum by as much; 2 eps for the exponential
    error = (4 * logit / tau + 4 * eps).expm1() + 1e-12
    high = upper.gather(1, found[:, None])
    low = high - p.gather(1, found[:, None])
    assert (low - error <= uniform).all() and (uniform < high + error).all()
    return error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype):
    x, codes = clusters(*shape, scale=shape[2] ** -0.5)
    assert check(x.to(dtype), codes.to(dtype), 0.5) < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    x, codes = clusters(60, 9, 10, scale=0.3)
    check(strided(x, layout), codes, 0.5)


def test_offsets_of_data_and_rows():
    x, codes = clusters(60, 9, 10, scale=0.3, offset=1e3)
    assert check(x, codes, 0.5) < 1e-2
    check(x, codes, 0.5, row_offset=2**32 - 30)


@pytest.mark.parametrize("k", [5, 32, 70])
def test_draws_by_probability(k):
    """At one x, over many rows, each code comes as often as softmax(-d / tau) says: within six standard deviations."""
    n, tau = 200_000, 1.5
    codes, x = torch.randn(k, 3, device=DEVICE), torch.randn(1, 3, device=DEVICE)
    p = torch.softmax(-(x - codes).double().square().sum(1) / tau, 0)
    found = sample_code(x.expand(n, 3), codes, temperature=tau, seed=5).bincount(minlength=k)
    # U has steps of 2^-24; the logits are off by less than 1e-5
    assert ((found - n * p).abs() <= 6 * (n * p * (1 - p)).sqrt() + 1 + n * (2.0**-24 + 4e-5 * p)).all()
    chi = ((found - n * p).square() / (n * p)).sum()
    # mean k - 1, variance 2 (k - 1), and what p < 1 / n adds
    assert chi <= (k - 1) + 6 * (2 * (k - 1) + (1 / (n * p)).sum()) ** 0.5


@pytest.mark.parametrize("tau", [0.0, torch.zeros(())])
def test_cold_is_the_nearest_code(tau):
    """The contract of `nearest_code`, ties included."""
    x, codes = (
        torch.randint(-1, 2, (300, 4), device=DEVICE).float(),
        torch.randint(-1, 2, (50, 4), device=DEVICE),
    )
    codes = codes.float()
    expected = brute_force(x, codes)[0]
    tau = tau.to(DEVICE) if isinstance(tau, torch.Tensor) else tau
    assert torch.equal(sample_code(x, codes, temperature=tau), expected)


@pytest.mark.parametrize("tau", [1e-60, torch.tensor(1e-60, dtype=torch.float64)])
def test_below_the_range_of_float32(tau):
    x, codes = clusters(300, 20, 6)
    tau = tau.to(DEVICE) if isinstance(tau, torch.Tensor) else tau
    assert torch.equal(sample_code(x, codes, temperature=tau), brute_force(x, codes)[0])


def test_cooling():
    x, codes = clusters(300, 20, 6)
    nearest = brute_force(x, codes)[0]
    agree = [
        (sample_code(x, codes, temperature=tau, seed=1) == nearest).double().mean() for tau in (100, 1, 1e-6)
    ]
    assert agree[0] < 0.3 < agree[1] < agree[2] == 1


def test_chunks_change_nothing(monkeypatch):
    x, codes = clusters(129, 40, 10, scale=0.3)
    whole = sample_code(x, codes, seed=1)
    monkeypatch.setattr(_logits, "rows_at_once", lambda num_codes, device: 7)
    assert torch.equal(sample_code(x, codes, seed=1), whole)


def test_row_offset():
    x, codes = clusters(40, 19, 10, scale=0.3)
    whole = sample_code(x, codes, seed=3)
    halves = [sample_code(part, codes, seed=3, row_offset=at) for at, part in ((0, x[:20]), (20, x[20:]))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole[20:], sample_code(x[20:], codes, seed=3))


def test_what_is_not_finite():
    """A row takes index 0 and no other row changes; a code is never drawn; sums of weights do not run over."""
    x, codes = clusters(400, 40, 10, scale=0.1)
    expected = sample_code(x, codes, seed=3)
    dirty = x.clone()
    dirty[7, 1], dirty[9, 0] = torch.nan, torch.inf
    found = sample_code(dirty, codes, seed=3)
    keep = torch.ones(400, dtype=torch.bool, device=DEVICE)
    keep[[7, 9]] = False
    assert torch.equal(found[keep], expected[keep]) and not found[~keep].any()
    codes[[0, 5, 39], 2] = torch.tensor([torch.nan, torch.inf, torch.nan], device=DEVICE)
    counts = sample_code(x, codes, seed=3).bincount(minlength=40)
    assert not counts[[0, 5, 39]].any() and (counts > 0).sum() > 30
    assert not sample_code(x, torch.full_like(codes, torch.nan)).any()


def test_autocast_and_gradients():
    x, codes = clusters(40, 9, 10, scale=0.3)
    plain = sample_code(x, codes, seed=1)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(sample_code(x.requires_grad_(), codes.requires_grad_(), seed=1), plain)


def test_empty_batch():
    assert sample_code(torch.zeros(2, 0, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)).shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be finite and not negative; got -0.5"),
        ({"temperature": None}, TypeError, "temperature must be a number; got NoneType"),
        ({"row_offset": -1}, ValueError, "row_offset must be at least 0"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        sample_code(torch.zeros(2, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE), **options)
