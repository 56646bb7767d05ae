"""FSQ, LFQ, BSQ and random projections against float64 transcriptions of their papers."""

import itertools
import math

import numpy as np
import pytest
import torch

from vqkernels.nn import BSQ, FSQ, LFQ, RPQ, build
from vqkernels.nn.quantizers.fsq import factor_levels
from vqkernels.testing import DEVICE


@pytest.mark.parametrize("levels", [(2,), (3,), (8, 5, 5), (4, 2, 7, 3)], ids=str)
def test_fsq_equation(levels):
    """Mentzer et al. 2024: bound, round, normalise, and the number in mixed radix; gradient through tanh only."""
    x = (3 * torch.randn(200, len(levels), dtype=torch.float64, device=DEVICE)).requires_grad_()
    quantizer = FSQ(levels).to(DEVICE)
    z, indices, loss = quantizer(x)
    g = torch.randn_like(z)
    z.backward(g)
    for row, i in zip(range(200), indices[:, 0].tolist(), strict=True):
        digits, slope = [], []
        for v, level in zip(x[row].tolist(), levels, strict=True):
            half = (level - 1) * 1.001 / 2
            off = 0.5 if level % 2 == 0 else 0.0
            t = math.tanh(v + math.atanh(off / half))
            digits.append(round(t * half - off) + level // 2)
            slope.append(half * (1 - t * t) / (level // 2))
            assert 0 <= digits[-1] < level
        number = sum(d * math.prod(levels[:p]) for p, d in enumerate(digits))
        expected = [(d - level // 2) / (level // 2) for d, level in zip(digits, levels, strict=True)]
        assert i == number
        # z is the rounded value plus a difference of equal numbers
        np.testing.assert_allclose(z[row].tolist(), expected, rtol=0, atol=4e-16 * max(levels))
        # tanh near 1 cancels in 1 - t^2
        np.testing.assert_allclose(
            x.grad[row].tolist(), (g[row].cpu() * torch.tensor(slope)).tolist(), atol=1e-13
        )
    assert loss == 0 and quantizer.num_codes == math.prod(levels)


def test_fsq_reaches_every_code_and_numbers_them_all():
    quantizer = FSQ((5, 4, 3)).to(DEVICE).eval()
    grid = torch.linspace(-4, 4, 60, device=DEVICE)
    x = torch.cartesian_prod(grid, grid, grid)
    assert quantizer(x).indices.unique().numel() == 60
    table = quantizer.export()
    assert table.shape == (60, 3) and table.unique(dim=0).shape[0] == 60 and table.abs().max() == 1
    everyone = torch.arange(60, device=DEVICE)[:, None]
    assert torch.equal(quantizer.decode(everyone), table)


@pytest.mark.parametrize("k", [2, 3, 13, 16, 60, 256, 1000, 1024, 3 * 7**3, 2**16])
def test_levels_multiply_to_the_number_of_codes(k):
    levels = factor_levels(k)
    assert math.prod(levels) == k and min(levels) >= 2
    assert all(level <= 8 or all(level % p for p in range(2, level)) for level in levels)
    assert build("fsq", dim=6, num_codes=k).num_codes == k


@pytest.mark.parametrize("level", [1002, 1003, 65536])
def test_fsq_of_many_levels_saturates_at_the_last(level):
    quantizer = FSQ((level,)).to(DEVICE)
    x = torch.tensor([[-100.0], [100.0]], device=DEVICE)
    z, indices, _ = quantizer(x)
    assert indices.flatten().tolist() == [0, level - 1]
    assert torch.equal(quantizer.decode(indices), z)


def test_more_codes_than_a_table_holds():
    """K = 2^40: indices are arithmetic, nothing of size K exists."""
    for quantizer in (build("lfq", dim=12, num_codes=2**40), FSQ((8,) * 13, dim=12)):
        quantizer = quantizer.to(DEVICE).eval()
        x = torch.randn(50, 12, device=DEVICE)
        z, indices, _ = quantizer(x)
        assert indices.max() > 2**32
        assert torch.equal(quantizer.decode(indices), z)
        assert not quantizer.decode(torch.full((3, 1), -1, device=DEVICE)).any()


def soft_assignment(y, points, sharpness):
    return torch.softmax(-sharpness * (y[:, None] - points).square().sum(-1), dim=1)


@pytest.mark.parametrize("kind", [LFQ, BSQ])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 5.0])
def test_binary_equation(kind, sharpness):
    """Signs, bits, and the entropies of a softmax over all 2^b codes, in float64 (Yu et al. 2024; Zhao et al. 2025)."""
    bits = 5
    x = torch.randn(80, bits, dtype=torch.float64, device=DEVICE, requires_grad=True)
    quantizer = kind(bits, sharpness=sharpness, entropy_weight=0.7, diversity_weight=1.3).to(DEVICE)
    z, indices, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    y = x.detach().clone().requires_grad_()
    unit = 1.0 if kind is LFQ else bits**-0.5
    u = y if kind is LFQ else y / y.norm(dim=1, keepdim=True)
    points = torch.tensor(
        list(itertools.product((-unit, unit), repeat=bits)), dtype=torch.float64, device=DEVICE
    )
    # the first feature of a point is the lowest bit of its number
    points = points.flip(1)
    expected = (u[:, None] - points).square().sum(-1).argmin(1)
    assert torch.equal(indices[:, 0], expected)
    q = u + (points[expected] - u).detach()
    # BSQ: distances on the sphere are measured in units of its points' distance from 0
    p = soft_assignment(u / unit, points / unit, sharpness)
    entropy = torch.special.entr(p).sum(1).mean()
    spread = torch.special.entr(p.mean(0)).sum()
    reference = 0.7 * (entropy - 1.3 * spread)
    if kind is LFQ:
        reference = reference + 0.25 * (y - points[expected]).square().mean()
    (q.square().sum() + reference).backward()
    torch.testing.assert_close(z, q, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-12)


def test_many_bits_are_spread_in_groups():
    """Beyond 12 bits the entropy of the mean is the sum of those of even groups, each exact."""
    bits = 14
    x = torch.randn(50, bits, dtype=torch.float64, device=DEVICE)
    loss = LFQ(bits, entropy_weight=1.0, commitment_weight=0.0).to(DEVICE)(x).loss
    p = torch.sigmoid(4 * x)
    sure = (torch.special.entr(p) + torch.special.entr(1 - p)).sum(1).mean()
    spread = 0.0
    for group in p.chunk(2, dim=1):
        codes = torch.tensor(list(itertools.product((0, 1), repeat=7)), device=DEVICE)
        mean = torch.where(codes.bool(), group[:, None], 1 - group[:, None]).prod(-1).mean(0)
        spread += torch.special.entr(mean).sum()
    torch.testing.assert_close(loss, sure - spread, rtol=1e-12, atol=1e-12)


def test_correlated_bits_are_not_mistaken_for_many_codes():
    """All bits equal: two codes, of which the entropy of the mean knows ln 2 and not b ln 2."""
    y = torch.tensor([[1.0] * 6, [-1.0] * 6], device=DEVICE) * 9
    loss = LFQ(6, entropy_weight=1.0, commitment_weight=0.0, sharpness=1.0).to(DEVICE)(y).loss
    torch.testing.assert_close(loss, torch.tensor(-math.log(2), device=DEVICE))


def test_bsq_error_is_bounded():
    """|u - z| < sqrt(2 - 2/sqrt(b)) on the sphere (Zhao et al. 2025)."""
    for bits in (2, 6, 18):
        quantizer = BSQ(bits).to(DEVICE).eval()
        u = torch.nn.functional.normalize(torch.randn(5000, bits, dtype=torch.float64, device=DEVICE), dim=1)
        error = (quantizer(u).z - u).norm(dim=1)
        assert error.max() <= math.sqrt(2 - 2 / math.sqrt(bits)) + 1e-7
        torch.testing.assert_close(quantizer(u).z.norm(dim=1), torch.ones(5000, device=DEVICE).double())


def test_entropy_keeps_bits_in_use():
    """A constant encoder with a bias learns to use both values of every bit."""
    torch.manual_seed(0)
    quantizer = LFQ(4, entropy_weight=1.0).to(DEVICE)
    scale = torch.nn.Parameter(torch.full((4,), 0.3, device=DEVICE))
    shift = torch.nn.Parameter(torch.full((4,), 2.0, device=DEVICE))
    optimizer = torch.optim.Adam([scale, shift], 0.05)
    x = torch.randn(500, 4, device=DEVICE)
    before = quantizer(scale * x + shift).indices.unique().numel()
    for _ in range(200):
        loss = quantizer(scale * x + shift).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before == 1 and quantizer(scale * x + shift).indices.unique().numel() == 16


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_bit_that_never_changes_has_a_finite_gradient(sign):
    """Where all rows are sure of a bit, p ln p has an infinite slope at 0, and the slope of p is 0."""
    x = (40.0 * sign + torch.randn(30, 4, device=DEVICE)).requires_grad_()
    _, _, loss = LFQ(4)(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("codebooks", [1, 3])
def test_rpq_equation(codebooks):
    """Chiu et al. 2022, eq. 1, row by row in float64; all codebooks in one call."""
    quantizer = RPQ(10, 32, code_dim=6, codebooks=codebooks, channel_dim=1).to(DEVICE).double()
    x = torch.randn(4, 10, 9, dtype=torch.float64, device=DEVICE)
    mask = torch.rand(4, 9, device=DEVICE) < 0.7
    indices = quantizer(x, mask)
    assert indices.shape == (4, 9, codebooks) and not list(quantizer.parameters())
    for q in range(codebooks):
        y = torch.einsum("cd,bdt->btc", quantizer.projection[q], x)
        y = y / y.norm(dim=-1, keepdim=True)
        expected = (y[:, :, None] - quantizer.weight[q]).norm(dim=-1).argmin(-1)
        assert torch.equal(indices[..., q], torch.where(mask, expected, -1))
    torch.testing.assert_close(
        quantizer.weight.norm(dim=-1), torch.ones(codebooks, 32, device=DEVICE).double()
    )
    other = RPQ(10, 32, code_dim=6, codebooks=codebooks, channel_dim=1).to(DEVICE).double()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x, mask), indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQ(()), "FSQ: levels must have at least one entry; got none"),
        (lambda: FSQ((4, 1)), "FSQ: levels must be at least 2; got 1"),
        (
            lambda: build("lfq", dim=3, num_codes=12),
            "LFQ: num_codes must be a power of two above 1; got 12. Pass 8 or 16",
        ),
        (lambda: build("bsq", dim=3, num_codes=1), "BSQ: num_codes must be a power of two above 1; got 1"),
        (lambda: FSQ((8,) * 30), "FSQ: levels must have a product of at most"),
        (lambda: FSQ((65537,)), "FSQ: levels must be at most 65536; got 65537"),
        # a prime, whose search for factors would take minutes
        (lambda: build("fsq", dim=3, num_codes=2**61 - 1), "FSQ: num_codes must have no prime factor above"),
        (lambda: LFQ(40).export(), "LFQ: num_codes must be at most .* to export a table"),
        (lambda: build("fsq", dim=3, num_codes=1), "FSQ: num_codes must be at least 2; got 1"),
        (lambda: RPQ(0, 3), "RPQ: dim must be at least 1; got 0"),
        (lambda: RPQ(4, 3)(torch.zeros(2, 3)), "RPQ: x must have 4 features in dimension -1; got shape"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()
