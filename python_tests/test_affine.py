"""The affine map of a codebook: running moments, overwriting codes through it, and replacement."""

import copy

import numpy as np
import pytest
import torch

from vqkernels.nn import AffineCodebook, AffineEMACodebook, ImportanceReplacement, TwoPhase, build
from vqkernels.testing import DEVICE

D, K = 5, 12
MAKERS = {
    "affine": lambda: AffineCodebook(K, D),
    "affine-3": lambda: AffineCodebook(K, D, groups=3, lr_scale=2.0),
    "affine-ema": lambda: AffineEMACodebook(K, D),
    "affine-ema-3": lambda: AffineEMACodebook(K, D, groups=3),
}


def make(name, dtype=torch.float64):
    """A codebook whose map is no longer the identity."""
    codebook = MAKERS[name]().to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in codebook.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(2):
        x = torch.randn(30, D, device=DEVICE) * 3 + 1
        codebook.observe(x, torch.zeros(30, dtype=torch.int64, device=DEVICE))
        codebook.commit()
    return codebook


@pytest.mark.parametrize("groups", [1, 3])
def test_running_moments(groups):
    """Huh A.12 with its misprints mended, against numpy: batches within one step add up, each commit is one update."""
    rng = np.random.default_rng(0)
    codebook = AffineEMACodebook(K, D, groups=groups, momentum=0.1).to(DEVICE)
    assert torch.equal(codebook.codes(), codebook.weight)
    weight, state = codebook.weight.detach().double().cpu().numpy(), None
    for step in range(4):
        # far from 0 and narrow, where E[x^2] - E[x]^2 has nothing left in float32
        batches = [1e3 + step + 1e-2 * rng.standard_normal((40, D)).astype(np.float32) for _ in range(2)]
        kept = []
        for number, batch in enumerate(batches):
            x, indices = torch.tensor(batch, device=DEVICE), torch.zeros(40, dtype=torch.int64, device=DEVICE)
            x[3, 1], x[4, 0], indices[7] = torch.nan, torch.inf, -1
            codes = codebook.codes()
            codebook.observe(x.view(4, 10, D) if number else x, indices.view(4, 10) if number else indices)
            assert torch.equal(codes, codebook.codes())
            kept.append(np.delete(batch.astype(np.float64), [3, 4, 7], axis=0))
        codebook.commit()
        x, c = np.concatenate(kept), weight.reshape(groups, -1, D)
        now = [x.mean(0), x.var(0), c.mean(1), c.var(1)]
        state = now if state is None else [0.1 * a + 0.9 * b for a, b in zip(now, state, strict=True)]
        scale = np.sqrt(state[1] / (state[3] + 1e-8))
        bias = state[0] - scale * state[2]
        expected = (scale[:, None] * c + bias[:, None]).reshape(K, D)
        found = (codebook.mean_x, codebook.var_x, codebook.mean_c, codebook.var_c)
        for value, wanted in zip(found, state, strict=True):
            # squares about 0 at first lose (1e3 / 1e-2)^2 of float64
            np.testing.assert_allclose(value.cpu().numpy(), wanted, rtol=1e-5, atol=1e-14)
        error = np.abs(codebook.codes().detach().cpu().numpy() - expected)
        # map and bias are float32
        assert (error <= 4 * np.finfo(np.float32).eps * 1e3).all()


def test_moments_of_codes_match_those_of_latents():
    quantizer = build("affine_ema", dim=D, num_codes=K).to(DEVICE)
    x = torch.randn(500, D, device=DEVICE) * 3 + 7
    quantizer(x)
    before = quantizer.export()
    quantizer.commit()
    assert not torch.equal(before, quantizer.export())
    codes, eps = quantizer.export().double(), torch.finfo(torch.float32).eps
    assert (codes.mean(0) - x.double().mean(0)).abs().max() <= 16 * eps * 10
    # the 1e-8 next to the variance of the weights, and rounding
    ratio = codes.var(0, correction=0) / x.double().var(0, correction=0)
    assert (ratio - 1).abs().max() <= 1e-8 / quantizer.codebook.weight.var(0).min() + 64 * eps


def test_evaluation_freezes_the_moments():
    quantizer = build("affine_ema", dim=D, num_codes=K).to(DEVICE)
    quantizer(torch.randn(20, D, device=DEVICE))
    quantizer.commit()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()
    quantizer(torch.randn(20, D, device=DEVICE) + 9)
    quantizer.encode(torch.randn(20, D, device=DEVICE) + 9)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("rows", ["masked", "not finite", "none"])
def test_no_rows_change_no_moments(rows):
    for first in (True, False):
        codebook = AffineEMACodebook(K, D).to(DEVICE) if first else make("affine-ema")
        before = copy.deepcopy(codebook.state_dict())
        n = 0 if rows == "none" else 6
        x = torch.full((n, D), torch.nan if rows == "not finite" else 5.0, device=DEVICE)
        index = -1 if rows == "masked" else 0
        codebook.observe(x, torch.full((n,), index, dtype=torch.int64, device=DEVICE))
        codebook.commit()
        for key, value in codebook.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_a_feature_that_never_varies():
    """Its scale is 0: all codes hold its value, and overwriting a code says nothing about it."""
    codebook = AffineEMACodebook(K, D).to(DEVICE)
    x = torch.randn(40, D, device=DEVICE)
    x[:, 2] = 3
    codebook.observe(x, torch.zeros(40, dtype=torch.int64, device=DEVICE))
    codebook.commit()
    assert codebook.codes()[:, 2].eq(3).all()
    wanted = torch.randn(K, D, device=DEVICE)
    codebook.assign(wanted)
    others = torch.arange(D, device=DEVICE) != 2
    assert codebook.codes()[:, 2].eq(3).all() and codebook.weight.isfinite().all()
    assert (codebook.codes() - wanted)[:, others].abs().max() <= 1e-5


def test_codes_that_are_all_the_same():
    """The 1e-8 of the scale keeps it finite; the codes are the latents' mean."""
    codebook = AffineEMACodebook(K, D).to(DEVICE)
    codebook.assign(torch.full((K, D), 2.0, device=DEVICE))
    x = torch.randn(40, D, device=DEVICE)
    codebook.observe(x, torch.zeros(40, dtype=torch.int64, device=DEVICE))
    codebook.commit()
    scale, eps = codebook.scale_and_bias()[0], torch.finfo(torch.float32).eps
    torch.testing.assert_close(scale[0], x.std(0, correction=0) * 1e4, rtol=8 * eps, atol=0)
    assert ((codebook.codes() - x.mean(0)).abs() <= 4 * eps * 2 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_map_is_the_identity_before_the_first_commit(dtype):
    codebook = AffineEMACodebook(K, D).to(DEVICE, dtype)
    codebook.observe(torch.randn(9, D, device=DEVICE), torch.zeros(9, dtype=torch.int64, device=DEVICE))
    assert torch.equal(codebook.codes(), codebook.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["affine", "affine-3", "affine-ema", "affine-ema-3"])
def test_assigned_codes_show(name, dtype):
    """The inverse of the map is exact up to rounding, 2 eps (|codes| + |bias|), and changes no other code."""
    codebook = make(name, dtype)
    wanted = torch.randn(K, D, dtype=dtype, device=DEVICE)
    where = torch.arange(K, device=DEVICE) % 3 == 0
    before = codebook.codes().detach().clone()
    for mask in (where, None):
        codebook.assign(wanted, mask)
        codes = codebook.codes().detach()
        bias = codebook.scale_and_bias()[1].detach().repeat_interleave(K // codebook.groups, 0)
        bound = 2 * torch.finfo(dtype).eps * (wanted.abs() + bias.abs())
        written = slice(None) if mask is None else mask
        assert ((codes - wanted).abs() <= bound)[written].all()
        assert mask is None or torch.equal(codes[~mask], before[~mask])


@pytest.mark.parametrize("method", ["affine", "affine_ema"])
def test_replacement_works_through_the_map(method):
    """Unused codes become noisy copies of used ones as `codes` shows them, and their moments are reset."""
    part = ImportanceReplacement(TwoPhase(9, 2, stop_before=0), threshold=0.5)
    quantizer = build(method, dim=D, num_codes=K, upkeep=[part]).to(DEVICE)
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    quantizer.follow(optimizer)
    # two tight clusters: nearly all codes are unused
    centre = torch.randn(2, D, device=DEVICE) + 4
    for _ in range(2):
        x = centre.repeat(30, 1) + 0.01 * torch.randn(60, D, device=DEVICE)
        quantizer(x).loss.backward()
        old = quantizer.export()
        optimizer.step()
    moments, codes = optimizer.state[quantizer.codebook.weight]["exp_avg"], quantizer.export()
    replaced = ~moments.any(1)
    assert replaced.sum() >= K - 4 and not torch.equal(old, codes)
    distance = torch.cdist(codes[replaced], codes[~replaced]).amin(1)
    rms = codes[~replaced].square().mean(1).sqrt().max()
    # five standard deviations of the noise
    assert (distance <= 5 * 1e-3 * rms * D**0.5).all()
    assert [p is quantizer.codebook.weight for p in quantizer.codebook.row_parameters()] == [True]


def test_running_moments_in_float64():
    """A momentum that float32 cannot hold is used as it was given."""
    codebook = AffineEMACodebook(8, 3, momentum=0.3).to(DEVICE).double()
    first, second = (torch.randn(50, 3, device=DEVICE).double() + shift for shift in (5, -5))
    indices = torch.zeros(50, dtype=torch.int64, device=DEVICE)
    for x in (first, second):
        codebook.observe(x, indices)
        codebook.commit()
    expected = 0.3 * second.mean(0) + 0.7 * first.mean(0)
    # sums of 50 numbers of size 10
    assert ((codebook.mean_x - expected).abs() <= 50 * 2.0**-52 * 10).all()
