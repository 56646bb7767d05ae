"""Product quantizers: one search for groups that are alike, the joint form, sharing, warm-up, several processes."""

import pytest
import torch
import torch.nn.functional as F

from vqkernels import philox
from vqkernels.nn import (
    FSQ,
    NSVQ,
    STE,
    Codebook,
    Context,
    DiVeQ,
    DiVeQDetach,
    EMACodebook,
    Estimator,
    ImportanceReplacement,
    LatentMeans,
    Product,
    Residual,
    SFDiVeQ,
    SFDiVeQDetach,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE, NORMAL_ERROR, brute_force, family

G, D, K = 3, 4, 16


class LoopedSTE(STE):
    grouped = False


class LoopedDetach(DiVeQDetach):
    grouped = False


def part(estimator, *, codebook=Codebook, upkeep=(), dim=D, num_codes=K, **options):
    made = VectorQuantizer(codebook(num_codes, dim), estimator, upkeep, **options).to(DEVICE)
    made.codebook.assign(torch.randn(num_codes, dim, device=DEVICE))
    return made


def parts(estimator, count=G, **options):
    torch.manual_seed(6)
    return [part(estimator(), **options) for _ in range(count)]


def codes_of(quantizer):
    return torch.stack([p.export() for p in quantizer.ordered()])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize(("one", "many"), [(STE, LoopedSTE), (DiVeQDetach, LoopedDetach)])
def test_grouped_equals_looped(one, many, dirty, metric):
    """One call for all groups gives the indices and values of a call each, its losses and gradients."""
    x = torch.randn(50, G * D, device=DEVICE)
    mask = torch.rand(50, device=DEVICE) < 0.8
    if dirty:
        # only one group of the row is not finite, and no group of it counts
        x[3, 0], mask[3] = torch.nan, True
    results, calls = [], []
    for estimator in (one, many):
        quantizer = Product(parts(estimator, metric=metric), joint=False)
        grouped = quantizer._grouped
        quantizer._grouped = lambda *args, run=grouped: calls.append(1) or run(*args)
        rows = x.clone().requires_grad_()
        z, indices, loss = quantizer(rows, mask)
        (z[mask].nan_to_num().square().sum() + loss).backward()
        grads = [p.codebook.weight.grad for p in quantizer.parts]
        evaluated = quantizer.eval()(x, mask)
        results.append((z, indices, loss, rows.grad, grads, evaluated))
    assert len(calls) == 1
    a, b = results
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a[1], b[1]) and torch.equal(a[5].indices, b[5].indices)
    torch.testing.assert_close(a[5].z, b[5].z, rtol=0, atol=0, equal_nan=True)
    # sums of 50 rows in another order
    scale = 50 * 2**-23
    assert abs(a[2] - b[2]) <= scale * G * abs(b[2])
    torch.testing.assert_close(
        a[3], b[3], rtol=scale, atol=scale * float(x.nan_to_num().abs().max()), equal_nan=True
    )
    for first, second in zip(a[4], b[4], strict=True):
        torch.testing.assert_close(first, second, rtol=scale, atol=scale * float(second.abs().max()))


def test_the_losses_of_groups_are_summed():
    quantizer = Product(parts(STE))
    x = torch.randn(30, G * D, device=DEVICE)
    z, indices, loss = quantizer(x)
    chosen = torch.cat([c[i] for c, i in zip(codes_of(quantizer), indices.t(), strict=True)], 1)
    torch.testing.assert_close(z, chosen)
    torch.testing.assert_close(loss, 1.25 * G * F.mse_loss(x, chosen))


@pytest.mark.parametrize("estimator", [DiVeQ, NSVQ, SFDiVeQ, SFDiVeQDetach])
def test_groups_of_the_directional_family(estimator):
    """Not joint: row `latent * G + g` of one seed, and the dither of G K codes, in float64."""
    quantizer = Product(parts(estimator), joint=False).double()
    x = torch.randn(40, G * D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    seed, offset = torch.tensor(99, device=DEVICE), 5
    z, indices, _ = quantizer.train_rows(x, Context(seed, offset))
    codes, y = codes_of(quantizer).requires_grad_(), x.detach().clone().requires_grad_()
    rows, first = y.view(40 * G, D), torch.arange(G, device=DEVICE) * K
    position, expected = None, []
    words = philox.words(seed, torch.zeros(1, dtype=torch.int64, device=DEVICE), G * K // 4, 2)
    at = ((words >> 8).double() / 2**24).view(G, K)
    sf = issubclass(estimator, (SFDiVeQ, SFDiVeQDetach))
    for g in range(G):
        points = codes[g].detach()
        if sf:
            points = (1 - at[g, :-1, None]) * points[:-1] + at[g, :-1, None] * points[1:]
        expected.append(brute_force(y.detach()[:, g * D : g * D + D], points)[0])
    expected = torch.stack(expected, 1)
    assert torch.equal(indices, expected)
    flat = (expected + first).flatten()
    position = at.flatten()[flat] if sf else None
    direction = {DiVeQ: "noisy", SFDiVeQ: "noisy", NSVQ: "random"}.get(estimator, "detach")
    f = family(
        rows,
        codes.view(G * K, D),
        flat,
        direction=direction,
        noise_std=1e-3**0.5,
        seed=99,
        position=position,
        row_offset=offset * G,
    )
    spread = {"noisy": 1e-3**0.5, "random": 1.0, "detach": 0.0}[direction]
    bound = max(float((2 * spread * D**0.5 * NORMAL_ERROR / w).max()) for w in f.w_norm) + 1e-12
    g = torch.randn_like(z)
    z.backward(g)
    f.z.backward(g.view_as(f.z))
    assert ((z.view_as(f.z) - f.z).abs() <= sum(f.r) * bound + 1e-12).all()
    size = 2 * g.view_as(f.z).norm(dim=1).max()
    assert ((x.grad - y.grad).abs() <= size * bound).all()
    for p, grad in zip(quantizer.parts, codes.grad, strict=True):
        assert ((p.codebook.weight.grad - grad).abs() <= 40 * size * bound).all() and grad.any()


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("estimator", [DiVeQ, DiVeQDetach])
def test_the_joint_form(estimator, sizes):
    """DiVeQ C.7 in float64: one length and one noise over the concatenated vector, groups equal or not."""
    quantizer = Product([part(estimator(), dim=size) for size in sizes]).double()
    assert quantizer.joint
    x = torch.randn(60, sum(sizes), dtype=torch.float64, device=DEVICE, requires_grad=True)
    seed = torch.tensor(123, device=DEVICE)
    z, indices, loss = quantizer.train_rows(x, Context(seed, 7))
    codes = [p.export().requires_grad_() for p in quantizer.parts]
    y = x.detach().clone().requires_grad_()
    chosen = []
    for q, (c, group) in enumerate(zip(codes, y.detach().split(sizes, 1), strict=True)):
        expected, _ = brute_force(group, c.detach())
        assert torch.equal(indices[:, q], expected)
        chosen.append(c[expected])
    noisy = estimator is DiVeQ
    f = family(
        y,
        torch.cat(chosen, 1),
        torch.arange(60, device=DEVICE),
        direction="noisy" if noisy else "detach",
        noise_std=1e-3**0.5,
        seed=123,
        row_offset=7,
    )
    wide = sum(sizes) ** 0.5
    bound = float((2 * 1e-3**0.5 * wide * NORMAL_ERROR / f.w_norm[0]).max()) * noisy + 1e-12
    g = torch.randn_like(z)
    z.backward(g)
    f.z.backward(g)
    size = g.norm(dim=1, keepdim=True)
    assert loss == 0 and ((z - f.z).abs() <= f.r[0] * bound + 1e-12).all()
    assert ((x.grad - y.grad).abs() <= size * bound).all()
    for p, c in zip(quantizer.parts, codes, strict=True):
        assert c.grad.any() and ((p.codebook.weight.grad - c.grad).abs() <= size.sum() * bound).all()


def test_the_joint_form_of_space_filling_groups():
    """The target is made of dithered points, and the two codes of each share its gradient as 1 - l and l."""
    quantizer = Product(parts(SFDiVeQDetach)).double()
    assert quantizer.joint
    x = torch.randn(40, G * D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, indices, _ = quantizer.train_rows(x, Context(torch.tensor(5, device=DEVICE)))
    words = philox.words(
        torch.tensor(5, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE), G * K // 4, 2
    )
    at = ((words >> 8).double() / 2**24).view(G, K)
    codes, chosen = codes_of(quantizer).requires_grad_(), []
    for g in range(G):
        weight = at[g, :-1, None]
        points = (1 - weight) * codes[g, :-1] + weight * codes[g, 1:]
        expected, _ = brute_force(x.detach()[:, g * D : g * D + D], points.detach())
        assert torch.equal(indices[:, g], expected)
        chosen.append(points[expected])
    y = x.detach().clone().requires_grad_()
    target = torch.cat(chosen, 1)
    error = target - y
    out = y + error.norm(dim=1, keepdim=True) * (error / error.norm(dim=1, keepdim=True)).detach()
    torch.testing.assert_close(z, out, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(z)
    z.backward(upstream)
    out.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-11)
    for p, grad in zip(quantizer.parts, codes.grad, strict=True):
        torch.testing.assert_close(p.codebook.weight.grad, grad, rtol=1e-11, atol=1e-11)


def test_ste_is_the_same_jointly():
    x = torch.randn(20, G * D, device=DEVICE)
    assert not Product(parts(STE)).joint
    for estimator in (STE, LoopedSTE):
        a, b = (Product(parts(estimator), joint=joint)(x) for joint in (False, True))
        assert torch.equal(a.z, b.z) and torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize("shape", [(7, G * D), (2, G * D, 3, 5), (G * D,), (0, G * D)], ids=str)
@pytest.mark.parametrize("joint", [True, False])
def test_layouts(shape, joint):
    channel_dim = 1 if len(shape) == 4 else -1
    quantizer = Product.of(G, lambda: part(DiVeQ()), joint=joint, channel_dim=channel_dim)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    z, indices, loss = quantizer(x)
    (z.sum() + loss).backward()
    assert z.shape == x.shape and indices.shape == (*x.movedim(channel_dim, -1).shape[:-1], G)
    z, indices, _ = quantizer.eval()(x)
    assert torch.equal(quantizer.decode(indices).movedim(-1, channel_dim), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("joint", [True, False])
def test_dtypes(dtype, joint):
    quantizer = Product(parts(DiVeQ), joint=joint)
    x = torch.randn(30, G * D, device=DEVICE).to(dtype).requires_grad_()
    z, _, loss = quantizer(x)
    (z.float().square().sum() + loss).backward()
    assert z.dtype == x.grad.dtype == dtype and all(p.codebook.weight.grad.any() for p in quantizer.parts)
    z, indices, _ = quantizer.eval()(x)
    assert torch.equal(quantizer.decode(indices).to(dtype), z)


def test_a_shared_codebook():
    """One part for all groups: statistics of all, one commit (DiVeQ eq. 3), one entry of the state_dict."""
    one = part(STE(codebook_weight=0), codebook=EMACodebook).double()
    quantizer = Product([one] * G)
    assert len(quantizer.parts) == 1 and quantizer.dim == G * D
    x, codes = torch.randn(50, G * D, dtype=torch.float64, device=DEVICE), one.export()
    indices = quantizer(x).indices.flatten()
    rows = x.view(-1, D)
    n = torch.zeros(K, 1, device=DEVICE).double().index_add_(0, indices, torch.ones_like(rows[:, :1]))
    sums = torch.zeros_like(codes).index_add_(0, indices, rows)
    quantizer.commit()
    torch.testing.assert_close(
        one.export(), codes + 0.01 * (sums - n * codes) / (0.99 + 0.01 * n), rtol=1e-12, atol=1e-12
    )
    assert one.get_extra_state().tolist() == [1, 0]


def test_a_shared_learned_codebook_has_the_gradient_of_all_groups():
    torch.manual_seed(6)
    shared, x = part(STE()), torch.randn(50, G * D, device=DEVICE)
    apart = [part(STE()) for _ in range(G)]
    for p in apart:
        p.load_state_dict(shared.state_dict())
    Product([shared] * G)(x).loss.backward()
    Product(apart)(x).loss.backward()
    torch.testing.assert_close(
        shared.codebook.weight.grad, sum(p.codebook.weight.grad for p in apart), rtol=1e-5, atol=1e-6
    )


def nested():
    return Product(
        [
            Residual([part(STE(), dim=2), part(STE(), dim=2)]),
            FSQ([3, 3]).to(DEVICE),
            part(SFDiVeQ(), num_codes=8),
            part(DiVeQ(), metric="cosine"),
        ]
    )


def test_nesting_decodes_and_exports():
    quantizer = nested()
    assert not quantizer.joint and quantizer.dim == 12 and quantizer.codes_per_latent == 5
    assert quantizer.bits_per_latent == pytest.approx(4 + 4 + torch.tensor(9.0).log2().item() + 3 + 4)
    x = torch.randn(20, 12, device=DEVICE, requires_grad=True)
    z, indices, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    assert indices.shape == (20, 5) and all(p.grad.any() for p in quantizer.parameters())
    z, indices, _ = quantizer.eval()(x)
    assert torch.equal(quantizer.decode(indices), z) and torch.equal(quantizer.encode(x), indices)
    plain = quantizer.export()
    assert plain.shape == (5, K, 12) and quantizer.num_codes == K and plain[2, 9:].isnan().all()
    assert torch.equal(sum(plain[q, indices[:, q]] for q in range(5)), z)


@pytest.mark.parametrize("mode", ["codeword", "segment", "curve"])
def test_space_filling_evaluations(mode):
    quantizer = Product(parts(SFDiVeQ)).eval()
    for p in quantizer.parts:
        p.estimator.evaluation = mode
    x = torch.randn(30, G * D, device=DEVICE)
    z, indices, _ = quantizer(x)
    assert indices.shape == (30, quantizer.codes_per_latent)
    for g, p in enumerate(quantizer.parts):
        assert torch.equal(z[:, g * D : g * D + D], p.eval()(x[:, g * D : g * D + D]).z)
    if mode != "curve":
        assert torch.equal(quantizer.decode(indices), z)


def test_warm_up():
    """Every part starts as means of its own features; z = x until all have started."""
    upkeep = LatentMeans(2, latents_per_code=4)
    quantizer = build("product", dim=2 * D, num_codes=K, upkeep=[upkeep]).to(DEVICE)
    x = torch.randn(4 * K, 2 * D, device=DEVICE)
    for _ in range(2):
        z, indices, _ = quantizer(x)
        assert torch.equal(z, x) and (indices == -1).all() and not quantizer.initialized
        quantizer.commit()
    assert quantizer.initialized
    means = x.view(K, 4, 2 * D).mean(1)
    for g, p in enumerate(quantizer.parts):
        torch.testing.assert_close(p.export(), means[:, g * D : g * D + D])


def test_replacement_in_each_part():
    upkeep = ImportanceReplacement(TwoPhase(9, 1, stop_before=0), threshold=1)
    quantizer = build("product", dim=2 * D, num_codes=K, upkeep=[upkeep]).to(DEVICE)
    before = codes_of(quantizer)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)
    quantizer.follow(optimizer)
    quantizer(torch.randn(50, 2 * D, device=DEVICE))
    assert torch.equal(before, codes_of(quantizer))
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, codes_of(quantizer), strict=True))


def test_one_search_for_all_groups(monkeypatch):
    calls = []
    choose = Estimator.choose
    monkeypatch.setattr(
        Estimator, "choose", lambda self, x, *rest: calls.append(x.shape) or choose(self, x, *rest)
    )
    Product(parts(DiVeQ))(torch.randn(5, G * D, device=DEVICE))
    assert calls == [(5, G, D)]


@pytest.mark.parametrize("case", ["ste", "separate", "sf", "unequal", "shared", "nested"])
def test_compiled(case):
    torch._dynamo.reset()
    quantizer = {
        "ste": lambda: Product(parts(STE)),
        "separate": lambda: Product(parts(DiVeQ), joint=False),
        "sf": lambda: Product(parts(SFDiVeQ)),
        "unequal": lambda: Product([part(DiVeQ(), dim=5), part(DiVeQ(), dim=7)]),
        "shared": lambda: Product([part(DiVeQ())] * G),
        "nested": nested,
    }[case]()
    step = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, G * D, device=DEVICE, requires_grad=True)
    for mode in (True, False):
        quantizer.train(mode)
        torch.manual_seed(3)
        a = step(x)
        torch.manual_seed(3)
        b = quantizer(x)
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.z, b.z)
        (a.z.sum() + a.loss).backward()


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "at least one quantizer", lambda: Product([])),
        (TypeError, "be quantizers", lambda: Product([4, 4])),
        (ValueError, "even for 'product'", lambda: build("product", dim=5, num_codes=4)),
        (ValueError, "at least 1", lambda: Product.of(0, lambda: part(STE()))),
        (ValueError, "not of one kind", lambda: Product([part(STE()), part(DiVeQ())], joint=True)),
        (ValueError, "cosine", lambda: Product([part(STE(), metric="cosine")], joint=True)),
    ],
)
def test_errors(error, words, make):
    with pytest.raises(error, match=words):
        make()
