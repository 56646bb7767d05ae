"""Every codebook equals the equation of its paper, exports what it decodes, and lives as long as a training."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vqkernels.nn import (
    METHODS,
    STE,
    AffineCodebook,
    AffineEMACodebook,
    Codebook,
    DiVeQ,
    HyperNetCodebook,
    LatentMeans,
    ProjectedCodebook,
    SimVQCodebook,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE

D, K = 5, 12
KINDS = ("identity", "linear-1", "linear-2", "mlp")
MAKERS = {
    "affine": lambda: AffineCodebook(K, D),
    "affine-3": lambda: AffineCodebook(K, D, groups=3, lr_scale=2.0),
    "affine-ema": lambda: AffineEMACodebook(K, D),
    "affine-ema-3": lambda: AffineEMACodebook(K, D, groups=3),
    **{kind: lambda kind=kind: HyperNetCodebook(K, D, kind=kind) for kind in KINDS},
    "simvq": lambda: SimVQCodebook(K, D),
    "projected": lambda: ProjectedCodebook(torch.randn(K, 7), D),
}
EVERY = pytest.mark.parametrize("name", list(MAKERS))
# the equation of each: parameters and buffers by name -> (K, D) codes
EQUATIONS = {
    "affine": lambda p: (1 + 10 * p["scale"]) * p["weight"] + 10 * p["bias"],
    "affine-3": lambda p: torch.cat(
        [(1 + 2 * p["scale"][g]) * p["weight"][4 * g : 4 * g + 4] + 2 * p["bias"][g] for g in range(3)]
    ),
    "affine-ema": lambda p: (
        (p["var_x"] / (p["var_c"][0] + 1e-8)).sqrt() * (p["weight"] - p["mean_c"][0]) + p["mean_x"]
    ),
    "identity": lambda p: p["weight"],
    "linear-1": lambda p: p["weight"] @ p["net.weight"].T + p["net.bias"],
    "linear-2": lambda p: p["net.weight"] @ p["weight"],
    "mlp": lambda p: (
        torch.tanh(p["weight"] @ p["net.0.weight"].T + p["net.0.bias"]) @ p["net.2.weight"].T
        + p["net.2.bias"]
    ),
    "simvq": lambda p: p["weight"] @ p["project.weight"].T + p["project.bias"],
    "projected": lambda p: p["weight"] @ p["project.weight"].T + p["project.bias"],
}


def make(name, dtype=torch.float64):
    """A codebook whose parameters are no longer what they started as."""
    codebook = MAKERS[name]().to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in codebook.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(2):
        x = torch.randn(30, D, device=DEVICE) * 3 + 1
        codebook.observe(x, torch.zeros(30, dtype=torch.int64, device=DEVICE))
        codebook.commit()
    return codebook


@pytest.mark.parametrize("name", list(EQUATIONS))
def test_equation_and_gradients(name):
    """Codes, and the gradients of STE's losses, are those of a few lines of autograd in float64."""
    codebook = make(name)
    quantizer = VectorQuantizer(codebook, STE())
    leaves = {key: value.detach().clone() for key, value in codebook.state_dict().items()}
    learned = [key for key, _ in codebook.named_parameters()]
    for key in learned:
        leaves[key].requires_grad_()
    codes = EQUATIONS[name](leaves)
    torch.testing.assert_close(codebook.codes(), codes, rtol=1e-13, atol=1e-13)
    x = torch.randn(50, D, dtype=torch.float64, device=DEVICE)
    chosen = codes[torch.cdist(x, codes).argmin(1)]
    expected = torch.autograd.grad(F.mse_loss(chosen, x), [leaves[key] for key in learned], retain_graph=True)
    quantizer(x).loss.backward()
    for key, gradient in zip(learned, expected, strict=True):
        found = codebook.get_parameter(key).grad
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["affine", "mlp", "linear-2", "simvq", "projected"])
def test_one_row_moves_every_code(name):
    """What the papers are after: codes that nobody chose follow the one that somebody chose."""
    codebook = make(name)
    before = codebook.codes().detach().clone()
    optimizer = torch.optim.SGD([*codebook.parameters()], 0.1)
    quantizer = VectorQuantizer(codebook, STE())
    quantizer(torch.randn(1, D, dtype=torch.float64, device=DEVICE) + 3).loss.backward()
    optimizer.step()
    assert (codebook.codes() - before).ne(0).any(1).all()


def test_sizes_of_the_hyper_net():
    """MQ 4.1 and table 7: Gaussian embedding, 32 -> 256 -> 32 with tanh, d' and K' as asked for."""
    shapes = lambda codebook: {key: tuple(value.shape) for key, value in codebook.state_dict().items()}
    assert shapes(HyperNetCodebook(100, 32)) == {
        "weight": (100, 32),
        "net.0.weight": (256, 32),
        "net.0.bias": (256,),
        "net.2.weight": (32, 256),
        "net.2.bias": (32,),
    }
    assert shapes(HyperNetCodebook(9, 4, kind="mlp", embedding_dim=3, hidden=5))["net.0.weight"] == (5, 3)
    assert shapes(HyperNetCodebook(9, 4, kind="linear-1", embedding_dim=3))["net.weight"] == (4, 3)
    assert shapes(HyperNetCodebook(9, 4, kind="linear-2", num_basis=3)) == {
        "weight": (3, 4),
        "net.weight": (9, 3),
    }
    for kind in KINDS:
        # 4 standard deviations of a standard deviation of 10^5 draws
        weight = HyperNetCodebook(
            1000, 100, kind=kind, **({"embedding_dim": 100} if "1" in kind else {})
        ).weight
        assert abs(weight.std() - 1) < 4 * (2 * weight.numel()) ** -0.5


def test_the_basis_of_simvq():
    """Frozen, N(0, 1/D), part of the state: a fresh module that loads it has the same codes."""
    codebook = SimVQCodebook(2000, 50)
    assert [key for key, _ in codebook.named_parameters()] == ["project.weight", "project.bias"]
    assert abs(codebook.weight.std() * 50**0.5 - 1) < 4 * (2 * 1e5) ** -0.5


def test_a_given_basis():
    basis = torch.randn(K, 7, device=DEVICE)
    quantizer = build("vqgan_lc", dim=D, num_codes=K, basis=basis)
    assert torch.equal(quantizer.codebook.weight, basis) and quantizer.dim == D and quantizer.num_codes == K
    basis.zero_()
    assert quantizer.codebook.weight.any() and not quantizer.codebook.weight.requires_grad
    assert quantizer.codebook.device == basis.device


@EVERY
def test_state_dict_loads_into_a_fresh_module(name):
    codebook, fresh = make(name, torch.float32), MAKERS[name]().to(DEVICE)
    assert not torch.equal(codebook.codes(), fresh.codes())
    fresh.load_state_dict(codebook.state_dict())
    assert torch.equal(codebook.codes(), fresh.codes())
    assert fresh.codes().shape == (K, D) == (fresh.num_codes, fresh.dim)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype):
    """Codes follow the module's dtype, statistics stay as wide as they were, also on a detour."""
    codebook = make(name, torch.float32)
    wide = codebook.codes().detach()
    half = copy.deepcopy(codebook).to(dtype)
    codes = half.codes()
    assert codes.dtype == dtype and codes.isfinite().all()
    if isinstance(codebook, AffineEMACodebook):
        for key in ("mean_x", "var_x", "mean_c", "var_c", "sums"):
            assert torch.equal(half.get_buffer(key), codebook.get_buffer(key))
        # weight and result are rounded once each
        scale = codebook.scale_and_bias()[0].repeat_interleave(K // codebook.groups, 0)
        bound = torch.finfo(dtype).eps * ((scale * codebook.weight).abs() + wide.abs())
        assert ((codes.float() - wide).abs() <= bound).all()


@EVERY
def test_autocast_leaves_codes_alone(name):
    quantizer = VectorQuantizer(make(name, torch.float32), STE()).eval()
    expected = quantizer.export()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        z, indices, _ = quantizer(torch.randn(20, D, device=DEVICE))
        assert torch.equal(quantizer.export(), expected) and torch.equal(quantizer.decode(indices), z)
    assert torch.equal(expected[indices[:, 0]], z)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.make is None])
def test_export_decodes_identically(name):
    """Bit by bit, through a plain codebook, after some training."""
    quantizer = build(name, dim=D, num_codes=K).to(DEVICE)
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(()))], 1e-2)
    quantizer.follow(optimizer)
    for _ in range(3):
        z, _, loss = quantizer(torch.randn(40, D, device=DEVICE, requires_grad=True))
        (z.square().sum() + loss).backward()
        optimizer.step()
    quantizer.eval()
    exported = quantizer.export()
    plain = VectorQuantizer(Codebook(K, D), STE()).to(DEVICE).eval()
    plain.codebook.assign(exported)
    z, indices, _ = quantizer(torch.randn(200, D, device=DEVICE))
    assert exported.shape == (K, D) and not exported.requires_grad
    assert torch.equal(plain.decode(indices), z) and torch.equal(exported[indices[:, 0]], z)
    if quantizer.metric == "euclidean" and quantizer.project_in is None:
        assert torch.equal(plain(z).indices, quantizer(z).indices)


@pytest.mark.parametrize("dim", [None, 9])
def test_codes_are_made_once_per_forward(dim):
    made = []

    class Counting(HyperNetCodebook):
        def codes(self):
            made.append(1)
            return super().codes()

    quantizer = VectorQuantizer(Counting(K, D), STE(), dim=dim).to(DEVICE)
    for run in (quantizer, quantizer.eval(), quantizer.encode):
        made.clear()
        run(torch.randn(6, dim or D, device=DEVICE))
        assert len(made) == 1


@pytest.mark.parametrize("name", ["cosine", "vqgan_fc"])
def test_cosine_equation(name):
    """Yu et al. 2022: project, scale latents and codes to length 1, search there, project back; float64 autograd."""
    quantizer = build(name, dim=D, num_codes=K).to(DEVICE).double()
    assert quantizer.codebook.dim == (D if name == "cosine" else 2)
    x = torch.randn(40, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z, indices, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    p = {key: value.detach().clone().requires_grad_() for key, value in quantizer.named_parameters()}
    v = x.detach().clone().requires_grad_()
    y = v if name == "cosine" else v @ p["project_in.weight"].T + p["project_in.bias"]
    y = y / y.norm(dim=1, keepdim=True)
    c = p["codebook.weight"] / p["codebook.weight"].norm(dim=1, keepdim=True)
    chosen = (y @ c.T).argmax(1)
    q = y + (c[chosen] - y).detach()
    expected_loss = F.mse_loss(c[chosen], y.detach()) + 0.25 * F.mse_loss(y, c[chosen].detach())
    expected = q if name == "cosine" else q @ p["project_out.weight"].T + p["project_out.bias"]
    (expected.square().sum() + expected_loss).backward()
    assert torch.equal(indices[:, 0], chosen)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, v.grad, rtol=1e-10, atol=1e-12)
    for key, parameter in quantizer.named_parameters():
        torch.testing.assert_close(parameter.grad, p[key].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 100])
def test_the_low_dimension_of_vqgan_fc(dim):
    quantizer = build("vqgan_fc", dim=dim, num_codes=K).to(DEVICE)
    assert quantizer.codebook.dim == min(8, max(2, dim // 2))
    assert quantizer(torch.randn(4, dim, device=DEVICE)).z.shape == (4, dim)


BASIS = torch.randn(K, 3)
REFUSED = {
    "groups": (lambda: AffineCodebook(10, 4, groups=3), r"groups must be equal parts of 10 codes; got 3\."),
    "a group of one": (lambda: AffineEMACodebook(4, 4, groups=4), r"4 codes, 2 or more in each; got 4"),
    "no groups": (lambda: AffineCodebook(10, 4, groups=0), r"groups must be at least 1; got 0"),
    "lr_scale": (lambda: AffineCodebook(4, 4, lr_scale=-1.0), r"AffineCodebook: lr_scale must be not neg"),
    "momentum": (lambda: AffineEMACodebook(4, 4, momentum=1.5), r"momentum must be in \[0, 1\]; got 1\.5"),
    "kind": (
        lambda: HyperNetCodebook(4, 4, kind="attention"),
        r"kind must be one of 'identity'.*'attention'",
    ),
    "hidden": (lambda: HyperNetCodebook(4, 4, kind="linear-1", hidden=9), r"hidden must be None for kind"),
    "num_basis": (lambda: HyperNetCodebook(4, 4, num_basis=9), r"num_basis must be None for kind 'mlp'"),
    "no features": (lambda: HyperNetCodebook(4, 4, embedding_dim=0), r"embedding_dim must be at least 1"),
    "no codes": (lambda: SimVQCodebook(0, 4), r"SimVQCodebook: num_codes must be at least 1; got 0"),
    "basis": (lambda: ProjectedCodebook(torch.randn(4), 4), r"basis must be \(K, d'\); got shape \(4,\)"),
    "ints": (
        lambda: ProjectedCodebook(torch.ones(4, 4, dtype=torch.int64), 4),
        r"be a floating-point tensor",
    ),
    "nan": (lambda: ProjectedCodebook(BASIS / 0, 4), r"basis must be finite; got a NaN or Inf"),
    "rows": (lambda: build("vqgan_lc", dim=4, num_codes=9, basis=BASIS), r"build: basis must be \(9, d'\)"),
    "useless": (lambda: build("simvq", dim=4, num_codes=K, basis=BASIS), r"None for 'simvq', which has none"),
    "assign": (
        lambda: SimVQCodebook(4, 4).assign(torch.ones(4, 4)),
        r"codebook must be assignable; got SimVQ",
    ),
    "upkeep": (
        lambda: VectorQuantizer(HyperNetCodebook(4, 4), DiVeQ(), [LatentMeans(3)]),
        r"codebook must have codes that can be overwritten for LatentMeans; got HyperNetCodebook",
    ),
    "built": (
        lambda: build("mq", dim=4, num_codes=4, upkeep=[LatentMeans(3)]),
        r"build: upkeep must be empty for 'mq', which has no codes that can be overwritten; got LatentMeans",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_at_construction(case):
    action, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        action()
    assert " must " in str(caught.value) and "; got " in str(caught.value)
