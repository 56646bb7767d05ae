"""Each of the first methods equals the equation of its paper, in values and in gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from vqkernels.nn import STE, Codebook, EMACodebook, SFDiVeQ, SFDiVeQDetach, VectorQuantizer, build
from vqkernels.testing import DEVICE, brute_force, family

D, K = 6, 16


def make(name, channel_dim=-1, **options):
    quantizer = build(name, dim=D, num_codes=K, channel_dim=channel_dim, **options).to(DEVICE)
    quantizer.codebook.assign(torch.randn(K, D, device=DEVICE))
    return quantizer


def test_ste_equation():
    """DiVeQ eq. 2: gradients of reconstruction, codebook and commitment terms, in float64."""
    quantizer = make("ste").double()
    x = torch.randn(50, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, _, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    y = x.detach().clone().requires_grad_()
    codes = quantizer.export().requires_grad_()
    chosen = codes[torch.cdist(y, codes).argmin(1)]
    q = y + (chosen - y).detach()
    reference = q.square().sum() + F.mse_loss(y.detach(), chosen) + 0.25 * F.mse_loss(y, chosen.detach())
    reference.backward()
    torch.testing.assert_close(loss + z.square().sum(), reference, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(quantizer.codebook.weight.grad, codes.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nu", [0.5, 1.0, 2.0, 7.0])
def test_sync_equation(nu):
    """Huh eq. 21 to the letter: z + sg(z_q - z) + nu (z_q - sg z_q), so that the task's gradient reaches the code."""
    codebook = Codebook(K, D, init="normal", dtype=torch.float64).to(DEVICE)
    quantizer = VectorQuantizer(codebook, STE(sync=nu, codebook_weight=0.9, commitment_weight=0.1))
    x = torch.randn(50, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, _, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    y = x.detach().clone().requires_grad_()
    codes = quantizer.export().requires_grad_()
    zq = codes[torch.cdist(y, codes).argmin(1)]
    q = y + (zq - y).detach() + nu * (zq - zq.detach())
    (q.square().sum() + 0.9 * F.mse_loss(zq, y.detach()) + 0.1 * F.mse_loss(y, zq.detach())).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(codebook.weight.grad, codes.grad, rtol=1e-12, atol=1e-12)


def test_rotation_equation():
    """DiVeQ eq. 4 with every matrix R written out, and the losses of STE."""
    quantizer = make("rotation").double()
    x = torch.randn(50, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, _, loss = quantizer(x)
    g = torch.randn_like(z)
    torch.autograd.backward((z, loss), (g, torch.ones_like(loss)))
    y = x.detach().clone().requires_grad_()
    codes = quantizer.export().requires_grad_()
    chosen = codes[torch.cdist(y, codes).argmin(1)]
    with torch.no_grad():
        zbar, cbar = F.normalize(y, dim=1), F.normalize(chosen, dim=1)
        r = F.normalize(zbar + cbar, dim=1)
        turn = (
            torch.eye(D, dtype=torch.float64, device=DEVICE)
            - 2 * r[:, :, None] * r[:, None]
            + 2 * cbar[:, :, None] * zbar[:, None]
        )
        turn *= (chosen.norm(dim=1) / y.norm(dim=1))[:, None, None]
    q = torch.einsum("nij,nj->ni", turn, y)
    reference = F.mse_loss(y.detach(), chosen) + 0.25 * F.mse_loss(y, chosen.detach())
    torch.autograd.backward((q, reference), (g, torch.ones_like(reference)))
    torch.testing.assert_close(z, q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(quantizer.codebook.weight.grad, codes.grad, rtol=1e-12, atol=1e-12)


def test_sync_needs_codes_that_take_a_gradient():
    words = "codebook must learn by gradient for sync = 1.0; got EMACodebook. Pass sync=0"
    with pytest.raises(ValueError, match=words):
        VectorQuantizer(EMACodebook(K, D), STE(sync=1.0, codebook_weight=0))


def test_ema_equation():
    """DiVeQ eq. 3 with h = 1 at first: c and h after three steps, in float64, code by code."""
    quantizer = make("ema")
    quantizer.codebook.double()
    codes, h = quantizer.export(), torch.ones(K, dtype=torch.float64, device=DEVICE)
    for _ in range(3):
        x = torch.randn(40, D, dtype=torch.float64, device=DEVICE)
        quantizer(x)
        chosen = torch.cdist(x, codes).argmin(1)
        for j in range(K):
            rows = x[chosen == j]
            h[j] = 0.99 * h[j] + 0.01 * len(rows)
            if len(rows):
                codes[j] = codes[j] + 0.01 * (rows.sum(0) - len(rows) * codes[j]) / h[j]
        quantizer.commit()
        torch.testing.assert_close(quantizer.export(), codes, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quantizer.codebook.mass, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("converted", [False, True])
def test_ema_of_half_codes_counts_in_float32(dtype, converted):
    """Thousands of rows of one code neither overflow nor get lost, also after `.half()`."""
    codebook = EMACodebook(2, 3, dtype=torch.float32 if converted else dtype).to(DEVICE)
    codebook = codebook.to(dtype) if converted else codebook
    codebook.assign(torch.full((2, 3), 100.0, device=DEVICE))
    x = torch.full((5000, 3), 104.0, dtype=dtype, device=DEVICE)
    code, h = 100.0, 1.0
    for _ in range(100):
        codebook.observe(x, torch.zeros(5000, dtype=torch.int64, device=DEVICE))
        codebook.commit()
        h = 0.99 * h + 0.01 * 5000
        # each commit rounds the stored code once
        code = float(torch.tensor(code + 0.01 * 5000 * (104 - code) / h).to(dtype))
    assert codebook.weight.dtype == dtype
    torch.testing.assert_close(codebook.mass[0].item(), h, rtol=1e-5, atol=0)
    assert (codebook.weight[0].double() - code).abs().max() <= torch.finfo(dtype).eps * 100
    assert codebook.weight[1].eq(100).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ste_sums_the_gradient_of_half_codes_in_float32(dtype):
    quantizer = build("ste", dim=1, num_codes=1).to(DEVICE)
    quantizer.codebook.assign(torch.zeros(1, 1, device=DEVICE))
    quantizer = quantizer.to(dtype)
    quantizer(torch.ones(65536, 1, dtype=dtype, device=DEVICE)).loss.backward()
    # d/dc mean (1 - c)^2 at 0
    assert quantizer.codebook.weight.grad.item() == -2


def test_losses_are_means_over_finite_rows():
    quantizer = make("ste")
    x = torch.randn(10, D, device=DEVICE)
    expected = quantizer(x).loss
    dirty = torch.cat([x, torch.full((30, D), torch.nan, device=DEVICE)])
    torch.testing.assert_close(quantizer(dirty).loss, expected)


def test_a_frozen_codebook_has_no_codebook_loss():
    quantizer = make("ste")
    quantizer.codebook.requires_grad_(False)
    x = torch.randn(10, D, device=DEVICE)
    z, _, loss = quantizer(x)
    torch.testing.assert_close(loss, 0.25 * F.mse_loss(x, z))


def test_the_noise_of_a_built_quantizer():
    assert build("diveq", dim=2, num_codes=4).estimator.noise_std == 1e-3**0.5
    assert build("sf_diveq", dim=2, num_codes=4, noise_std=0.25).estimator.noise_std == 0.25


def test_uniform_codes_span_both_signs():
    """U(-1/K, 1/K): both halves and both outer quarters are met by 4000 draws."""
    codes = Codebook(200, 20).weight * 200
    assert codes.abs().max() <= 1
    for low, high in ((-1, -0.5), (-0.5, 0), (0, 0.5), (0.5, 1)):
        assert 800 < ((codes > low) & (codes <= high)).sum() < 1200


def test_masked_indices_decode_to_zero():
    for name in ("ste", "sf_diveq"):
        quantizer = make(name).eval()
        assert not quantizer.decode(torch.tensor([[-1]], device=DEVICE)).any()
    quantizer.estimator.evaluation = "segment"
    assert not quantizer.decode(torch.tensor([[-1, 3]], device=DEVICE)).any()


def test_wide_codes_interpolate_without_overflow():
    codebook = Codebook(2, 1, dtype=torch.float16).to(DEVICE)
    codebook.assign(torch.tensor([[-60000.0], [60000.0]], device=DEVICE))
    quantizer = VectorQuantizer(codebook, SFDiVeQ(evaluation="curve")).eval()
    x = torch.tensor([[100.0]], dtype=torch.float16, device=DEVICE)
    assert (quantizer(x).z - x).abs() <= 1


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("diveq", "noisy"),
        ("diveq_detach", "detach"),
        ("nsvq", "random"),
        ("sf_diveq", "noisy"),
        ("sf_diveq_detach", "detach"),
    ],
)
def test_family_equation(name, direction):
    """DiVeQ eq. 7, 8, 12 and 16 through the module: seed from torch, search, direction, gradients."""
    quantizer = make(name).double()
    x = torch.randn(60, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.manual_seed(9)
    z, indices, loss = quantizer(x)
    torch.manual_seed(9)
    seed = int(torch.randint(0, 2**63 - 1, (), device=DEVICE))
    codes = quantizer.export().requires_grad_()
    y = x.detach().clone().requires_grad_()
    position, points = None, codes
    if name.startswith("sf"):
        from vqkernels import philox

        words = philox.words(
            torch.tensor(seed, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE), 4, 2
        )
        lam = ((words >> 8).double() / 2**24).flatten()[: K - 1]
        points = (1 - lam)[:, None] * codes[:-1] + lam[:, None] * codes[1:]
    expected, _ = brute_force(y.detach(), points.detach())
    assert torch.equal(indices[:, 0], expected)
    position = lam[expected] if name.startswith("sf") else None
    f = family(y, codes, expected, direction=direction, noise_std=1e-3**0.5, seed=seed, position=position)
    # normals differ by 2^-18, and turn a direction by no more than sqrt(D) of that over its length
    turn = max(
        float((2 * (1e-3**0.5 if direction == "noisy" else 1) * D**0.5 * 2**-18 / w).max()) for w in f.w_norm
    )
    bound = (0 if direction == "detach" else turn) + 1e-12
    g = torch.randn_like(z)
    z.backward(g)
    f.z.backward(g)
    assert loss == 0
    assert ((z - f.z).abs() <= sum(f.r) * bound + 1e-12).all()
    size = g.norm(dim=1, keepdim=True) * len(f.r)
    assert ((x.grad - y.grad).abs() <= size * bound).all()
    assert ((quantizer.codebook.weight.grad - codes.grad).abs() <= size.sum() * bound).all()


@pytest.mark.parametrize("estimator", [SFDiVeQ, SFDiVeQDetach])
def test_three_evaluations(estimator):
    """Rates and distortions of the three modes; the curve is the best, whole segments beat their levels."""
    codebook = Codebook(K, D, init="normal").to(DEVICE)
    x = torch.randn(500, D, device=DEVICE)
    distortion, quantizer = {}, VectorQuantizer(codebook, estimator()).eval()
    for mode, bits in (("codeword", 4), ("curve", 4), ("segment", 1), ("segment", 10)):
        quantizer.estimator.evaluation, quantizer.estimator.bits = mode, bits
        z, indices, _ = quantizer(x)
        distortion[mode, bits] = (x - z).double().square().sum(1)
        assert indices.shape[-1] == (2 if mode == "segment" else 1)
        if mode != "curve":
            assert torch.equal(quantizer.decode(indices), z)
    assert (distortion["curve", 4] <= distortion["codeword", 4] + 1e-5).all()
    assert (distortion["curve", 4] <= distortion["segment", 10] + 1e-5).all()
    assert (
        distortion["segment", 10].mean() < distortion["segment", 1].mean() < distortion["codeword", 4].mean()
    )
    assert quantizer.bits_per_latent == math.log2(K - 1) + 10
    quantizer.estimator.evaluation = "curve"
    assert quantizer.bits_per_latent == math.inf
    quantizer.estimator.evaluation = "codeword"
    assert quantizer.bits_per_latent == 4 and quantizer.num_indices == K
    assert quantizer.train().num_indices == K - 1


def test_export_is_a_copy():
    quantizer = make("ste")
    before = quantizer.export()
    quantizer.codebook.assign(torch.zeros(K, D, device=DEVICE))
    assert before.any() and not quantizer.export().any()
