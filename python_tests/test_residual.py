"""Residual quantizers: the joint form and the composition against their equations, nesting, export."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stages import D, K, Q, stage, stages

from vqkernels import philox
from vqkernels.nn import (
    FSQ,
    METHODS,
    STE,
    Codebook,
    DiVeQ,
    DiVeQDetach,
    Gumbel,
    Product,
    Residual,
    Rotation,
    SFDiVeQ,
    SFDiVeQDetach,
    Stochastic,
    VectorQuantizer,
    build,
)
from vqkernels.nn._random import split_seed
from vqkernels.testing import DEVICE, NORMAL_ERROR, brute_force, family


def seed_of(torch_seed):
    torch.manual_seed(torch_seed)
    return torch.randint(0, 2**63 - 1, (), device=DEVICE)


def dither(seed, num_codes):
    words = philox.words(seed, torch.zeros(1, dtype=torch.int64, device=DEVICE), -(-num_codes // 4), 2)
    return ((words >> 8).double() / 2**24).flatten()[: num_codes - 1]


@pytest.mark.parametrize("estimator", [DiVeQ, DiVeQDetach, SFDiVeQ, SFDiVeQDetach])
def test_the_joint_form_of_the_directional_family(estimator):
    """DiVeQ C.7 in float64: one error vector and one noise for the sum; codes, or dithered points, of all stages."""
    quantizer = Residual(stages(estimator)).double()
    assert quantizer.joint
    x = torch.randn(70, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.manual_seed(4)
    z, indices, loss = quantizer(x)
    seed = seed_of(4)
    codes = [s.export().requires_grad_() for s in quantizer.stages]
    y, target = x.detach().clone().requires_grad_(), 0
    for q, its_seed in enumerate(split_seed(seed, Q)):
        points = codes[q]
        if issubclass(estimator, (SFDiVeQ, SFDiVeQDetach)):
            at = dither(its_seed, K)[:, None]
            points = (1 - at) * codes[q][:-1] + at * codes[q][1:]
        left = y.detach() - (target.detach() if q else 0)
        expected, _ = brute_force(left, points.detach())
        assert torch.equal(indices[:, q], expected)
        target = target + points[expected]
    noisy = estimator in (DiVeQ, SFDiVeQ)
    rows = torch.arange(70, device=DEVICE)
    f = family(y, target, rows, direction="noisy" if noisy else "detach", noise_std=1e-3**0.5, seed=int(seed))
    bound = float((2 * 1e-3**0.5 * D**0.5 * NORMAL_ERROR / f.w_norm[0]).max()) if noisy else 0.0
    bound += 1e-12
    g = torch.randn_like(z)
    z.backward(g)
    f.z.backward(g)
    size = g.norm(dim=1, keepdim=True)
    assert loss == 0 and ((z - f.z).abs() <= f.r[0] * bound + 1e-12).all()
    assert ((x.grad - y.grad).abs() <= size * bound).all()
    for s, c in zip(quantizer.stages, codes, strict=True):
        assert c.grad.any() and ((s.codebook.weight.grad - c.grad).abs() <= size.sum() * bound).all()
    # the gradient of the sum is that of each stage, whatever codes share it out
    totals = [s.codebook.weight.grad.sum(0) for s in quantizer.stages]
    torch.testing.assert_close(totals[0], totals[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad.sum(0) + totals[0], g.sum(0), rtol=1e-11, atol=1e-11)


def test_the_joint_form_of_ste():
    """z = x + sg[sum - x], and each stage's two losses on x - sg[earlier points], in float64."""
    quantizer = Residual(stages(STE)).double()
    x = torch.randn(70, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, _, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    codes = [s.export().requires_grad_() for s in quantizer.stages]
    y, total, expected_loss = x.detach().clone().requires_grad_(), 0, 0
    for q in range(Q):
        left = y - (total.detach() if q else 0)
        chosen = codes[q][torch.cdist(left, codes[q]).argmin(1)]
        expected_loss = expected_loss + F.mse_loss(left.detach(), chosen)
        expected_loss = expected_loss + 0.25 * F.mse_loss(left, chosen.detach())
        total = total + chosen
    expected = y + (total - y).detach()
    (expected.square().sum() + expected_loss).backward()
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    for s, c in zip(quantizer.stages, codes, strict=True):
        torch.testing.assert_close(s.codebook.weight.grad, c.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("joint", [None, False])
@pytest.mark.parametrize("estimator", [Gumbel, Stochastic, Rotation])
def test_other_estimators(estimator, joint):
    """Those that draw codes run jointly where they can, learn, and evaluate without noise."""
    quantizer = Residual(stages(estimator), joint=joint, min_stages=2)
    x = torch.randn(60, D, device=DEVICE, requires_grad=True)
    z, indices, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    torch.testing.assert_close(
        z, quantizer.decode(indices), rtol=0, atol=8 * 2**-23 * float(z.detach().abs().max())
    )
    assert x.grad.isfinite().all() and x.grad.any() and (indices[:, 2] < 0).any()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in quantizer.parameters())
    z, indices, _ = quantizer.eval()(x)
    assert torch.equal(quantizer.decode(indices), z) and torch.equal(quantizer(x).indices, indices)


def test_the_joint_form_of_the_synchronized_update_and_of_rotations():
    """Huh eq. 21: every chosen code gets nu g. DiVeQ eq. 4: one rotation, from x to the sum."""
    x = torch.randn(40, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    g = torch.randn_like(x)
    quantizer = Residual(stages(lambda: STE(sync=0.5))).double()
    z, indices, _ = quantizer(x)
    z.backward(g)
    assert torch.equal(x.grad, g)
    for q, s in enumerate(quantizer.stages):
        expected = torch.zeros(K, D, dtype=torch.float64, device=DEVICE).index_add_(0, indices[:, q], 0.5 * g)
        torch.testing.assert_close(s.codebook.weight.grad, expected, rtol=1e-12, atol=1e-12)
    quantizer = Residual(stages(Rotation)).double()
    z, indices, _ = quantizer(x)
    target = quantizer.decode(indices).detach()
    u, v = F.normalize(x.detach(), dim=1), F.normalize(target, dim=1)
    s = F.normalize(u + v, dim=1)
    eye = torch.eye(D, dtype=torch.float64, device=DEVICE)
    turn = eye - 2 * s[:, :, None] * s[:, None] + 2 * v[:, :, None] * u[:, None]
    ratio = target.norm(dim=1, keepdim=True) / x.detach().norm(dim=1, keepdim=True)
    expected = ratio * torch.einsum("nij,ni->nj", turn, g)
    torch.testing.assert_close(z, target, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], expected, rtol=1e-10, atol=1e-10)


def test_the_composition_of_ste_stages():
    """Its total derivative is the identity; only the first commitment reaches x, every codebook loss its codes."""
    quantizer = Residual(stages(STE), joint=False).double()
    x = torch.randn(30, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, indices, loss = quantizer(x)
    g = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad(z, x, g, retain_graph=True)[0], g)
    joint = Residual(list(quantizer.stages), joint=True)
    assert torch.equal(joint(x).z, z) and torch.equal(joint(x).indices, indices)
    loss.backward()
    first = quantizer.stages[0].export()[indices[:, 0]]
    torch.testing.assert_close(x.grad, 0.5 * (x.detach() - first) / x.numel(), rtol=1e-12, atol=1e-15)
    assert all(s.codebook.weight.grad.any() for s in quantizer.stages)


def test_the_composition_of_diveq_stages():
    """z = f_1(x) + f_2(x - f_1(x)) by the chain rule, in float64."""
    quantizer = Residual(stages(DiVeQ, 2), joint=False).double()
    x = torch.randn(50, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.manual_seed(8)
    z = quantizer(x).z
    seeds = split_seed(seed_of(8), 2)
    y = x.detach().clone().requires_grad_()
    codes = [s.export().requires_grad_() for s in quantizer.stages]
    total, turn = 0, 0.0
    for c, seed in zip(codes, seeds, strict=True):
        left = y - total
        f = family(
            left,
            c,
            brute_force(left.detach(), c.detach())[0],
            direction="noisy",
            noise_std=1e-3**0.5,
            seed=int(seed),
        )
        total = total + f.z
        turn += float((2 * 1e-3**0.5 * D**0.5 * NORMAL_ERROR / f.w_norm[0]).max())
    g = torch.randn_like(z)
    z.backward(g)
    total.backward(g)
    # a gradient passes at most two directions, and each at most doubles it
    size = 4 * g.norm(dim=1, keepdim=True)
    assert ((x.grad - y.grad).abs() <= size * (turn + 1e-12)).all()
    for s, c in zip(quantizer.stages, codes, strict=True):
        assert ((s.codebook.weight.grad - c.grad).abs() <= size.sum() * (turn + 1e-12)).all()


def nested():
    return Residual(
        [
            Product([stage(STE(), dim=2), stage(DiVeQ(), dim=4)]),
            stage(STE(), scale=0.5),
            FSQ([5] * D).to(DEVICE),
            Residual(stages(STE, 2), joint=False),
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nesting_decodes_and_exports(dtype):
    quantizer = nested()
    assert not quantizer.joint and quantizer.codes_per_latent == 6
    assert quantizer.bits_per_latent == pytest.approx(5 * 4 + D * torch.tensor(5.0).log2().item())
    x = torch.randn(20, D, device=DEVICE).to(dtype).requires_grad_()
    z, indices, loss = quantizer(x)
    (z.float().square().sum() + loss).backward()
    assert z.dtype == dtype and indices.shape == (20, 6) and x.grad.isfinite().all()
    assert all(p.grad.any() for p in quantizer.parameters())
    quantizer.eval()
    z, indices, _ = quantizer(x)
    decoded = quantizer.decode(indices)
    assert torch.equal(decoded.to(dtype), z) and decoded.dtype == torch.float32
    assert torch.equal(quantizer.encode(x), indices) and indices.max() < quantizer.num_indices
    plain = quantizer.export()
    assert plain.shape == (6, 5**D, D) and quantizer.num_codes == 5**D
    total = sum(plain[q, indices[:, q]] for q in range(6))
    # two orders of a sum of six terms
    torch.testing.assert_close(
        total, decoded, rtol=0, atol=6 * 2**-23 * float(plain.nan_to_num().abs().max() * 6)
    )


def test_export_of_equal_stages_decodes_to_the_bit():
    quantizer = Residual(stages(DiVeQ)).eval()
    z, indices, _ = quantizer(torch.randn(50, D, device=DEVICE))
    plain = quantizer.export()
    assert plain.shape == (Q, K, D)
    assert torch.equal(plain[0][indices[:, 0]] + plain[1][indices[:, 1]] + plain[2][indices[:, 2]], z)


def test_evaluation_is_greedy_search():
    quantizer = Residual(stages(DiVeQ)).eval()
    x = torch.randn(90, D, device=DEVICE)
    total = torch.zeros_like(x)
    for q, codes in enumerate(quantizer.export()):
        expected, _ = brute_force(x - total, codes)
        assert torch.equal(quantizer(x).indices[:, q], expected)
        total = total + codes[expected]


def test_trailing_stages_may_be_missing():
    quantizer = Residual(stages(DiVeQ)).eval()
    indices = quantizer(torch.randn(9, D, device=DEVICE)).indices
    indices[:, 1:] = -1
    assert torch.equal(quantizer.decode(indices), quantizer.export()[0][indices[:, 0]])


@pytest.mark.parametrize("mode", ["codeword", "segment", "curve"])
def test_space_filling_evaluations(mode):
    quantizer = Residual(stages(SFDiVeQ)).eval()
    for s in quantizer.stages:
        s.estimator.evaluation = mode
    z, indices, _ = quantizer(torch.randn(30, D, device=DEVICE))
    assert indices.shape == (30, quantizer.codes_per_latent) == (30, 6 if mode == "segment" else 3)
    if mode == "curve":
        with pytest.raises(ValueError, match="codeword"):
            quantizer.decode(indices)
    else:
        assert torch.equal(quantizer.decode(indices), z)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("estimator", [STE, DiVeQ, SFDiVeQ])
@pytest.mark.parametrize("min_stages", [None, 1])
def test_a_row_that_is_not_finite_changes_nothing_else(estimator, joint, min_stages):
    x = torch.randn(40, D, device=DEVICE)
    dirty = x.clone()
    dirty[7, 2] = torch.inf
    keep = torch.arange(40, device=DEVICE) != 7
    quantizer, results = Residual(stages(estimator), joint=joint, min_stages=min_stages), []
    for rows, mask in ((dirty, None), (x, keep)):
        quantizer.zero_grad()
        torch.manual_seed(1)
        rows = rows.clone().requires_grad_()
        z, _, loss = quantizer(rows, mask)
        (z[keep].square().sum() + loss).backward()
        results.append((z, loss, rows.grad, [s.codebook.weight.grad for s in quantizer.stages]))
    bad, good = results
    assert bad[0][7].isnan().all() and bad[2][7].isnan().all() and not good[2][7].any()
    assert torch.equal(bad[0][keep], good[0][keep])
    torch.testing.assert_close(bad[1], good[1])
    torch.testing.assert_close(bad[2][keep], good[2][keep])
    for a, b in zip(bad[3], good[3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["ste", "sf", "composition", "dropout", "nested"])
def test_compiled(case):
    """A training step with upkeep and an evaluation, without a graph break."""
    torch._dynamo.reset()
    make = {
        "ste": lambda: Residual(stages(STE)),
        "sf": lambda: Residual(stages(SFDiVeQ)),
        "composition": lambda: Residual(stages(DiVeQ), joint=False),
        "dropout": lambda: Residual(stages(DiVeQ), min_stages=1),
        "nested": nested,
    }[case]
    quantizer = make()
    optimizer = torch.optim.SGD([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(()))], 0.0)
    quantizer.follow(optimizer)
    step = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, D, device=DEVICE, requires_grad=True)
    for mode in (True, False):
        quantizer.train(mode)
        torch.manual_seed(3)
        a = step(x)
        torch.manual_seed(3)
        b = quantizer(x)
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.z, b.z)
        (a.z.sum() + a.loss).backward()
        optimizer.step()


def test_layout_and_copies():
    quantizer = Residual(stages(DiVeQ), channel_dim=1)
    z, indices, _ = quantizer(torch.randn(2, D, 3, 4, device=DEVICE))
    assert z.shape == (2, D, 3, 4) and indices.shape == (2, 3, 4, Q)
    other = copy.deepcopy(quantizer).eval()
    x = torch.randn(2, D, 3, 4, device=DEVICE)
    assert torch.equal(other(x).z, quantizer.eval()(x).z)


def test_the_short_name():
    quantizer = build("residual", dim=D, num_codes=K, noise_std=0.25)
    assert quantizer.joint and [s.estimator.noise_std for s in quantizer.stages] == [0.25, 0.25]
    assert METHODS["residual"].noisy and METHODS["residual"].replace and quantizer.bits_per_latent == 8


def test_what_joins_by_default():
    assert not Residual([stage(STE()), stage(DiVeQ())]).joint and not Residual(stages(Gumbel)).joint
    assert not Residual([stage(DiVeQ()), stage(DiVeQ(noise_std=0.5))]).joint
    cosine = VectorQuantizer(Codebook(K, D), DiVeQ(), metric="cosine")
    projected = VectorQuantizer(Codebook(K, 2), DiVeQ(), dim=D)
    assert not Residual([cosine, cosine]).joint and not Residual([projected, projected]).joint


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "at least one quantizer", lambda: Residual([])),
        (TypeError, "be quantizers", lambda: Residual([Codebook(K, D)])),
        (ValueError, "the same features", lambda: Residual([stage(STE()), stage(STE(), dim=2)])),
        (ValueError, "at least 1", lambda: Residual(stages(STE), min_stages=0)),
        (ValueError, "at most 3", lambda: Residual(stages(STE), min_stages=4)),
        (ValueError, "not of one kind", lambda: Residual([stage(STE()), stage(DiVeQ())], joint=True)),
        (ValueError, "no sum of codes", lambda: Residual(stages(Gumbel), joint=True)),
        (ValueError, "not all VectorQuantizers", lambda: Residual([FSQ([4] * D)], joint=True)),
        (TypeError, "True or False", lambda: Residual(stages(STE), joint=1)),
        (
            ValueError,
            "channel_dim -1",
            lambda: Residual([VectorQuantizer(Codebook(4, 2), STE(), channel_dim=1)]),
        ),
    ],
)
def test_errors(error, words, make):
    with pytest.raises(error, match=words):
        make()
